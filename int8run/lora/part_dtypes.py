"""Which dtypes each part of an adapter may have in a file: the ones that can be computed with.

A safetensors file may hold any dtype of the format, of which PyTorch adds and multiplies only some. The check
needs the header alone, so that no tensor of another dtype is read.
"""

from int8run.checkpoints.header import FLOATS, FP8, INTEGERS
from int8run.errors import LoraError

ANY_FLOATS = (*FLOATS, *FP8, "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# integers among these need a scale beside them, see `int8run.lora.parse.dequantize_factors`
FACTOR_DTYPES = (*ANY_FLOATS, *INTEGERS)
# part -> what it may be, where that differs from `FACTOR_DTYPES`
DTYPES_BY_PART = {
    "dora_scale": ANY_FLOATS,
    "magnitude": ANY_FLOATS,
    "down_scale": ANY_FLOATS,
    "up_scale": ANY_FLOATS,
    "on_input": ("BOOL", *ANY_FLOATS, *INTEGERS),
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
