"""Ways to damage a safetensors file, or to turn it into another.

Each takes a random generator and changes a draft.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from text_encoders.files import File, Stored
from text_encoders.oracle import FOREIGN, SCALES
from text_encoders.oracle_codes import CODE_PARTS
from text_encoders.oracle_file import DTYPES

SUFFIXES = (
    *SCALES,
    *FOREIGN,
    *CODE_PARTS,
    "weight_scale_2",
    "weight_scalar",
    "comfy_quant",
    "pre_quant_scale",
    "input_scale",
    "scale_input",
    "quarot_hadamard",
    "hadanorm_sigma",
    "weight_packed",
    "hadamard_quip",
    "hadamard_size_out",
    "sign_row",
    "quip_s_u",
    "quip_s_v",
    "smooth_factors",
    "weight",
    "bias",
    "nothing",
)
WORDS = (
    "int8_tensorwise",
    "int8_axiswise",
    "int8_blockwise",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "mxfp8",
    "hybrid_mxfp8",
    "nvfp4",
    "convrot_w4a4",
    "asym_w4a8_int8",
    "awq_w4a16",
    "svdquant_w4a4",
    "int9",
    "",
    7,
    None,
)
SIZES: tuple[Any, ...] = (
    16,
    4,
    64,
    256,
    32,
    128,
    2,
    1,
    0,
    -16,
    48,
    1024,
    8192,
    2**70,
    "16",
    True,
    16.0,
    None,
    [16],
    float("nan"),
)
FIELDS: dict[str, tuple[Any, ...]] = {
    "format": WORDS,
    "convrot": (True, False, "yes", 1, None),
    "quarot": (True, False, 0),
    "convrot_groupsize": SIZES,
    "quarot_groupsize": SIZES,
    "group_size": SIZES,
    "per_row": (True, False, 1),
    "full_precision_matrix_mult": (True, "no"),
    "num_experts": (None, 2),
    "orig_shape": (
        [64, 64],
        [63, 60],
        [],
        [0, 0],
        "64",
        [64, 128],
        [2**40, 64],
        [64.0, 64.0],
        [True, True],
        [-1, 64],
    ),
    "orig_dtype": ("torch.bfloat16", 3),
}
LIES: dict[str, tuple[Any, ...]] = {
    "dtype": (*DTYPES, "F8", "", 3),
    "shape": ([], [1], [3, 5], [-1], ["a"], None, [2**63], [1.0], [True]),
    "data_offsets": ([0, 0], [8, 4], [0, 2**40], [-8, 8], [1], None, [0, 64], [0.0, 1.0]),
    "more": (1,),
}
NUMBERS = (0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-40, 1e-45, 1e30, 3e38, 1.0, 0.01)


@dataclass
class Draft:
    """A file, and what is done to its header and to its bytes when it is written."""

    file: File
    entries: list[Callable[[dict[str, Any]], object]] = field(default_factory=list)
    text: list[Callable[[bytes], bytes]] = field(default_factory=list)
    raw: list[Callable[[bytes], bytes]] = field(default_factory=list)

    def write(self, path: Path) -> Path:
        """Write it. Changes of the header that no longer fit are left out."""
        header = self.file.header()
        for change in self.entries:
            change(header)
        text = json.dumps(header).encode()
        for alter in self.text:
            text = alter(text)
        data = self.file.bytes(text)
        for alter in self.raw:
            data = alter(data)
        path.write_bytes(data)
        return path

    def key(self, chance: Random, *ends: str) -> str | None:
        """One of the keys, of those that end so if there are any; most often one of a quantized layer."""
        keys = [key for key in self.file.tensors if key.endswith(ends)] if ends else list(self.file.tensors)
        near = [key for key in keys if key.rpartition(".")[0] in self.file.words]
        return chance.choice(near if near and chance.random() < 0.8 else keys) if keys else None


MAX_NUMBERS = 1 << 20  # of a tensor that damage makes


def is_whole(stored: Stored) -> bool:
    """Whether a tensor has as many bytes as its shape says; an earlier damage may have left it otherwise."""
    if max(stored.shape, default=0) > MAX_NUMBERS:
        return False
    return DTYPES[stored.dtype][0] * math.prod(stored.shape) // 8 == len(stored.data)


def fit(stored: Stored, shape: tuple[int, ...], dtype: str | None = None) -> Stored:
    """The same bytes cut or repeated for another shape."""
    dtype = dtype or stored.dtype
    count = DTYPES[dtype][0] * math.prod(shape) // 8
    return Stored(
        dtype,
        shape,
        (stored.data * (count // max(len(stored.data), 1) + 1))[:count] if stored.data else bytes(count),
    )


def shapes(shape: tuple[int, ...], chance: Random) -> tuple[int, ...]:
    """Another shape with as many numbers."""
    count = math.prod(shape)
    found = [shape[::-1], (count,), (count, 1), (1, count), (*shape, 1), (1, *shape), (count, 1, 1)]
    for at, size in enumerate(shape):
        others = shape[:at], shape[at + 1 :]
        if size % 2 == 0:
            found += [(*others[0], size // 2, 2, *others[1])]
            found += (
                [(*shape[:at], size // 2, shape[at + 1] * 2, *shape[at + 2 :])] if at + 1 < len(shape) else []
            )
            found += [(*shape[: at - 1], shape[at - 1] * 2, size // 2, *others[1])] if at else []
    return chance.choice(found)


def same_width(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance):
        stored = draft.file.tensors[key]
        others = [dtype for dtype, (bits, _) in DTYPES.items() if bits == DTYPES[stored.dtype][0]]
        draft.file.tensors[key] = stored._replace(dtype=chance.choice(others))


def other_dtype(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance):
        dtype = chance.choice([*DTYPES])
        if DTYPES[dtype][0] * math.prod(draft.file.tensors[key].shape) % 8 == 0:
            draft.file.tensors[key] = fit(draft.file.tensors[key], draft.file.tensors[key].shape, dtype)


def reshape(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance):
        draft.file.tensors[key] = draft.file.tensors[key]._replace(
            shape=shapes(draft.file.tensors[key].shape, chance)
        )


def reshape_scale(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance, "scale", "scale_weight", "scale_2", "s_rel", "s_channel"):
        draft.file.tensors[key] = draft.file.tensors[key]._replace(
            shape=shapes(draft.file.tensors[key].shape, chance)
        )


def resize(draft: Draft, chance: Random) -> None:
    key = draft.key(chance)
    if key is not None and is_whole(draft.file.tensors[key]):
        shape = list(draft.file.tensors[key].shape) or [1]
        at = chance.randrange(len(shape))
        shape[at] = chance.choice((0, 1, shape[at] // 2, shape[at] * 2, shape[at] + 1))
        if math.prod(shape) > MAX_NUMBERS:
            return
        draft.file.tensors[key] = fit(draft.file.tensors[key], tuple(shape))


def empty(draft: Draft, chance: Random) -> None:
    """No bytes, and a size that no memory holds."""
    if key := draft.key(chance):
        draft.file.tensors[key] = Stored(
            draft.file.tensors[key].dtype, chance.choice([(2**40, 0), (0, 2**40), (0,)]), b""
        )


def new_suffix(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance):
        renamed = f"{key.rpartition('.')[0]}.{chance.choice(SUFFIXES)}"
        draft.file.tensors = {renamed if k == key else k: stored for k, stored in draft.file.tensors.items()}


def new_layer(draft: Draft, chance: Random) -> None:
    if (key := draft.key(chance)) and (other := draft.key(chance)):
        layer = chance.choice(
            (
                other.rpartition(".")[0],
                f"other.{key.rpartition('.')[0]}",
                key.rpartition(".")[0].rpartition(".")[0],
            )
        )
        renamed = f"{layer}.{key.rpartition('.')[2]}".removeprefix(".")
        draft.file.tensors = {renamed if k == key else k: stored for k, stored in draft.file.tensors.items()}


def drop(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance):
        del draft.file.tensors[key]


def drop_scales(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance, "scale", "scale_weight", "scale_2", "comfy_quant"):
        draft.file.drop("." + key.rpartition(".")[2])


def twice(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance):
        entry = json.dumps({key: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})[1:-1].encode()
        draft.text.append(lambda text: text[:1] + entry + b", " + text[1:])


def swap(draft: Draft, chance: Random) -> None:
    """Two tensors of the same kind, of two layers."""
    if first := draft.key(chance):
        second = draft.key(chance, "." + first.rpartition(".")[2]) or first
        tensors = draft.file.tensors
        tensors[first], tensors[second] = tensors[second], tensors[first]


def swap_any(draft: Draft, chance: Random) -> None:
    if (first := draft.key(chance)) and (second := draft.key(chance)):
        tensors = draft.file.tensors
        tensors[first], tensors[second] = tensors[second], tensors[first]


def copy_tensor(draft: Draft, chance: Random) -> None:
    """A layer gets what another has, under this or a like name."""
    if (key := draft.key(chance)) and (other := draft.key(chance)):
        draft.file.tensors[
            f"{other.rpartition('.')[0]}.{chance.choice((key.rpartition('.')[2], *SUFFIXES))}"
        ] = draft.file.tensors[key]


def edited(fields: dict[str, Any], chance: Random) -> dict[str, Any]:
    """A marker's fields with one changed, added, taken out or put elsewhere."""
    fields = dict(fields)
    kind = chance.randrange(4)
    if kind == 0 and fields:
        del fields[chance.choice([*fields])]
    elif kind == 1 and fields:
        inner = chance.choice([*fields])
        fields["params"] = {inner: fields.pop(inner)}
    else:
        key = chance.choice([*FIELDS])
        fields[key] = chance.choice(FIELDS[key])
    return fields


