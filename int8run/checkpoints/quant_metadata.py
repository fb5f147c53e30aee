"""What a file says about its quantized layers, in marker tensors and in the metadata of its header.

`comfy_quant` tensors and `_quantization_metadata` both hold one JSON object for a layer. ComfyUI defined
them, other programs wrote variants: without a format, with fields nested in `params`, with doubled braces,
padded with NUL bytes. Where both are there ComfyUI takes the header's object. `detect.py` calls
`read_markers`; whether a marker agrees with the tensors is checked there, not here. Markers are written by
`comfy_int8.encode_int8_marker` and `comfy_formats.encode_format_marker`.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from int8run.checkpoints.powers import is_power_of_2, is_power_of_4
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.utils.plurals import count_noun
from int8run.utils.untrusted_json import parse_untrusted_json

log = logging.getLogger(__name__)
MARKER = "comfy_quant"  # last word of a marker's key
METADATA_KEY = "_quantization_metadata"  # of the header's metadata
INT8RUN_FORMAT = "int8run_transformed"  # of layers whose transform ComfyUI does not know
INT8RUN_CONV_FORMAT = "int8run_conv"  # of convolutions, which ComfyUI has no INT8 format for
OWN_FORMATS = (INT8RUN_FORMAT, INT8RUN_CONV_FORMAT)
GROUPED_FORMAT = "asym_w4a8_int8"  # of codes of 4 and 6 bits, always rotated
# a header and a marker that name one of these must agree: read as another format the numbers are noise
EXACT_FORMATS = (*OWN_FORMATS, GROUPED_FORMAT)
CONV_ROTATION_FIELDS = {"outlier", "settings", "rotation", "group_size"}  # of a rotated convolution's marker
MAX_MARKER_BYTES = 65536  # the longest that is known has 150
# a flag that says the weight is rotated -> the field with the size of the groups. Files of INT8-Fast from
# before ComfyUI's own format say `quarot` and mean the same
ROTATION_FLAGS = {"convrot": "convrot_groupsize", "quarot": "quarot_groupsize"}
DEFAULT_GROUP_SIZE, MAX_GROUP_SIZE = 256, 4096
# one of these makes an object without `format` a marker of INT8-Fast or comfy-quants
LEGACY_FIELDS = {*ROTATION_FLAGS, "per_row", "group_size"}
# QuantOps' first markers were not JSON: their first byte is the format
QUANTOPS_FORMATS = {
    0: "float8_e4m3fn",
    1: "float8_e4m3fn_rowwise",
    2: "float8_e4m3fn_blockwise",
    3: "float8_e4m3fn_block3d",
    10: "int8_blockwise",
}


@dataclass(frozen=True)
class Marker:
    """What is said about one layer.

    Args:
        location: file and place in it, for messages.
        fields: of the JSON object; those in `params` stand beside the others.
    """

    location: str
    fields: Mapping[str, Any]

    @property
    def format_name(self) -> str:
        """The format's name; empty in legacy files."""
        name: str = self.fields.get("format", "")
        return name

    @property
    def block_size(self) -> int | None:
        """Columns that share a scale, where the marker says so."""
        return self.fields.get("group_size")

    def rotation_group_size(self) -> int:
        """Columns that are rotated together; 0: none.

        Raises:
            FileError: for a size that no Hadamard matrix of a layer has.
        """
        if self.format_name in OWN_FORMATS:
            return self._int8run_group_size()
        if self.format_name == GROUPED_FORMAT:
            return self.check_group_size(self.fields.get("convrot_groupsize", DEFAULT_GROUP_SIZE))
        if not any(self.fields.get(flag) for flag in ROTATION_FLAGS):
            return 0
        sizes = [self.fields[key] for key in ROTATION_FLAGS.values() if key in self.fields]
        if not sizes:
            return DEFAULT_GROUP_SIZE
        different = dict.fromkeys(json.dumps(size) for size in sizes)  # as JSON, which tells 1 from True
        if len(different) > 1:
            raise FileError(
                f"{self.location} names two sizes of rotated groups, {' and '.join(different)}; "
                "they contradict each other, so the weight cannot be read"
            )
        return self.check_group_size(sizes[-1])

    def _int8run_group_size(self) -> int:
        if self.fields.get("rotation") is None:
            return 0
        size = self.check_group_size(self.fields["group_size"])
        if not self.is_sylvester() and not is_power_of_4(size):
            raise FileError(f"{self.location} names groups of {size}; a regular matrix needs a power of 4")
        return size

    def check_group_size(self, size: Any) -> int:
        """Return a group size out of a file; raise FileError where a Hadamard matrix cannot have it."""
        if type(size) is not int or not is_power_of_2(size) or not 2 <= size <= MAX_GROUP_SIZE:
            raise FileError(
                f"{self.location} names groups of {size!r}; rotated are groups of a power of 2 from 2 to "
                f"{MAX_GROUP_SIZE}"
            )
        return size

    def is_sylvester(self) -> bool:
        """Whether the rotation is Sylvester's, not the regular one.

        ComfyUI rotates by powers of 4 only; convert_to_quant gives other sizes Sylvester's matrix.
        """
        if self.format_name in OWN_FORMATS:
            return self.fields.get("rotation") == "sylvester"
        group_size = self.rotation_group_size()
        return group_size > 0 and not is_power_of_4(group_size)


