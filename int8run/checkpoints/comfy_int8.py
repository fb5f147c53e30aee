"""INT8 checkpoints as one safetensors file, by ComfyUI's names: `weight` (int8), `weight_scale` and a `comfy_quant` marker a layer.

Layers without a transform and layers rotated by a regular Hadamard matrix are ComfyUI's own `int8_tensorwise`. The others carry a
format name of ours, which ComfyUI refuses: it would otherwise load them as if nothing had been done to them.
"""

import json
from collections.abc import Mapping
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from int8run.checkpoints.writer import TensorEntry
from int8run.errors import FileError
from int8run.outlier.base import NONE, OutlierTransform

COMFY_FORMAT, INT8RUN_FORMAT = "int8_tensorwise", "int8run_transformed"
CONVROT = "convrot"
MARKER, SCALE, FACTOR = "comfy_quant", "weight_scale", "pre_quant_scale"
WEIGHT = ".weight"
PROVENANCE_KEY = "int8run"  # the key of our note in the header's metadata


def prepare_output_path(location: str) -> Path:
    """Make the folder of a file to be, or the folder itself where the name has no suffix, and try whether it can be written to.

    Returns:
        The absolute path.

    Raises:
        FileError: when it cannot.
    """
    path = Path(location).expanduser().absolute()
    try:
        if path.suffix and path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        folder = path.parent if path.suffix else path
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise make_save_error(location, error) from error
    return path


def make_save_error(location: str, error: Exception) -> FileError:
    """The error for a place that cannot be written to."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return FileError(f"save={location} cannot be written: {reason}; choose a folder that you may write to")


def build_marker(transform: OutlierTransform) -> dict[str, object]:
    """What a reader must know of one layer besides its tensors."""
    if transform.method == NONE:
        return {"format": COMFY_FORMAT, "per_row": True}
    if transform.method == CONVROT:
        return {
            "format": COMFY_FORMAT,
            "convrot": True,
            "convrot_groupsize": transform.group_size,
            "per_row": True,
        }
    kind = {"rotation": "sylvester" if transform.sylvester else "regular", "group_size": transform.group_size}
    return {
        "format": INT8RUN_FORMAT,
        "outlier": transform.method,
        "settings": transform.settings,
        **(kind if transform.group_size else {}),
        "centered": transform.centered,
        "factor": transform.factor is not None,
    }


def encode_marker(transform: OutlierTransform) -> bytes:
    """A marker as it stands in the file."""
    return json.dumps(build_marker(transform)).encode()


def sibling_key(key: str, suffix: str) -> str:
    """The key of what stands beside a weight."""
    return f"{key.removesuffix(WEIGHT)}.{suffix}"


def plan_int8_entries(key: str, shape: tuple[int, ...], transform: OutlierTransform) -> list[TensorEntry]:
    """What an INT8 weight adds to a file: its integers [N, K], a scale per row, its marker, and a factor per column where it has one."""
    rows, columns = shape
    found: list[TensorEntry] = [(key, "I8", shape), (sibling_key(key, SCALE), "F32", (rows, 1))]
    found.append((sibling_key(key, MARKER), "U8", (len(encode_marker(transform)),)))
    return found + ([(sibling_key(key, FACTOR), "F32", (columns,))] if transform.factor is not None else [])


def read_provenance(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """How int8run made a file; empty when another program did.

    Raises:
        FileError: when it cannot be read.
    """
    try:
        found = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: the note in the header is no JSON: {metadata[PROVENANCE_KEY][:80]!r}"
        ) from error
    if not isinstance(found, dict):
        raise FileError(
            f"{path}: the note in the header is no JSON object: {metadata[PROVENANCE_KEY][:80]!r}"
        )
    return found