def fields_of(draft: Draft, layer: str) -> dict[str, Any]:
    """Of a layer's marker, if it has one."""
    stored = draft.file.tensors.get(f"{layer}.comfy_quant")
    try:
        found = json.loads(stored.data) if stored else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def marker_field(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance, "comfy_quant"):
        draft.file.text(key, edited(fields_of(draft, key.removesuffix(".comfy_quant")), chance))


def new_marker(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance, ".weight"):
        draft.file.text(
            key.replace(".weight", ".comfy_quant"), edited({"format": chance.choice(WORDS)}, chance)
        )


def marker_bytes(draft: Draft, chance: Random) -> None:
    if key := draft.key(chance, "comfy_quant"):
        data = draft.file.tensors[key].data
        at = chance.randrange(max(len(data), 1))
        draft.file.text(
            key,
            chance.choice(
                (
                    data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :],
                    data[:at],
                    data + b"\0\0",
                    b"{" + data + b"}",
                    bytes([chance.choice((0, 1, 2, 3, 4, 10, 123, 255))]),
                    bytes([chance.choice((0, 1, 2, 3, 10))]) + data,
                    b" " + data + b"\n",
                    bytes([chance.choice((0, 1, 2, 3, 10)), 0, 0]),
                    b"",
                    b"[" * 5000,
                    b"\xff\xfe" + data,
                    data + data,
                )
            ),
        )