def read_markers(files: TensorFiles, prefix: str) -> dict[str, Marker]:
    """Read what is said about the layers below a prefix; of the tensors only markers are read.

    Returns:
        Layer name -> its marker, from the tensor, the header, or both.

    Raises:
        FileError: something that is not a marker, a header and a marker that contradict each other, or a
            header that names layers the file does not have.
    """
    in_header = read_metadata_markers(files)
    markers: dict[str, Marker] = {}
    lost_rotation = []
    for key in files:
        if not key.startswith(prefix) or not key.endswith(f".{MARKER}"):
            continue
        name = key.removesuffix(f".{MARKER}")
        markers[name] = read_marker_tensor(files, key)
        if name not in in_header:
            continue
        markers[name] = merge_markers(in_header[name], markers[name])
        if markers[name].rotation_group_size() and not in_header[name].rotation_group_size():
            lost_rotation.append(name)
    if lost_rotation:
        log.warning(
            "%s: the header does not mention the rotation of %s (first: %s), the markers of the layers do; "
            "the markers are followed",
            files.path,
            count_noun(len(lost_rotation), "layer"),
            lost_rotation[0],
        )
    for name, marker in in_header.items():
        if name.startswith(prefix):
            markers.setdefault(name, marker)
    return markers


def read_metadata_markers(files: TensorFiles) -> dict[str, Marker]:
    """Read what the headers say, by layer name.

    Raises:
        FileError: the entry is not a JSON object of layers, or names a layer that the file does not have, or
            the headers of two shards contradict each other.
    """
    markers: dict[str, Marker] = {}
    read: dict[str, Mapping[str, Any]] = {}
    for file, metadata in files.metadata_by_file.items():
        if METADATA_KEY not in metadata:
            continue
        location = f"{file}: {METADATA_KEY} in its header"
        layers = parse_json_object(location, metadata[METADATA_KEY].encode()).get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(fields, dict) for fields in layers.values()):
            raise FileError(f"{location} has no `layers` with an object each; ask who made the file")
        for name, fields in layers.items():
            check_layer_exists(files, location, name)
            layer_location = f"{location}, layer {name},"
            if read.setdefault(name, fields) != fields:
                raise FileError(
                    f"{layer_location} says otherwise than the header of another shard; the files do not "
                    "belong together: download them again"
                )
            markers[name] = Marker(layer_location, check_fields(layer_location, fields))
    return markers


def check_layer_exists(files: TensorFiles, location: str, name: str) -> None:
    """Raise FileError when a layer that a header describes is not in the file."""
    if f"{name}.weight" in files:
        return
    hint = ""
    for key in files:
        if key.endswith(f".{name}.weight"):
            hint = f"; the file has {key}, so the prefix was lost"
            break
    raise FileError(
        f"{location} describes {name}, which the file does not have{hint}; it was written for another file"
    )


def read_marker_tensor(files: TensorFiles, key: str) -> Marker:
    """Read one marker out of its tensor, a row of bytes."""
    info = files[key]
    location = f"{info.file}: the marker {key}"
    if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > MAX_MARKER_BYTES:
        raise FileError(
            f"{info.file}: {key} is {info.dtype} {list(info.shape)}; a marker is a short row of bytes, U8"
        )
    text = bytes(files.read(key).tolist())
    if text and text[0] in QUANTOPS_FORMATS and b"{" not in text:
        return Marker(location, {"format": QUANTOPS_FORMATS[text[0]]})
    return Marker(location, check_fields(location, parse_json_object(location, text)))


