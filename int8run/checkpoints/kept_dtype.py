"""Which dtype a weight gets that is quantized in its file and is to be float in another.

Such a weight has no float dtype of its own; the float tensors beside it tell which one its maker chose.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from int8run.checkpoints.layer import FLOAT, GGUF, CheckpointLayer
from int8run.checkpoints.reader import TensorFiles

DEFAULT_DTYPE = "BF16"
# by safetensors' names; where two are as frequent the first one counts
FLOAT_DTYPES = ("BF16", "F16", "F32")
# beside blocks of a GGUF file, whose converters write what is small in F32, however the model was published
GGUF_DTYPES = ("BF16", "F16")


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
    if any(layer.storage_dtype == GGUF for layer in quantized):
        return choose_beside_blocks(counts)
    if not counts:
        return KeptDtype(DEFAULT_DTYPE, "the source has no float tensor that shows another dtype")
    name = max(FLOAT_DTYPES, key=lambda dtype: counts[dtype])
    return KeptDtype(name, f"as {counts[name]} of the {counts.total()} float tensors of the source")


def choose_beside_blocks(counts: Counter[str]) -> KeptDtype:
    """The dtype of numbers that are blocks of a GGUF file.

    Args:
        counts: how many float tensors beside them have each dtype.
    """
    name = max(GGUF_DTYPES, key=lambda dtype: counts[dtype])
    if counts[name]:
        return KeptDtype(name, f"as {counts[name]} of the {counts.total()} float tensors of the source")
    return KeptDtype(
        DEFAULT_DTYPE, "as most denoisers are published; of a denoiser model.dtype=float32 keeps every digit"
    )


def count_float_dtypes(files: TensorFiles, prefix: str, left_out: Collection[str]) -> Counter[str]:
    """Count the dtypes of the float tensors below a prefix, but those that are left out."""
    dtypes = [info.dtype for key, info in files.items() if key.startswith(prefix) and key not in left_out]
    return Counter(dtype for dtype in dtypes if dtype in FLOAT_DTYPES)
