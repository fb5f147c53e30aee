"""The dtypes that diffusion models compute in. Settings and backends ask here; it does not import torch."""

# by torch's names
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
