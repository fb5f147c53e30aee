"""Find out what one weight of a checkpoint is: float, fp8, mxfp8, nvfp4 or INT8.

`detect.py` calls `classify_weight` for each weight of a file. What INT8 weights need stands in
`classify_int8.py`.
"""

from collections.abc import Mapping
from math import prod

from int8run.checkpoints import block_scaled, quip
from int8run.checkpoints.block_scaled import BLOCK_FORMATS, MXFP8, NVFP4
from int8run.checkpoints.classify_int8 import parse_int8_layer
from int8run.checkpoints.format_names import (
    FORMAT_NAMES,
    MARKER_FORMATS,
    name_granularity,
)
from int8run.checkpoints.granularity import Granularity, check_positive, read_granularity
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.layer import FLOAT, FP8, INT8, CheckpointLayer
from int8run.checkpoints.part_dtypes import check_part_dtypes
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.checkpoints.sdnq import SdnqMethod
from int8run.checkpoints.unsupported import READERS, has_sdnq_scale, make_unsupported_error
from int8run.errors import FileError

# dtype of the weight in the file, by safetensors' name -> storage dtype; fp8 may turn out to be mxfp8
STORAGE_DTYPES = {
    "F64": FLOAT,
    "F32": FLOAT,
    "F16": FLOAT,
    "BF16": FLOAT,
    "I8": INT8,
    "F8_E4M3": FP8,
    "F8_E5M2": FP8,
    "U8": NVFP4,
}
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
# storage dtype -> the parts that a weight may have
ALLOWED_PARTS = {
    FLOAT: {"scale", "input"},  # a scale of 1, which ComfyUI's own conversion leaves
    FP8: {"scale", "input", "marker", "factor"},
    INT8: set(PART_SUFFIXES) - {"global", "scalar"},
    NVFP4: {"scale", "input", "marker", "factor", "global"},
    # the scalar is for cards that have no products in mxfp8, and less exact than the scales of the blocks
    MXFP8: {"scale", "input", "marker", "factor", "scalar"},
}


def classify_weight(
    files: TensorFiles,
    name: str,
    marker: Marker | None,
    *,
    assume_rotated: bool,
    sdnq: SdnqMethod | None = None,
) -> CheckpointLayer | None:
    """Find out what one weight is.

    Args:
        files: the checkpoint.
        name: of the layer.
        marker: of the layer, if it has one.
        assume_rotated: whether INT8 rows that do not say so are rotated.
        sdnq: how SDNQ made the file's weights; None where it made none.

    Returns:
        None for a float weight that is not a matrix.

    Raises:
        FileError: a weight that cannot be read.
    """
    info = files[f"{name}.weight"]
    if marker is not None and marker.format_name in READERS:
        raise make_unsupported_error(files, marker.format_name, f"{name} says so")
    if info.dtype not in STORAGE_DTYPES:
        raise FileError(
            f"{info.file}: {info.key} is {info.dtype}; int8run reads weights of {', '.join(STORAGE_DTYPES)}"
        )
    storage_dtype = STORAGE_DTYPES[info.dtype]
    keys = find_parts(files, name, storage_dtype)
    scale_dtype = files[keys["scale"]].dtype if "scale" in keys else None
    if storage_dtype == FP8 and scale_dtype in BLOCK_FORMATS[MXFP8].scale_dtypes:
        storage_dtype = MXFP8
    check_parts(info, storage_dtype, keys, marker)
    check_part_dtypes(files, keys)

    if storage_dtype == FLOAT:
        return parse_float_layer(files, info, name=name, keys=keys)
    if marker is not None:
        check_marker_format(files, info, storage_dtype, keys, marker)
    if storage_dtype in BLOCK_FORMATS:
        return parse_block_layer(
            files, info, name=name, storage_dtype=storage_dtype, keys=keys, marker=marker
        )
    if storage_dtype == INT8:
        return parse_int8_layer(
            files,
            info,
            name=name,
            keys=keys,
            marker=marker,
            assume_rotated=assume_rotated,
            sdnq=sdnq if has_sdnq_scale(files, name) else None,
        )
    return parse_fp8_layer(files, info, name=name, keys=keys, marker=marker)


def find_parts(files: TensorFiles, name: str, storage_dtype: str) -> dict[str, str]:
    """Find the tensors beside a weight. Returns what for -> key.

    Raises:
        FileError: two scales.
    """
    parts: dict[str, str] = {}
    for part, suffixes in PART_SUFFIXES.items():
        keys = []
        for suffix in suffixes:
            may_be_another = storage_dtype == FLOAT and suffix in AMBIGUOUS_SUFFIXES
            if f"{name}.{suffix}" in files and not may_be_another:
                keys.append(f"{name}.{suffix}")
        if len(keys) > 1 and part == "scale":
            raise FileError(
                f"{files.path}: {name} has two scales, {keys[0]} and {keys[1]}; it is unclear which one "
                "counts"
            )
        if keys:
            parts[part] = keys[0]
    return parts


