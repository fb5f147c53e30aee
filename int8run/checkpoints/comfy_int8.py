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

from int8run.checkpoints.writer import Entry
from int8run.errors import FileError
from int8run.outlier.base import NONE, OutlierTransform

COMFY, OURS = "int8_tensorwise", "int8run_transformed"
CONVROT = "convrot"
MARKER, SCALE, FACTOR = "comfy_quant", "weight_scale", "pre_quant_scale"
WEIGHT = ".weight"
NOTE = "int8run"  # the key of our note in the header's metadata


def prepare_folder(location: str) -> Path:
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
        raise unwritable(location, error) from error
    return path


def unwritable(location: str, error: Exception) -> FileError:
    """The error for a place that cannot be written to."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return FileError(f"save={location} cannot be written: {reason}; choose a folder that you may write to")


def marker(transform: OutlierTransform) -> dict[str, object]:
    """What a reader must know of one layer besides its tensors."""
    if transform.method == NONE:
        return {"format": COMFY, "per_row": True}
    if transform.method == CONVROT:
        return {"format": COMFY, "convrot": True, "convrot_groupsize": transform.group_size, "per_row": True}
    kind = {"rotation": "sylvester" if transform.sylvester else "regular", "group_size": transform.group_size}
    return {
        "format": OURS,
        "outlier": transform.method,
        "settings": transform.settings,
        **(kind if transform.group_size else {}),
        "centered": transform.centered,
        "factor": transform.factor is not None,
    }


def marker_bytes(transform: OutlierTransform) -> bytes:
    """A marker as it stands in the file."""
    return json.dumps(marker(transform)).encode()


def beside(key: str, suffix: str) -> str:
    """The key of what stands beside a weight."""
    return f"{key.removesuffix(WEIGHT)}.{suffix}"


def int8_entries(key: str, shape: tuple[int, ...], transform: OutlierTransform) -> list[Entry]:
    """What an INT8 weight adds to a file: its integers [N, K], a scale per row, its marker, and a factor per column where it has one."""
    rows, columns = shape
    found: list[Entry] = [(key, "I8", shape), (beside(key, SCALE), "F32", (rows, 1))]
    found.append((beside(key, MARKER), "U8", (len(marker_bytes(transform)),)))
    return found + ([(beside(key, FACTOR), "F32", (columns,))] if transform.factor is not None else [])


def read_note(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """How int8run made a file; empty when another program did.

    Raises:
        FileError: when it cannot be read.
    """
    try:
        found = json.loads(metadata.get(NOTE, "{}"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: the note in the header is no JSON: {metadata[NOTE][:80]!r}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path}: the note in the header is no JSON object: {metadata[NOTE][:80]!r}")
    return found
