"""What a file says of its quantized layers in words: `comfy_quant` marker tensors and `_quantization_metadata` in the header.

Both carry one JSON object a layer. ComfyUI defined them, other programs wrote variants: without a format, with fields nested in
`params`, with doubled braces, padded with NUL bytes. ComfyUI takes the header's object where both are there.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

log = logging.getLogger(__name__)
MARKER, METADATA_KEY = "comfy_quant", "_quantization_metadata"
INT8RUN_FORMAT = "int8run_transformed"
MAX_MARKER_BYTES = 65536  # the longest that is known has 150
# a flag and its size: what is rotated. Pre-native files of INT8-Fast say `quarot` and mean the same
ROTATION_FLAGS = {"convrot": "convrot_groupsize", "quarot": "quarot_groupsize"}
DEFAULT_GROUP_SIZE, MAX_GROUP_SIZE = 256, 4096
# one of these makes an object without `format` a marker of INT8-Fast or comfy-quants
LEGACY_FIELDS = {*ROTATION_FLAGS, "per_row", "group_size"}
# QuantOps' first markers were no JSON: their first byte is the format
QUANTOPS_FORMATS = {
    0: "float8_e4m3fn",
    1: "float8_e4m3fn_rowwise",
    2: "float8_e4m3fn_blockwise",
    3: "float8_e4m3fn_block3d",
    10: "int8_blockwise",
}


@dataclass(frozen=True)
class Marker:
    """What is said of one layer.

    Args:
        where: for people, with the file.
        fields: of the JSON object; those in `params` stand beside the others.
    """

    location: str
    fields: Mapping[str, Any]

    @property
    def format_name(self) -> str:
        """The format's name; empty in pre-native files."""
        return self.fields.get("format", "")

    @property
    def block_size(self) -> int | None:
        """Numbers that share a scale along a row, where it says so."""
        return self.fields.get("group_size")

    def rotation_group_size(self) -> int:
        """Columns that are rotated together; 0: none.

        Raises:
            FileError: for a size that no Hadamard matrix of a layer has.
        """
        if self.format_name == INT8RUN_FORMAT:
            if self.fields.get("rotation") is None:
                return 0
            size = self.check_group(self.fields["group_size"])
            if not self.is_sylvester() and not is_power_of_4(size):
                raise FileError(
                    f"{self.location} names groups of {size}; a regular matrix needs a power of 4"
                )
            return size
        if not any(self.fields.get(flag) for flag in ROTATION_FLAGS):
            return 0
        sizes = {
            json.dumps(self.fields[key]): self.fields[key]
            for key in ROTATION_FLAGS.values()
            if key in self.fields
        }
        if len(sizes) > 1:
            raise FileError(
                f"{self.location} names two sizes of rotated groups, {' and '.join(sizes)}; nobody knows which is true"
            )
        return self.check_group(next(iter(sizes.values()), DEFAULT_GROUP_SIZE))

    def check_group(self, size: Any) -> int:
        """A group size out of a file."""
        if type(size) is not int or not 2 <= size <= MAX_GROUP_SIZE or size & (size - 1):
            raise FileError(
                f"{self.location} names groups of {size!r}; rotated are groups of a power of 2 from 2 to {MAX_GROUP_SIZE}"
            )
        return size

    def is_sylvester(self) -> bool:
        """Whether the rotation is Sylvester's. ComfyUI rotates by powers of 4 only; convert_to_quant gives other sizes Sylvester's."""
        if self.format_name == INT8RUN_FORMAT:
            return self.fields.get("rotation") == "sylvester"
        group = self.rotation_group_size()
        return group > 0 and not is_power_of_4(group)


def is_power_of_4(power_of_2: int) -> bool:
    """Whether a power of 2 is one of 4 as well, so that a regular Hadamard matrix of that size exists."""
    return power_of_2.bit_length() % 2 == 1


def read_markers(files: TensorFiles, prefix: str) -> dict[str, Marker]:
    """What is said of the layers below a prefix, by layer name; only markers are read.

    Raises:
        FileError: something that is no marker, the header and a marker that contradict each other, or a header that names layers the
            file does not have.
    """
    header = read_metadata_markers(files)
    tensors = {
        key.removesuffix(f".{MARKER}"): key
        for key in files
        if key.endswith(f".{MARKER}") and key.startswith(prefix)
    }
    found = {name: read_marker_tensor(files, key) for name, key in tensors.items()}
    both = {name: merge_markers(header[name], found[name]) for name in found if name in header}
    lost = [
        name for name in both if both[name].rotation_group_size() and not header[name].rotation_group_size()
    ]
    if lost:
        log.warning(
            "%s: its header lost the rotation of %d layers (first: %s); their markers are believed",
            files.path,
            len(lost),
            lost[0],
        )
    return found | {name: marker for name, marker in header.items() if name.startswith(prefix)} | both


