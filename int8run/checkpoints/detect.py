"""The layers of a checkpoint as they lie in the file: float, fp8, mxfp8, nvfp4 or INT8 of any maker, told from names, shapes and markers.

Everything that decides what the numbers mean is checked before any weight is read. What is found is named or refused; nothing is
guessed, padded or cut. Where a maker's label and the shape of the scale disagree the shape counts, because labels are often wrong.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch

from int8run.checkpoints import block_scaled, quip
from int8run.checkpoints.block_scaled import BLOCK_FORMATS, MXFP8, NVFP4
from int8run.checkpoints.granularity import SCALE_DTYPES, check_positive, read_granularity
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.layer import (
    FLOAT,
    FP8,
    INT8,
    MAX_EXACT_GROUP_SIZE,
    STORAGE_DTYPES,
    CheckpointLayer,
    get_hadamard,
)
from int8run.checkpoints.quant_metadata import INT8RUN_FORMAT, Marker, is_power_of_4, read_markers
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.checkpoints.unsupported import READERS, check_supported, make_unsupported_error
from int8run.errors import FileError
from int8run.outlier.base import NONE

log = logging.getLogger(__name__)
# what a tensor beside `L.weight` is for -> its names, `L.` in front
PART_SUFFIXES = {
    "scale": (
        "weight_scale",
        "scale_weight",
        "weight_scale_inv",
        "scale",
        "weight.scale",
        "weight.weight_scale",
    ),
    "input": ("input_scale", "scale_input", "act_scale", "input.scale", "input.input_scale"),
    "marker": ("comfy_quant",),
    "factor": ("pre_quant_scale",),
    "global": ("weight_scale_2",),
    "scalar": ("weight_scalar",),  # nvfp4; hybrid_mxfp8
    "matrix": ("quarot_hadamard",),
    "sigma": ("hadanorm_sigma",),
    "copy": ("weight_packed",),  # INT8-Toolkit
    **{name: (name,) for name in quip.ALL_PARTS},
}
# other tensors are called so as well, for example the weights of norms
AMBIGUOUS_SUFFIXES = ("scale", "weight.scale", "input.scale")
# kind of weight -> the parts that it may have
ALLOWED_PARTS = {
    FLOAT: {"scale", "input"},  # a scale of 1, which ComfyUI's own conversion leaves
    FP8: {"scale", "input", "marker", "factor"},
    INT8: set(PART_SUFFIXES) - {"global", "scalar"},
    NVFP4: {"scale", "input", "marker", "factor", "global"},
    # the scalar is for cards that have no products in mxfp8, and less exact than the scales of the blocks
    MXFP8: {"scale", "input", "marker", "factor", "scalar"},
}
# format of a marker -> kind of weight, and the granularities that its name promises
MARKER_FORMATS = {
    "int8_tensorwise": (INT8, ("tensor", "row")),
    "int8_axiswise": (INT8, ("row",)),
    "int8_blockwise": (INT8, ("grid", "block3d", "group")),
    INT8RUN_FORMAT: (INT8, ("row",)),
    "float8_e4m3fn": (FP8, ("tensor", "block3d")),
    "float8_e5m2": (FP8, ("tensor",)),
    "float8_e4m3fn_rowwise": (FP8, ("row",)),
    "float8_e4m3fn_blockwise": (FP8, ("grid",)),
    "float8_e4m3fn_block3d": (FP8, ("block3d",)),
    "nvfp4": (NVFP4, ("block",)),
    "mxfp8": (MXFP8, ("block",)),
    "hybrid_mxfp8": (MXFP8, ("block",)),
}
# dtype in the file and granularity -> the word for the format of such a layer, where there is one
CONVROT = "int8_convrot"
FORMAT_NAMES = {
    ("I8", "tensor"): "int8_tensorwise",
    ("I8", "row"): "int8_rowwise",
    ("I8", "transposed"): "int8_rowwise",
    ("I8", "grid"): "int8_blockwise",
    ("I8", "block3d"): "int8_block3d",
    ("F8_E4M3", ""): "float8_e4m3fn_cast",
    ("F8_E4M3", "tensor"): "float8_e4m3fn",
    ("F8_E4M3", "row"): "float8_e4m3fn_rowwise",
    ("F8_E4M3", "grid"): "float8_e4m3fn_blockwise",
    ("F8_E4M3", "block3d"): "float8_e4m3fn_block3d",
    ("F8_E5M2", ""): "float8_e5m2_cast",
    ("F8_E5M2", "tensor"): "float8_e5m2",
}
USUAL_GROUP_SIZES = (256, 64, 16)  # of a rotation that a file does not describe: the first that divides K
SCALED_FP8 = "scaled_fp8"  # a tensor that says: the fp8 weights below its prefix have scales. lightx2v writes it into int8 files too


def read_layers(files: TensorFiles, prefix: str = "", asked: str | None = None) -> dict[str, CheckpointLayer]:
    """Every weight below a prefix: all with 2 dimensions, and fp8 ones with any. By name, in the file's order.

    Only headers, markers and scales are read. What lies outside of the prefix (a full checkpoint's text encoders and VAE) is not looked at.

    Args:
        asked: the word of a format. It settles what the file leaves open and nothing else: `int8_convrot` that INT8 rows are rotated,
            where no INT8 layer of the file says anything of itself; of nvfp4 and mxfp8 whose they are, where neither markers nor shapes
            tell.

    Raises:
        FileError: a weight that cannot be read, with its name and the reason; scales and markers without a weight.
    """
    check_supported(files, prefix)
    markers = read_markers(files, prefix)
    check_orphans(files, prefix)
    names = [
        key.removesuffix(".weight") for key in files if key.startswith(prefix) and key.endswith(".weight")
    ]
    rotated = asked == CONVROT and not any(
        files[f"{name}.weight"].dtype == "I8" for name in names if name in markers
    )
    found = {name: classify_weight(files, name, markers.get(name), rotated) for name in names}
    layers = {name: layer for name, layer in found.items() if layer is not None}
    layers |= resolve_block_layers(files, layers, markers, asked)
    check_consistency(files, prefix, layers, markers)
    warn_wrong_labels(files, layers, markers)
    if scalars := sum("scalar" in layer.part_keys for layer in layers.values()):
        log.info(
            "%s: %d mxfp8 layers have one scale more for the whole weight; those of their blocks are used",
            files.path,
            scalars,
        )
    return layers


def get_logical_shapes(
    files: TensorFiles, layers: Mapping[str, CheckpointLayer]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor as a model has it, as far as the file tells: of a weight with two numbers a byte [N, K], not [N, K / 2]."""
    shapes = {key: info.shape for key, info in files.items()}
    return shapes | {
        layer.key: (layer.rows, layer.columns) for layer in layers.values() if len(layer.shape) == 2
    }


def check_orphans(files: TensorFiles, prefix: str) -> None:
    """Raise FileError for a scale, a marker or the like whose weight is not there, and for int8 numbers that are no weight."""
    suffixes = {
        name
        for part in PART_SUFFIXES.values()
        for name in part
        if name not in AMBIGUOUS_SUFFIXES and "." not in name
    }
    for key in files:
        layer, _, suffix = key.rpartition(".")
        if not key.startswith(prefix):
            continue
        if (
            suffix in suffixes
            and f"{layer}.weight" not in files
            and not (layer.endswith(".weight") and layer in files)
        ):
            raise FileError(
                f"{files[key].file}: {key} belongs to no weight, {layer}.weight is missing; the file is incomplete"
            )
        if files[key].dtype == "I8" and suffix not in ("weight", "weight_packed", quip.HADAMARD_FLAG):
            raise FileError(
                f"{files[key].file}: {key} is I8 and no layer's weight; int8run reads int8 weights of layers"
            )


def classify_weight(
    files: TensorFiles, name: str, marker: Marker | None, rotated: bool
) -> CheckpointLayer | None:
    """One weight; None for a float one that is no matrix. rotated: INT8 rows that say nothing of themselves are."""
    info = files[f"{name}.weight"]
    kind = STORAGE_DTYPES.get(info.dtype)
    if marker is not None and marker.format_name in READERS:
        raise make_unsupported_error(files, marker.format_name, f"{name} says so")
    if kind is None:
        raise FileError(
            f"{info.file}: {info.key} is {info.dtype}; int8run reads weights of {', '.join(STORAGE_DTYPES)}"
        )
    keys = find_parts(files, name, kind)
    if kind == FP8 and "scale" in keys and files[keys["scale"]].dtype in BLOCK_FORMATS[MXFP8].scale_dtypes:
        kind = MXFP8
    strangers = [key for part, key in keys.items() if part not in ALLOWED_PARTS[kind]]
    if strangers or (kind == FLOAT and marker is not None):
        what = (
            strangers[0] if strangers else f"an entry in the header ({marker.format_name if marker else ''})"
        )
        raise FileError(
            f"{info.file}: {info.key} is {info.dtype} and has {what}, which such a weight cannot have; the file is damaged"
        )
    if kind == FLOAT:
        return parse_float_layer(files, info, name, keys)
    if marker is not None:
        check_marker_format(files, info, kind, keys, marker)
    if kind in BLOCK_FORMATS:
        return parse_block_layer(files, info, name, kind, keys, marker)
    return (
        parse_int8_layer(files, info, name, keys, marker, rotated)
        if kind == INT8
        else parse_fp8_layer(files, info, name, keys, marker)
    )


def find_parts(files: TensorFiles, name: str, kind: str) -> dict[str, str]:
    """The tensors beside a weight, by what they are for.

    Raises:
        FileError: two for the same.
    """
    found: dict[str, str] = {}
    for part, suffixes in PART_SUFFIXES.items():
        keys = [
            f"{name}.{suffix}"
            for suffix in suffixes
            if f"{name}.{suffix}" in files and not (kind == FLOAT and suffix in AMBIGUOUS_SUFFIXES)
        ]
        if len(keys) > 1 and part == "scale":
            raise FileError(
                f"{files.path}: {name} has two scales, {keys[0]} and {keys[1]}; nobody knows which is true"
            )
        if keys:
            found[part] = keys[0]
    return found


def check_marker_format(
    files: TensorFiles, info: TensorInfo, kind: str, keys: Mapping[str, str], marker: Marker
) -> None:
    """Refuse a marker that is unknown or is of another kind of weight."""
    if marker.format_name not in MARKER_FORMATS and not (marker.format_name == "" and kind == INT8):
        raise FileError(
            f"{marker.location} names the format {marker.format_name!r}; int8run reads {', '.join(MARKER_FORMATS)}"
        )
    if marker.format_name and MARKER_FORMATS[marker.format_name][0] != kind:
        scale = f"a scale in {files[keys['scale']].dtype}" if "scale" in keys else "no scale"
        raise FileError(
            f"{marker.location} names the format {marker.format_name!r}, and {info.key} is {info.dtype} with {scale}; they contradict each other, "
            "nobody knows which is true"
        )
    if marker.fields.get("num_experts") is not None:
        raise FileError(
            f"{marker.location} describes a bank of experts; int8run reads layers with a matrix each"
        )


def parse_float_layer(
    files: TensorFiles, info: TensorInfo, name: str, keys: Mapping[str, str]
) -> CheckpointLayer | None:
    """A weight that is not quantized."""
    if "scale" in keys:
        check_positive(files, keys["scale"])
        if bool((files.read(keys["scale"]).float() != 1).any()):
            raise FileError(
                f"{info.file}: {info.key} is {info.dtype} and has {keys['scale']}, which is not 1; nobody knows whether it was applied"
            )
    if len(info.shape) != 2:
        return None
    rows, columns = info.shape
    return CheckpointLayer(
        name, FLOAT, "", rows, columns, DTYPES[info.dtype][1], info.shape, sibling_keys=tuple(keys.values())
    )


def parse_fp8_layer(
    files: TensorFiles, info: TensorInfo, name: str, keys: dict[str, str], marker: Marker | None
) -> CheckpointLayer | None:
    """An fp8 weight: a plain cast without a scale, else stored times scale. The label e4m3 or e5m2 is the tensor's dtype."""
    if marker is not None and marker.rotation_group_size():
        raise FileError(f"{marker.location} says that an fp8 weight is rotated; int8run knows no such format")
    if not info.shape:
        return None
    rows, columns = info.shape[0], prod(info.shape[1:])
    granularity, block = "", 0
    if "scale" in keys:
        granularity, block = read_granularity(files, info, keys["scale"], marker)
    elif marker is not None and "tensor" not in MARKER_FORMATS[marker.format_name][1]:
        # a label for one scale may stand without it: it is 1
        raise FileError(
            f"{marker.location} names the format {marker.format_name!r}, and {name} has no weight_scale; the file is incomplete, download it again"
        )
    if "factor" in keys:
        check_positive(files, keys["factor"], (columns,))
    word = DTYPES[info.dtype][1]
    label = f"{word} scaled, {granularity}{f' {block}' if block else ''}" if granularity else f"{word} cast"
    return CheckpointLayer(
        name,
        FP8,
        granularity,
        rows,
        columns,
        label,
        info.shape,
        block_size=block,
        part_keys=keys,
        sibling_keys=tuple(keys.values()),
        format_name=FORMAT_NAMES.get(
            (
                info.dtype,
                reconcile_granularity(
                    rows, columns, granularity or ("" if marker is None else "tensor"), marker
                ),
            ),
            "",
        ),
    )


def parse_block_layer(
    files: TensorFiles, info: TensorInfo, name: str, kind: str, keys: dict[str, str], marker: Marker | None
) -> CheckpointLayer:
    """A weight in mxfp8 or nvfp4; of which flavour is `settled` when all layers are known."""
    real = block_scaled.check_block_scaled(files, info, name, kind, keys, marker)
    if "factor" in keys:
        check_positive(files, keys["factor"], (real.columns,))
    return CheckpointLayer(
        name,
        kind,
        "block",
        real.rows,
        real.columns,
        kind,
        info.shape,
        block_size=BLOCK_FORMATS[kind].block_size,
        part_keys=keys,
        sibling_keys=tuple(keys.values()),
        declared=real.declared,
    )


def resolve_block_layers(
    files: TensorFiles,
    layers: Mapping[str, CheckpointLayer],
    markers: Mapping[str, Marker],
    asked: str | None,
) -> dict[str, CheckpointLayer]:
    """The layers in mxfp8 and nvfp4 among these, with the word that says how their scales lie.

    Raises:
        FileError: nobody can tell, or scales that are none.
    """
    found = {}
    for kind in BLOCK_FORMATS:
        own = {name: layer for name, layer in layers.items() if layer.storage_dtype == kind}
        word = block_scaled.resolve_format_name(files, kind, own, markers, asked) if own else ""
        for name, layer in own.items():
            block_scaled.check_block_scales(files, files[layer.key], word, layer.part_keys["scale"])
            found[name] = replace(layer, format_name=word, label=word)
    return found


def parse_int8_layer(
    files: TensorFiles,
    info: TensorInfo,
    name: str,
    keys: dict[str, str],
    marker: Marker | None,
    rotated: bool,
) -> CheckpointLayer:
    """An INT8 weight. rotated: without a word in the file, if it has a scale a row."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise FileError(
            f"{info.file}: {info.key} is I8 {list(info.shape)}; int8run reads int8 weights [N, K]"
        )
    if "scale" not in keys:
        raise FileError(
            f"{info.file}: {name} is INT8 and has no weight_scale, so its numbers mean nothing; the file is incomplete, download it again"
        )
    granularity, block = read_granularity(files, info, keys["scale"], marker)
    rows, columns = info.shape if granularity != "transposed" else info.shape[::-1]
    method, group, sylvester, centered = parse_rotation(files, info, name, keys, marker)
    if (
        rotated
        and granularity == "row"
        and not quip.is_transformed(keys)
        and not {"matrix", "sigma"} & set(keys)
    ):
        group = next((size for size in USUAL_GROUP_SIZES if columns % size == 0), 0)
        method = "convrot" if group else method
    if group and columns % group:
        raise FileError(
            f"{info.file}: {name} is rotated in groups of {group}, which do not divide its {columns} inputs; the file is damaged"
        )
    if quip.is_transformed(keys):
        if group or {"factor", "sigma"} & set(keys) or granularity == "transposed":
            raise FileError(
                f"{info.file}: {name} is transformed by QuIP and in another way too; int8run knows no such format"
            )
        quip.check_quip(files, keys, info)
        method = "quip"
    for part in ("factor", "sigma"):
        if part in keys:
            check_positive(files, keys[part], (columns,))
    settings: Mapping[str, float] = {"group_size": group} if group else {}
    if marker is not None and marker.format_name == INT8RUN_FORMAT:
        settings = marker.fields["settings"]
    strange = sylvester or centered or quip.is_transformed(keys)
    word = name_int8_format(
        info.dtype, reconcile_granularity(rows, columns, granularity, marker), group, strange
    )
    words = [
        marker.format_name if marker and marker.format_name else "int8",
        f"{granularity}{f' {block}' if block else ''}",
    ]
    words += [] if method == NONE else [f"{method}{f' {group}' if group else ''}"]
    return CheckpointLayer(
        name,
        INT8,
        granularity,
        rows,
        columns,
        ", ".join(words),
        info.shape,
        method,
        settings,
        block,
        keys,
        group,
        sylvester,
        centered,
        tuple(keys.values()),
        word,
    )


def name_int8_format(dtype: str, granularity: str, group: int, strange: bool) -> str:
    """The word for an INT8 layer. strange: changed by more than a regular rotation and a factor."""
    if strange:
        return ""
    if group:
        return CONVROT if granularity in ("tensor", "row") else ""
    return FORMAT_NAMES.get((dtype, granularity), "")


def reconcile_granularity(rows: int, columns: int, granularity: str, marker: Marker | None) -> str:
    """What a marker says of a scale of one number where it is that: a row's, if there is one row, or that of one block of this size."""
    if granularity != "tensor" or marker is None:
        return granularity
    promised = MARKER_FORMATS[marker.format_name][1] if marker.format_name else ("tensor", "row")
    if "tensor" in promised and not marker.fields.get("per_row"):
        return granularity
    possible = {
        "row": rows == 1,
        "grid": rows == columns == marker.block_size,
        "block3d": rows == 1 and columns == marker.block_size,
    }
    return next((name for name in promised if possible.get(name)), granularity)


def parse_rotation(
    files: TensorFiles, info: TensorInfo, name: str, keys: Mapping[str, str], marker: Marker | None
) -> tuple[str, int, bool, bool]:
    """Method, size of the rotated groups, whether by Sylvester's matrix, and whether tokens are centered."""
    group, sylvester = (0, False) if marker is None else (marker.rotation_group_size(), marker.is_sylvester())
    if marker is not None and marker.format_name == INT8RUN_FORMAT:
        if marker.fields["factor"] != ("factor" in keys) or {"matrix", "sigma"} & set(keys):
            raise FileError(
                f"{marker.location} and the tensors of {name} contradict each other in their factors; the file is damaged"
            )
        return marker.fields["outlier"], group, sylvester, marker.fields["centered"]
    if not {"matrix", "sigma"} & set(keys):
        plain = "smoothquant" if "factor" in keys else NONE
        return ("quarot" if sylvester else "convrot") if group else plain, group, sylvester, False
    # INT8-Toolkit: the matrix itself lies beside the weight
    if group or "factor" in keys:
        raise FileError(
            f"{info.file}: {name} is rotated by its marker and by the INT8-Toolkit's tensors; they contradict each other"
        )
    if "matrix" in keys:
        group, sylvester = identify_hadamard(files, keys["matrix"])
    return (
        "hadanorm" if "sigma" in keys else "quarot" if sylvester else "convrot",
        group,
        sylvester,
        "sigma" in keys,
    )


def identify_hadamard(files: TensorFiles, key: str) -> tuple[int, bool]:
    """Size and kind of a Hadamard matrix that a file holds."""
    info = files[key]
    size = info.shape[0] if len(info.shape) == 2 and info.shape[0] == info.shape[1] else 0
    if 2 <= size <= MAX_EXACT_GROUP_SIZE and not size & (size - 1) and info.dtype in SCALE_DTYPES:
        matrix = files.read(key).float()
        for sylvester in (True, False):
            possible = sylvester or is_power_of_4(size)
            if possible and torch.allclose(
                matrix, get_hadamard(size, sylvester), atol=0.01 / size**0.5
            ):  # half precision is good enough
                return size, sylvester
    raise FileError(
        f"{info.file}: {key} {info.dtype} {list(info.shape)} is no Hadamard matrix by Sylvester or a regular one"
    )


def check_consistency(
    files: TensorFiles, prefix: str, layers: Mapping[str, CheckpointLayer], markers: Mapping[str, Marker]
) -> None:
    """Raise FileError for layers that make no sense beside the others."""
    int8 = [layer for layer in layers.values() if layer.storage_dtype == INT8]
    silent = [
        x
        for x in int8
        if x.name not in markers
        and not quip.is_transformed(x.part_keys)
        and not {"matrix", "sigma"} & set(x.part_keys)
    ]
    if silent and any(layer.name in markers for layer in int8):
        raise FileError(
            f"{files.path}: {silent[0].name} has no comfy_quant marker and other INT8 layers have one, so nobody knows whether it is "
            "rotated; the file is damaged"
        )
    marks = [key for key in files if key.startswith(prefix) and is_scaled_fp8_marker(key)]
    for mark in marks:
        below = [
            x
            for x in layers.values()
            if x.storage_dtype == FP8 and x.name.startswith(mark.removesuffix(SCALED_FP8))
        ]
        if below and not any("scale" in layer.part_keys for layer in below):
            raise FileError(
                f"{files.path}: {mark} says that fp8 weights have scales, and none has one ({below[0].name}); they were lost"
            )


def is_scaled_fp8_marker(key: str) -> bool:
    """Whether a key marks a whole fp8 file; it belongs to no layer and must not stand beside int8 weights that are written."""
    return key == SCALED_FP8 or key.endswith(f".{SCALED_FP8}")


def warn_wrong_labels(
    files: TensorFiles, layers: Mapping[str, CheckpointLayer], markers: Mapping[str, Marker]
) -> None:
    """One warning for each kind of label that the shape of the scale contradicts."""
    wrong: Counter[tuple[str, str]] = Counter()
    for name, layer in layers.items():
        marker = markers.get(name)
        if marker is None or not layer.granularity:
            continue
        promised = MARKER_FORMATS[marker.format_name][1] if marker.format_name else ("tensor", "row")
        per_row, granularity = (
            marker.fields.get("per_row"),
            reconcile_granularity(layer.rows, layer.columns, layer.granularity, marker),
        )
        if granularity not in promised:
            wrong[marker.format_name or "int8", granularity] += 1
        elif per_row is not None and per_row != (granularity == "row"):
            wrong[f"per_row={per_row}", granularity] += 1
    for (label, shape), count in wrong.items():
        log.warning(
            "%s: %d layers are labelled %s and have scales by %s; the shape of the scales counts",
            files.path,
            count,
            label,
            shape,
        )