def merge_markers(header: Marker, tensor: Marker) -> Marker:
    """Merge what the header says with what the marker says about the rest, a rotation above all.

    convert_to_quant's metadata editor writes headers from markers and leaves the rotation out.

    Raises:
        FileError: when they contradict each other in something that decides what the numbers mean.
    """
    is_exact = header.format_name in EXACT_FORMATS or tensor.format_name in EXACT_FORMATS
    keys = [*ROTATION_FLAGS, *ROTATION_FLAGS.values()]
    if is_exact:
        keys.append("group_size")
    for key in keys:
        in_both = key in header.fields and key in tensor.fields
        if in_both and header.fields[key] != tensor.fields[key]:
            raise FileError(
                f"{header.location} has {key}={header.fields[key]!r}, the layer's marker "
                f"{tensor.fields[key]!r}; they contradict each other, take the file as its maker published it"
            )
    if is_exact and header.format_name != tensor.format_name:
        raise FileError(
            f"{header.location} says {header.format_name!r}, the layer's marker {tensor.format_name!r}; "
            "they contradict each other"
        )
    return Marker(header.location, {**tensor.fields, **header.fields})


def parse_json_object(location: str, text: bytes) -> dict[str, Any]:
    """Parse a JSON object out of a file; it may be padded with NUL bytes, or have its outer braces twice."""
    text = text.strip(b"\0 \t\r\n")
    if text.startswith(b"{{") and text.endswith(b"}}"):
        text = text[1:-1]
    try:
        found = parse_untrusted_json(text)
    except ValueError as error:
        raise FileError(f"{location} {error}: {text[:80]!r}") from error
    if not isinstance(found, dict):
        raise FileError(f"{location} is not a JSON object: {text[:80]!r}")
    return found


def check_fields(location: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Check the fields of a layer's object.

    Args:
        location: file and place in it, for the error.
        found: the JSON object.

    Returns:
        The fields, those in `params` among them.

    Raises:
        FileError: for a field of another type, or an object without a format.
    """
    fields = dict(found)
    params = fields.pop("params", {})
    if isinstance(params, dict):
        fields = {**params, **fields}

    shown = json.dumps(found)[:200]
    invalid = find_invalid_field(fields)
    if invalid is not None:
        raise FileError(f"{location} has an invalid {invalid}: {shown}")
    if "format" not in fields and not LEGACY_FIELDS & set(fields):
        raise FileError(f"{location} names no format: {shown}")
    is_valid = OWN_MARKERS.get(fields.get("format", ""))
    if is_valid is not None and not is_valid(fields):
        raise FileError(
            f"{location} says {fields['format']} and lacks what such a marker holds: {shown}; "
            "save= writes such markers, make the file again"
        )
    return fields


def find_invalid_field(fields: Mapping[str, Any]) -> str | None:
    """The first field that does not have the type that it must have."""
    for key in (*ROTATION_FLAGS, "per_row"):
        if not isinstance(fields.get(key, False), bool):
            return key
    size = fields.get("group_size")
    if size is not None and (type(size) is not int or size < 1):
        return "group_size"
    if not isinstance(fields.get("format", ""), str):
        return "format"
    return None


def is_int8run_marker(fields: Mapping[str, Any]) -> bool:
    """Whether an object holds what `comfy_int8.build_marker` writes under int8run's own format name."""
    if not isinstance(fields.get("outlier"), str) or not are_settings(fields.get("settings")):
        return False
    if fields.get("rotation") not in (None, "regular", "sylvester"):
        return False
    if ("rotation" in fields) != ("group_size" in fields):
        return False
    return isinstance(fields.get("centered"), bool) and isinstance(fields.get("factor"), bool)


def is_conv_marker(fields: Mapping[str, Any]) -> bool:
    """Whether an object holds what `comfy_int8.build_conv_marker` writes: perhaps a rotation."""
    if not CONV_ROTATION_FIELDS & set(fields):
        return True
    if not isinstance(fields.get("outlier"), str) or not are_settings(fields.get("settings")):
        return False
    return fields.get("rotation") in ("regular", "sylvester") and "group_size" in fields


def are_settings(found: object) -> bool:
    """Whether this can be the settings of an outlier method: numbers by name, none of them absurd."""
    if not isinstance(found, dict):
        return False
    return all(type(value) in (int, float) and -1e9 < value < 1e9 for value in found.values())


# what the objects with int8run's own format names must hold
OWN_MARKERS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    INT8RUN_FORMAT: is_int8run_marker,
    INT8RUN_CONV_FORMAT: is_conv_marker,
}
