"""Which dtype a weight gets that is quantized in its file and is to be float in another.

Such a weight has no float dtype of its own; the float tensors beside it tell which one its maker chose.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from int8run.checkpoints.layer import FLOAT, CheckpointLayer
from int8run.checkpoints.reader import TensorFiles

DEFAULT_DTYPE = "BF16"
# by safetensors' names; where two are as frequent the first one counts
FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class KeptDtype:
    """The dtype of such weights, and why it is that one.

    Args:
        name: by safetensors' name: BF16, F16 or F32.
        reason: for messages.
    """

    name: str
    reason: str


def find_kept_dtype(files: TensorFiles, layers: Mapping[str, CheckpointLayer], prefix: str) -> KeptDtype:
    """Find the most frequent dtype of the float tensors of a model; bfloat16 where it has none.

    Args:
        files: the checkpoint.
        layers: its weights by name.
        prefix: of the model's keys.
    """
    quantized = [layer for layer in layers.values() if layer.storage_dtype != FLOAT]
    left_out = {key for layer in layers.values() for key in layer.sibling_keys}
    left_out |= {layer.key for layer in quantized}
    counts = count_float_dtypes(files, prefix, left_out)
    if not counts:
        return KeptDtype(DEFAULT_DTYPE, "the source has no float tensor that shows another dtype")
    name = max(FLOAT_DTYPES, key=lambda dtype: counts[dtype])
    return KeptDtype(name, f"as {counts[name]} of the {counts.total()} float tensors of the source")


def count_float_dtypes(files: TensorFiles, prefix: str, left_out: Collection[str]) -> Counter[str]:
    """Count the dtypes of the float tensors below a prefix, but those that are left out."""
    dtypes = [info.dtype for key, info in files.items() if key.startswith(prefix) and key not in left_out]
    return Counter(dtype for dtype in dtypes if dtype in FLOAT_DTYPES)