def header_field(draft: Draft, chance: Random) -> None:
    """The header's word of one layer, made of its marker where it has none."""
    metadata = draft.file.metadata
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
    except (ValueError, AttributeError, RecursionError):
        return
    if (key := draft.key(chance, ".weight")) and isinstance(layers, dict):
        layer = key.removesuffix(".weight")
        old = layers.get(layer)
        layers[layer] = edited(old if isinstance(old, dict) else fields_of(draft, layer), chance)
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})


def header_text(draft: Draft, chance: Random) -> None:
    text = draft.file.metadata.get("_quantization_metadata", "{}")
    key = draft.key(chance, ".weight") or "x"
    draft.file.metadata["_quantization_metadata"] = chance.choice(
        (
            "{" + text + "}",
            text[: len(text) // 2],
            "",
            "[]",
            "null",
            '{"layers": []}',
            '{"layers": {"": {}}}',
            text.replace("encoder.", ""),
            text.replace('"layers"', '"layer"'),
            json.dumps({"layers": {key.removesuffix(".weight"): "int8"}}),
            "[" * 5000,
            text + "\0\0",
            text.replace("int8", "int9"),
            text.replace("true", "false"),
            '{"layers": {"nobody.layer": {"format": "int8_tensorwise"}}}',
        )
    )


def other_metadata(draft: Draft, chance: Random) -> None:
    name, text = chance.choice(
        (
            ("tensor_names", "[]"),
            ("quantization_config", '{"method": "svdquant"}'),
            ("format", "np"),
            ("scaled_fp8", "1"),
            ("", ""),
            ("_quantization_metadata_", "{"),
            ("int8_quantized", "true"),
        )
    )
    draft.file.metadata[name] = text
    if chance.random() < 0.2:
        draft.entries.append(
            lambda header: header.update({"__metadata__": chance.choice((7, [], None, {"format": 1}, "x"))})
        )


def lying_entry(draft: Draft, chance: Random) -> None:
    """A header that does not describe the bytes."""
    if key := draft.key(chance):
        what = chance.choice([*LIES])
        value = chance.choice(LIES[what])
        draft.entries.append(lambda header: header[key].update({what: value}) if key in header else None)
        if chance.random() < 0.1:
            draft.entries.append(lambda header: header[key].pop(what, None) if key in header else None)


def shifted(draft: Draft, chance: Random) -> None:
    """Offsets of one tensor or of all."""
    by, key = chance.choice((1, 2, 4, 8, -1, -8)), draft.key(chance)

    def change(header: dict[str, Any]) -> None:
        for name in header if chance.random() < 0.3 else [key]:
            if isinstance(header.get(name), dict) and isinstance(header[name].get("data_offsets"), list):
                header[name]["data_offsets"] = [
                    x + by if isinstance(x, int) else x for x in header[name]["data_offsets"]
                ]

    draft.entries.append(change)


def shared(draft: Draft, chance: Random) -> None:
    """Two tensors on the same bytes."""
    if (key := draft.key(chance)) and (other := draft.key(chance)) and key != other:
        draft.file.tensors[key] = draft.file.tensors[other]._replace(data=b"")

        def point(header: dict[str, Any]) -> None:
            if key in header and "data_offsets" in header.get(other, {}):
                header[key]["data_offsets"] = header[other]["data_offsets"]

        draft.entries.append(point)


def unclaimed(draft: Draft, chance: Random) -> None:
    """Bytes of no tensor."""
    if key := draft.key(chance):
        draft.entries.append(lambda header: header.pop(key, None))


def file_bytes(draft: Draft, chance: Random) -> None:
    """Cut off, longer, another length of the header, or another byte of it."""
    cut = chance.choice((0, 1, 7, 8, 9, -1, -4, 100))
    at, byte = chance.randrange(400), chance.randrange(256)
    draft.raw.append(
        chance.choice(
            (
                lambda data: data[:cut],
                lambda data: data + bytes(abs(cut)),
                lambda data: (2**62 + cut).to_bytes(8, "little") + data[8:],
                lambda data: (
                    (int.from_bytes(data[:8], "little") + cut & 2**64 - 1).to_bytes(8, "little") + data[8:]
                ),
                lambda data: data[:at] + bytes([byte]) + data[at + 1 :],
                lambda data: b"GGUF" + data[4:],
            )
        )
    )


def scale_number(draft: Draft, chance: Random) -> None:
    """One scale of no writer."""
    if key := draft.key(chance, "scale", "scale_weight", "scale_2", "scale_inv"):
        stored = draft.file.tensors[key]
        width, number = DTYPES[stored.dtype][0] // 8, chance.choice(NUMBERS)
        word = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(stored.dtype)
        with np.errstate(over="ignore"):
            new = (
                np.array(number).astype(word).tobytes()
                if word
                else bytes(chance.choice((0, 255, 127, 128, 1)) for _ in range(width))
            )
        if stored.data:
            at = chance.randrange(len(stored.data) // max(width, 1)) * width
            draft.file.tensors[key] = stored._replace(data=stored.data[:at] + new + stored.data[at + width :])


def numbers(draft: Draft, chance: Random) -> None:
    """A few bytes of anything."""
    if (key := draft.key(chance)) and draft.file.tensors[key].data:
        data = bytearray(draft.file.tensors[key].data)
        for _ in range(chance.randrange(1, 5)):
            data[chance.randrange(len(data))] = chance.choice((0, 127, 128, 255, chance.randrange(256)))
        draft.file.tensors[key] = draft.file.tensors[key]._replace(data=bytes(data))


def add(draft: Draft, chance: Random) -> None:
    """Something more beside a layer."""
    if key := draft.key(chance, ".weight"):
        shape = [min(size, 1000) for size in draft.file.tensors[key].shape] or [1]
        sizes = chance.choice(((), (1,), (shape[0],), (shape[-1],), (shape[0], 1), (shape[0], shape[-1])))
        dtype = chance.choice(("F32", "F32", "BF16", "I8", "U8", "F8_E4M3", "I32"))
        values = chance.choice((1.0, 0.5, 0.0))
        suffix = chance.choice(SUFFIXES)
        name = (
            chance.choice(("scaled_fp8", f"x.{suffix}"))
            if chance.random() < 0.2
            else f"{key.removesuffix('.weight')}.{suffix}"
        )
        if dtype == "F8_E4M3":
            draft.file.tensors[name] = Stored(dtype, sizes, bytes([56]) * math.prod(sizes))
        else:
            draft.file.put(name, dtype, np.full(sizes, values))


def half_scales(draft: Draft, chance: Random) -> None:
    """Scales of another float, which say the same."""
    dtype = chance.choice(("BF16", "F16", "F64"))
    for key, stored in list(draft.file.tensors.items()):
        if not key.endswith("scale") or stored.dtype != "F32" or not is_whole(stored):
            continue
        draft.file.put(key, dtype, np.frombuffer(stored.data, "<f4").reshape(stored.shape))


def old_names(draft: Draft, chance: Random) -> None:
    """The names of other writers."""
    name = chance.choice(SCALES)
    renamed = {
        key: key.replace("weight_scale", name) if key.endswith(".weight_scale") else key
        for key in draft.file.tensors
    }
    draft.file.tensors = {renamed[key]: stored for key, stored in draft.file.tensors.items()}


def smoothed(draft: Draft, chance: Random) -> None:
    """A factor for each column."""
    if key := draft.key(chance, ".weight"):
        shape = draft.file.tensors[key].shape
        wide = math.prod(shape[1:]) * (2 if draft.file.tensors[key].dtype == "U8" else 1)
        if wide < 1000:
            draft.file.put(
                key.replace(".weight", ".pre_quant_scale"),
                "F32",
                [chance.choice((0.5, 1.25, 2.0)) for _ in range(wide)],
            )


MUTATIONS: tuple[Callable[[Draft, Random], None], ...] = (
    half_scales,
    old_names,
    reshape_scale,
    marker_field,
    header_field,
    smoothed,
    numbers,
    swap,
    drop_scales,
    same_width,
    reshape,
    resize,
    new_suffix,
    drop,
    copy_tensor,
    new_marker,
    marker_bytes,
    scale_number,
    add,
    header_text,
    new_layer,
    swap_any,
    other_dtype,
    empty,
    twice,
    other_metadata,
    lying_entry,
    shifted,
    shared,
    unclaimed,
    file_bytes,
)
