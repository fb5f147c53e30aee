"""The header of a safetensors file: what is in it, before any tensor is read."""

import json
from pathlib import Path

from int8run.errors import FileError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Tensor entries and metadata of a safetensors file; no tensor is read.

    Raises:
        FileError: missing, pickled, truncated, or not a safetensors file.
    """
    if path.suffix.lower() in PICKLED:
        raise FileError(f"{path} is a pickled file, which can run code when opened; convert it to .safetensors first")
    if not path.is_file():
        raise FileError(f"{path}: no such file (looked for {path.absolute()})")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 2 <= length <= min(MAX_HEADER_BYTES, size - 8) else b""
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text:
        raise FileError(f"{path} is not a safetensors file, or it is cut off: its first 8 bytes give no possible header length")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not a safetensors file: its header is no JSON ({error})") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(header, dict) or not is_text(metadata) or not all(is_entry(entry) for entry in header.values()):
        raise FileError(f"{path} is not a safetensors file: its header is no JSON object of tensors with dtype, shape and offsets")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise FileError(f"{path} is damaged: the header describes {8 + length + end} bytes, the file has {size}")
    return header, metadata


def is_text(metadata: object) -> bool:
    """Whether metadata is a mapping of text to text, as the format asks for."""
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def is_entry(entry: object) -> bool:
    """Whether a header entry has what the format asks for."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("shape"), list):
        return False
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(o, int) for o in offsets)
