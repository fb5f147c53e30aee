"""What dtype each tensor of a checkpoint may have: one table, so that nothing else reaches torch.

Torch stores booleans, unsigned integers of 16 bits and more, and numbers of 4 and 6 bits, and cannot compute
in them; and an integer where a parameter is expected is not a number of the model.
"""

from collections.abc import Mapping

from int8run.checkpoints import grouped, quip
from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.checkpoints.header import FLOATS, FP8, INTEGERS
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

PARAMETER = "parameter"  # of a model: a weight that is not quantized, a bias, a norm, a table
BUFFER = "buffer"  # of integers, in a model
# what a tensor is for -> safetensors' names of the dtypes that it may have. Weights and scales have tables of
# their own, `classify.STORAGE_DTYPES` and `header.FLOATS`; what is not read (`input`, `copy`) may
# be anything.
PART_DTYPES: Mapping[str, tuple[str, ...]] = {
    PARAMETER: (*FLOATS, *FP8),
    BUFFER: (*INTEGERS, "BOOL"),
    "marker": ("U8",),
    "factor": FLOATS,
    "global": FLOATS,
    "scalar": FLOATS,
    "matrix": FLOATS,
    "sigma": FLOATS,
    **grouped.PART_DTYPES,
    **dict.fromkeys(quip.ALL_PARTS, (*FLOATS, *INTEGERS)),
    quip.HADAMARD_FLAG: (*FLOATS, *INTEGERS, "BOOL"),
}


def check_part_dtype(info: TensorInfo, part: str) -> None:
    """Raise FileError for a tensor whose dtype its part cannot have.

    Args:
        info: of the tensor.
        part: what it is for, a key of `PART_DTYPES`; others may be anything.
    """
    allowed = PART_DTYPES.get(part)
    if allowed is None or info.dtype in allowed:
        return
    raise FileError(
        f"{info.file}: {info.key} is {info.dtype}; allowed are {', '.join(allowed)}, so the file is damaged "
        "or of a format that int8run does not know"
    )


def check_part_dtypes(files: TensorFiles, keys: Mapping[str, str]) -> None:
    """Check the tensors beside one weight.

    Args:
        files: the checkpoint.
        keys: what for -> key.

    Raises:
        FileError: for a dtype that a part cannot have.
    """
    for part, key in keys.items():
        check_part_dtype(files[key], part)