def check_parts(info: TensorInfo, storage_dtype: str, keys: Mapping[str, str], marker: Marker | None) -> None:
    """Raise FileError for a tensor or a marker that a weight of this storage dtype cannot have."""
    not_allowed = [key for part, key in keys.items() if part not in ALLOWED_PARTS[storage_dtype]]
    if not_allowed:
        what = not_allowed[0]
    elif storage_dtype == FLOAT and marker is not None:
        what = f"an entry in the header ({marker.format_name})"
    else:
        return
    raise FileError(
        f"{info.file}: {info.key} is {info.dtype} and has {what}, which such a weight cannot have; the file "
        "is damaged"
    )


def check_marker_format(
    files: TensorFiles, info: TensorInfo, storage_dtype: str, keys: Mapping[str, str], marker: Marker
) -> None:
    """Raise FileError for a marker whose format is unknown or belongs to another storage dtype."""
    name = marker.format_name
    is_legacy_int8 = name == "" and storage_dtype == INT8
    if name not in MARKER_FORMATS and not is_legacy_int8:
        raise FileError(
            f"{marker.location} names the format {name!r}; int8run reads {', '.join(MARKER_FORMATS)}"
        )
    if name and MARKER_FORMATS[name].storage_dtype != storage_dtype:
        scale = f"a scale in {files[keys['scale']].dtype}" if "scale" in keys else "no scale"
        raise FileError(
            f"{marker.location} names the format {name!r}, and {info.key} is {info.dtype} with {scale}; "
            "they contradict each other, so the weight cannot be read"
        )
    if marker.fields.get("num_experts") is not None:
        raise FileError(
            f"{marker.location} describes a bank of experts; int8run reads layers with a matrix each"
        )


def parse_float_layer(
    files: TensorFiles, info: TensorInfo, *, name: str, keys: Mapping[str, str]
) -> CheckpointLayer | None:
    """A weight that is not quantized; None where it is not a matrix."""
    if "scale" in keys:
        check_positive(files, keys["scale"])
        if bool((files.read(keys["scale"]).float() != 1).any()):
            raise FileError(
                f"{info.file}: {info.key} is {info.dtype} and has {keys['scale']}, which is not 1; "
                "it is unclear whether it was applied"
            )
    if len(info.shape) != 2:
        return None
    rows, columns = info.shape
    return CheckpointLayer(
        name=name,
        storage_dtype=FLOAT,
        shape=info.shape,
        rows=rows,
        columns=columns,
        label=DTYPES[info.dtype].torch_name,
        part_keys=keys,
    )


def parse_fp8_layer(
    files: TensorFiles, info: TensorInfo, *, name: str, keys: Mapping[str, str], marker: Marker | None
) -> CheckpointLayer | None:
    """An fp8 weight: a plain cast without a scale, else stored numbers times scale.

    Whether it is e4m3 or e5m2 the tensor's dtype says, not the marker. None for a single number.
    """
    if marker is not None and marker.rotation_group_size():
        raise FileError(
            f"{marker.location} says that an fp8 weight is rotated; int8run does not know such a format"
        )
    if not info.shape:
        return None
    rows, columns = info.shape[0], prod(info.shape[1:])
    granularity = Granularity("")
    if "scale" in keys:
        granularity = read_granularity(files, info, keys["scale"], marker)
    elif marker is not None:
        raise FileError(
            f"{marker.location} names the format {marker.format_name!r}, and {name} has no weight_scale, "
            "without which its numbers mean nothing; the file is incomplete, download it again"
        )
    if "factor" in keys:
        check_positive(files, keys["factor"], (columns,))
    dtype_name = DTYPES[info.dtype].torch_name
    known_granularity = name_granularity(granularity.name, rows, columns, marker)
    return CheckpointLayer(
        name=name,
        storage_dtype=FP8,
        shape=info.shape,
        rows=rows,
        columns=columns,
        label=f"{dtype_name} scaled, {granularity}" if granularity.name else f"{dtype_name} cast",
        granularity=granularity.name,
        block_size=granularity.block_size,
        format_name=FORMAT_NAMES.get((info.dtype, known_granularity), ""),
        part_keys=keys,
    )


def parse_block_layer(
    files: TensorFiles,
    info: TensorInfo,
    *,
    name: str,
    storage_dtype: str,
    keys: Mapping[str, str],
    marker: Marker | None,
) -> CheckpointLayer:
    """A weight in mxfp8 or nvfp4; `resolve_block_layers` finds its format name when all layers are known."""
    logical_shape = block_scaled.check_block_scaled(
        files, info, name=name, storage_dtype=storage_dtype, keys=keys, marker=marker
    )
    if "factor" in keys:
        check_positive(files, keys["factor"], (logical_shape.columns,))
    return CheckpointLayer(
        name=name,
        storage_dtype=storage_dtype,
        shape=info.shape,
        rows=logical_shape.rows,
        columns=logical_shape.columns,
        label=storage_dtype,
        granularity="block",
        block_size=BLOCK_FORMATS[storage_dtype].block_size,
        part_keys=keys,
        declared=logical_shape.declared,
    )