def read_metadata_markers(files: TensorFiles) -> dict[str, Marker]:
    """What the headers say, by layer name."""
    found: dict[str, Marker] = {}
    for file, metadata in files.metadata_by_file.items():
        if METADATA_KEY not in metadata:
            continue
        where = f"{file}: {METADATA_KEY} in its header"
        layers = parse_json_object(where, metadata[METADATA_KEY].encode()).get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(fields, dict) for fields in layers.values()):
            raise FileError(f"{where} has no `layers` with an object each; ask who made the file")
        for name, fields in layers.items():
            if f"{name}.weight" not in files:
                fuller = [key for key in files if key.endswith(f".{name}.weight")]
                hint = f"; the file has {fuller[0]}, so the prefix was lost" if fuller else ""
                raise FileError(
                    f"{where} describes {name}, which the file does not have{hint}; it was written for another file"
                )
            found[name] = Marker(f"{where}, layer {name},", check_fields(f"{where}, layer {name},", fields))
    return found


def read_marker_tensor(files: TensorFiles, key: str) -> Marker:
    """One marker out of its tensor."""
    info = files[key]
    where = f"{info.file}: the marker {key}"
    if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > MAX_MARKER_BYTES:
        raise FileError(
            f"{info.file}: {key} is {info.dtype} {list(info.shape)}; a marker is a short row of bytes, U8"
        )
    text = bytes(files.read(key).tolist())
    if text and text[0] in QUANTOPS_FORMATS and b"{" not in text:
        return Marker(where, {"format": QUANTOPS_FORMATS[text[0]]})
    return Marker(where, check_fields(where, parse_json_object(where, text)))


def merge_markers(header: Marker, tensor: Marker) -> Marker:
    """The header's word, and the marker's of what the header does not mention: a rotation above all.

    convert_to_quant's metadata editor writes headers from markers and leaves the rotation out.

    Raises:
        FileError: when they contradict each other in something that decides what the numbers mean.
    """
    for key in (*ROTATION_FLAGS, *ROTATION_FLAGS.values()):
        if key in header.fields and key in tensor.fields and header.fields[key] != tensor.fields[key]:
            raise FileError(
                f"{header.location} has {key}={header.fields[key]!r}, the layer's marker {tensor.fields[key]!r}; they contradict each other, "
                "take the file as its maker published it"
            )
    if header.format_name != tensor.format_name and INT8RUN_FORMAT in (
        header.format_name,
        tensor.format_name,
    ):
        raise FileError(
            f"{header.location} says {header.format_name!r}, the layer's marker {tensor.format_name!r}; they contradict each other"
        )
    return Marker(header.location, {**tensor.fields, **header.fields})


def parse_json_object(where: str, text: bytes) -> dict[str, Any]:
    """A JSON object out of a file, with NUL bytes at its end or braces around it twice if need be."""
    text = text.strip(b"\0 \t\r\n")
    if text.startswith(b"{{") and text.endswith(b"}}"):
        text = text[1:-1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is no JSON: {text[:80]!r}") from error
    if not isinstance(found, dict):
        raise FileError(f"{where} is no JSON object: {text[:80]!r}")
    return found


def check_fields(where: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a layer's object, those in `params` among them, of the kinds that they must have.

    Raises:
        FileError: for a field of another kind, or an object that says nothing.
    """
    params = found.get("params", {})
    fields = {
        **(params if isinstance(params, dict) else {}),
        **{key: value for key, value in found.items() if key != "params"},
    }
    wrong = [key for key in (*ROTATION_FLAGS, "per_row") if not isinstance(fields.get(key, False), bool)]
    size = fields.get("group_size")
    if size is not None and (type(size) is not int or size < 1):
        wrong.append("group_size")
    if not isinstance(fields.get("format", ""), str):
        wrong.append("format")
    shown = json.dumps(found)[:200]
    if wrong:
        raise FileError(f"{where} has a strange {wrong[0]}: {shown}")
    if "format" not in fields and not LEGACY_FIELDS & set(fields):
        raise FileError(f"{where} names no format: {shown}")
    if fields.get("format") == INT8RUN_FORMAT and not is_int8run_marker(fields):
        raise FileError(
            f"{where} says {INT8RUN_FORMAT} and makes no sense: {shown}; save= writes such markers, make the file again"
        )
    return fields


def is_int8run_marker(fields: Mapping[str, Any]) -> bool:
    """Whether an object holds what `native.marker` writes under our own format name."""
    settings = fields.get("settings")
    return (
        isinstance(fields.get("outlier"), str)
        and isinstance(settings, dict)
        and all(type(value) in (int, float) and -1e9 < value < 1e9 for value in settings.values())
        and fields.get("rotation") in (None, "regular", "sylvester")
        and ("rotation" in fields) == ("group_size" in fields)
        and all(isinstance(fields.get(key), bool) for key in ("centered", "factor"))
    )
