"""What a file says of its layers: ComfyUI's markers and the entries of the header, for `oracle.py`."""

import json
from collections.abc import Mapping
from typing import Any

from text_encoders.oracle_file import FP8, Tensor, Unreadable, need

# format of a marker -> the dtypes that its weight may have
FORMATS = {
    **dict.fromkeys(("int8_tensorwise", "int8_axiswise", "int8_blockwise"), ("I8",)),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), FP8),
    **dict.fromkeys((f"float8_e4m3fn_{x}" for x in ("rowwise", "blockwise", "block3d")), FP8),
    **dict.fromkeys(("mxfp8", "hybrid_mxfp8"), ("F8_E4M3",)),
    "nvfp4": ("U8",),
    "asym_w4a8_int8": ("I8",),
}
CODES_FORMAT = "asym_w4a8_int8"
CODES = {
    0: "float8_e4m3fn",
    1: "float8_e4m3fn_rowwise",
    2: "float8_e4m3fn_blockwise",
    3: "float8_e4m3fn_block3d",
    10: "int8_blockwise",
}


def json_object(text: bytes) -> dict[str, Any]:
    """An object, with doubled braces and zeros at its end if need be."""
    text = text.strip(b"\0 \t\r\n")
    if text[:2] == b"{{" and text[-2:] == b"}}":
        text = text[1:-1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no JSON: {text[:40]!r}") from error
    need(isinstance(found, dict), "no JSON object")
    return found


def merge_params(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a marker, those in `params` among them."""
    fields = dict(found)
    params = fields.pop("params", None)
    if isinstance(params, dict):
        return {**params, **fields}
    return fields


def marker_fields(tensor: Tensor) -> dict[str, Any]:
    """JSON, or in early files a byte."""
    need(tensor.dtype == "U8" and len(tensor.shape) == 1 and tensor.data, "a marker's bytes")
    if b"{" not in tensor.data and tensor.data[0] in CODES:
        return {"format": CODES[tensor.data[0]]}
    return merge_params(json_object(tensor.data))


def read_markers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Fields by layer: the header's, and of what it does not mention the marker's."""
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(".comfy_quant"):
            found[key.removesuffix(".comfy_quant")] = marker_fields(tensor)
    for name, entry in read_header_layers(metadata).items():
        need(f"{name}.weight" in tensors, f"the header describes {name}")
        found[name] = merge_carriers(name, merge_params(entry), found.get(name, {}))
    for name, fields in found.items():
        check_fields(name, fields)
    return found


def read_header_layers(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The header's entries, by layer."""
    if "_quantization_metadata" not in metadata:
        return {}
    text = metadata["_quantization_metadata"].encode(errors="surrogatepass")
    layers = json_object(text).get("layers", {})
    need(isinstance(layers, dict), "the header's layers")
    need(all(isinstance(entry, dict) for entry in layers.values()), "the header's layers")
    return layers


def merge_carriers(name: str, header: Mapping[str, Any], marker: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a layer that the header and perhaps a marker describe: rotated where one says so."""
    need(not name_other_groups(header, marker), f"header and marker of {name}")
    if marker and CODES_FORMAT in (header.get("format"), marker.get("format")):
        need(header.get("format") == marker.get("format"), f"formats of {name}")
        is_one = "group_size" not in header or header["group_size"] == marker.get("group_size", 16)
        need("group_size" not in marker or is_one, f"groups of {name}")
    fields = {**marker, **header}
    for carrier in (header, marker):
        if carrier.get("convrot") is True or carrier.get("quarot") is True:
            fields["convrot"] = True
    return fields


def name_other_groups(header: Mapping[str, Any], marker: Mapping[str, Any]) -> bool:
    """Whether two carriers name different groups."""
    names = ("convrot_groupsize", "quarot_groupsize")
    return any(key in header and key in marker and header[key] != marker[key] for key in names)


def check_fields(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse fields of kinds that no writer makes."""
    need(
        all(isinstance(fields.get(key, False), bool) for key in ("convrot", "quarot", "per_row")),
        f"flags of {name}",
    )
    need(fields.get("format", "") in ("", *FORMATS), f"format of {name}")
    need(fields.get("num_experts") is None, f"experts of {name}")


def get_group_size(fields: Mapping[str, Any]) -> int:
    """Columns that were rotated together; 0: none."""
    if fields.get("format") == CODES_FORMAT:
        size = fields.get("convrot_groupsize", 256)
        need(type(size) is int and size >= 2 and size & (size - 1) == 0, f"groups of {size}")
        return size
    if not (fields.get("convrot") or fields.get("quarot")):
        return 0
    sizes = [fields[key] for key in ("convrot_groupsize", "quarot_groupsize") if key in fields]
    if not sizes:
        return 256
    need(len({json.dumps(size) for size in sizes}) == 1, "two groups")
    size = sizes[0]
    need(type(size) is int and size >= 2 and size & (size - 1) == 0, f"groups of {size}")
    return size
