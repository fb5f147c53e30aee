"""Which dtypes each part of an adapter may have in a file: the ones that can be computed with.

A safetensors file may hold any dtype of the format, of which PyTorch adds and multiplies only some. The check
needs the header alone, so that no tensor of another dtype is read.
"""

from int8run.errors import LoraError

# safetensors' names
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
INTEGERS = ("I64", "I32", "I16", "I8", "U8")

# integers among these need a scale beside them, see `int8run.lora.parse.dequantize_factors`
FACTOR_DTYPES = (*FLOATS, *INTEGERS)
# part -> what it may be, where that differs from `FACTOR_DTYPES`
DTYPES_BY_PART = {
    "alpha": (*FLOATS, *INTEGERS),
    "dora_scale": FLOATS,
    "magnitude": FLOATS,
    "down_scale": FLOATS,
    "up_scale": FLOATS,
    "on_input": ("BOOL", *FLOATS, *INTEGERS),
}


def check_dtype(part: str, title: str, dtype: str) -> None:
    """Check that a part can be computed with.

    Args:
        part: as `int8run.lora.key_parsing` calls it.
        title: its name for messages.
        dtype: safetensors' name.

    Raises:
        LoraError: with what it may be.
    """
    allowed = DTYPES_BY_PART.get(part, FACTOR_DTYPES)
    if dtype not in allowed:
        raise LoraError(f"has {dtype} numbers in its {title}; they may be {', '.join(allowed)}")
