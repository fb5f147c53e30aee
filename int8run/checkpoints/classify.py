"""Find out what one weight of a checkpoint is: float, fp8, mxfp8, nvfp4, INT8, codes, or blocks of GGUF.

`detect.py` calls `classify_weight` for each weight of a file. The dtype of the weight, the tensors beside it
and its marker decide, in this order; what contradicts itself is refused. What INT8 weights need stands in
`classify_int8.py`, mxfp8 and nvfp4 in `block_scaled.py`, codes in `grouped.py`. Nothing here knows the other
layers of the file.
"""

from itertools import chain
from math import prod

from int8run.checkpoints import block_scaled, grouped, quip
from int8run.checkpoints.block_formats import BLOCK_FORMATS, MXFP8, NVFP4
from int8run.checkpoints.classify_int8 import parse_int8_layer
from int8run.checkpoints.format_names import FORMAT_NAMES, MARKER_FORMATS, name_granularity
from int8run.checkpoints.granularity import Granularity, check_positive, read_granularity
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.layer import FLOAT, FP8, GGUF, INT8, CheckpointLayer
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.part_dtypes import check_part_dtypes
from int8run.checkpoints.quant_metadata import GROUPED_FORMAT, Marker
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.sdnq import SdnqMethod
from int8run.checkpoints.unsupported import READERS, has_sdnq_scale, make_unsupported_error
from int8run.errors import FileError
from int8run.quant.grouped_weight import GROUPED_BITS, W4A8, W6A8

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
    **{part: (suffix,) for part, suffix in grouped.PART_SUFFIXES.items()},
    **{name: (name,) for name in quip.ALL_PARTS},
}
# other tensors are called so as well, for example the weights of norms
AMBIGUOUS_SUFFIXES = ("scale", "weight.scale", "input.scale")
# what nothing else is called: such a tensor belongs to the weight beside it
ALL_SUFFIXES = set(chain(*PART_SUFFIXES.values()))
CLEAR_SUFFIXES = {suffix for suffix in ALL_SUFFIXES if "." not in suffix} - set(AMBIGUOUS_SUFFIXES)
# storage dtype -> the parts that a weight may have
ALLOWED_PARTS = {
    FLOAT: {"scale", "input"},  # a scale of 1, which ComfyUI's own conversion leaves
    GGUF: set(),
    FP8: {"scale", "input", "marker", "factor"},
    INT8: set(PART_SUFFIXES) - {"global", "scalar"} - set(grouped.PART_SUFFIXES),
    NVFP4: {"scale", "input", "marker", "factor", "global"},
    # the scalar is for cards that have no products in mxfp8, and less exact than the scales of the blocks
    MXFP8: {"scale", "input", "marker", "factor", "scalar"},
    W4A8: {*grouped.PART_SUFFIXES, "input", "marker", "factor"},
    W6A8: {*grouped.PART_SUFFIXES, "input", "marker", "factor"},
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
    if marker is not None and marker.format_name in READERS:
        raise make_unsupported_error(files, marker.format_name, f"{name} says so")
    evidence = gather_evidence(files, name, marker)
    storage_dtype = find_storage_dtype(evidence)
    check_parts(evidence, storage_dtype)
    check_part_dtypes(files, evidence.part_keys)

    if storage_dtype == FLOAT:
        return parse_float_layer(evidence)
    if storage_dtype == GGUF:
        return parse_gguf_layer(evidence)
    if marker is not None:
        check_marker_format(evidence, marker, storage_dtype)
    if storage_dtype in BLOCK_FORMATS:
        return parse_block_layer(evidence, storage_dtype)
    if storage_dtype in GROUPED_BITS:
        return parse_grouped_layer(evidence, storage_dtype)
    if storage_dtype == FP8:
        return parse_fp8_layer(evidence)
    if not has_sdnq_scale(files, name):  # another program made this weight
        sdnq = None
    return parse_int8_layer(evidence, assume_rotated=assume_rotated, sdnq=sdnq)


# -- what the file says about a weight -------------------------------------------------------------


def gather_evidence(files: TensorFiles, name: str, marker: Marker | None) -> LayerEvidence:
    """Collect what a file says about one weight.

    Args:
        files: the checkpoint.
        name: of the layer.
        marker: of the layer, if it has one.

    Raises:
        FileError: a dtype that is never a weight's, or two scales.
    """
    weight = files[f"{name}.weight"]
    if weight.dtype not in STORAGE_DTYPES:
        raise FileError(
            f"{weight.file}: {weight.key} is {weight.dtype}; int8run reads weights of "
            f"{', '.join(STORAGE_DTYPES)}"
        )
    part_keys = find_parts(files, name, is_float=STORAGE_DTYPES[weight.dtype] == FLOAT)
    return LayerEvidence(files=files, name=name, weight=weight, part_keys=part_keys, marker=marker)


def find_parts(files: TensorFiles, name: str, *, is_float: bool) -> dict[str, str]:
    """Find the tensors beside a weight.

    Args:
        files: the checkpoint.
        name: of the layer.
        is_float: whether the weight is a float one, beside which some names mean something else.

    Returns:
        What for -> key.

    Raises:
        FileError: two scales.
    """
    parts: dict[str, str] = {}
    for part, suffixes in PART_SUFFIXES.items():
        keys = []
        for suffix in suffixes:
            may_be_another = is_float and suffix in AMBIGUOUS_SUFFIXES
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


def find_storage_dtype(evidence: LayerEvidence) -> str:
    """How the weight is stored: float, int8, fp8, mxfp8, nvfp4, w4a8, w6a8, or blocks of a GGUF file.

    fp8 and mxfp8 have the same dtype; the scales of mxfp8 are powers of 2, in a dtype of their own. Codes of
    4 and 6 bits are stored as int8.

    Raises:
        FileError: codes whose number of bits cannot be found out.
    """
    if evidence.weight.has_blocks:
        return GGUF
    storage_dtype = STORAGE_DTYPES[evidence.weight.dtype]
    if storage_dtype == INT8 and grouped.is_grouped(evidence):
        return grouped.find_storage_dtype(evidence)
    scale = evidence.find_part("scale")
    if storage_dtype == FP8 and scale is not None and scale.dtype in BLOCK_FORMATS[MXFP8].scale_dtypes:
        return MXFP8
    return storage_dtype


# -- whether it makes sense ------------------------------------------------------------------------


def check_parts(evidence: LayerEvidence, storage_dtype: str) -> None:
    """Raise FileError for a tensor or a marker that a weight of this storage dtype cannot have."""
    allowed = ALLOWED_PARTS[storage_dtype]
    not_allowed = [key for part, key in evidence.part_keys.items() if part not in allowed]
    marker, weight = evidence.marker, evidence.weight
    if not_allowed:
        what = not_allowed[0]
    elif storage_dtype in (FLOAT, GGUF) and marker is not None:
        what = f"an entry in the header ({marker.format_name})"
    else:
        return
    raise FileError(
        f"{weight.file}: {weight.key} is {weight.dtype} and has {what}, which such a weight cannot have; "
        "the file is damaged"
    )


def check_marker_format(evidence: LayerEvidence, marker: Marker, storage_dtype: str) -> None:
    """Raise FileError for a marker whose format is unknown or belongs to another storage dtype."""
    name = marker.format_name
    is_legacy_int8 = name == "" and storage_dtype == INT8
    if name not in MARKER_FORMATS and not is_legacy_int8:
        raise FileError(
            f"{marker.location} names the format {name!r}; int8run reads {', '.join(MARKER_FORMATS)}"
        )
    if name and storage_dtype not in MARKER_FORMATS[name].storage_dtypes:
        scale = evidence.find_part("scale")
        found = "no scale" if scale is None else f"a scale in {scale.dtype}"
        weight = evidence.weight
        raise FileError(
            f"{marker.location} names the format {name!r}, and {weight.key} is {weight.dtype} with {found}; "
            "they contradict each other, so the weight cannot be read"
        )
    if marker.fields.get("num_experts") is not None:
        raise FileError(
            f"{marker.location} describes a bank of experts; int8run reads layers with a matrix each"
        )


# -- what it is ------------------------------------------------------------------------------------


def parse_float_layer(evidence: LayerEvidence) -> CheckpointLayer | None:
    """A weight that is not quantized; None where it is not a matrix.

    Raises:
        FileError: beside it stands a scale that is not 1.
    """
    weight = evidence.weight
    scale = evidence.find_part("scale")
    if scale is not None:
        check_positive(evidence.files, scale.key)
        if bool((evidence.read_part("scale") != 1).any()):
            raise FileError(
                f"{weight.file}: {weight.key} is {weight.dtype} and has {scale.key}, which is not 1; "
                "it is unclear whether it was applied"
            )
    if len(weight.shape) != 2:
        return None
    rows, columns = weight.shape
    return CheckpointLayer(
        name=evidence.name,
        storage_dtype=FLOAT,
        shape=weight.shape,
        rows=rows,
        columns=columns,
        label=DTYPES[weight.dtype].torch_name,
        part_keys=evidence.part_keys,
    )


def parse_gguf_layer(evidence: LayerEvidence) -> CheckpointLayer:
    """A weight in blocks of a GGUF file, which is read as the numbers that they stand for."""
    weight = evidence.weight
    assert weight.form is not None
    return CheckpointLayer(
        name=evidence.name,
        storage_dtype=GGUF,
        shape=weight.shape,
        rows=weight.shape[0],
        columns=prod(weight.shape[1:]),
        label=weight.form.label,
    )


def parse_fp8_layer(evidence: LayerEvidence) -> CheckpointLayer | None:
    """An fp8 weight: a plain cast without a scale, else stored numbers times scale.

    Whether it is e4m3 or e5m2 the tensor's dtype says, not the marker. None for a single number.

    Raises:
        FileError: a marker that says it is rotated or has a scale that is not there, or a scale or factor
            that does not fit.
    """
    weight, marker = evidence.weight, evidence.marker
    if marker is not None and marker.rotation_group_size():
        raise FileError(
            f"{marker.location} says that an fp8 weight is rotated; int8run does not know such a format"
        )
    if not weight.shape:
        return None
    rows, columns = weight.shape[0], prod(weight.shape[1:])  # [N, ...] -> [N, K]
    granularity = read_fp8_granularity(evidence)
    if evidence.has_part("factor"):
        check_positive(evidence.files, evidence.part_keys["factor"], (columns,))

    dtype_name = DTYPES[weight.dtype].torch_name
    label = f"{dtype_name} scaled, {granularity}"
    if not granularity.name:
        label = f"{dtype_name} cast"
    known_granularity = name_granularity(granularity.name, rows, columns, marker)
    return CheckpointLayer(
        name=evidence.name,
        storage_dtype=FP8,
        shape=weight.shape,
        rows=rows,
        columns=columns,
        label=label,
        granularity=granularity.name,
        block_size=granularity.block_size,
        format_name=FORMAT_NAMES.get((weight.dtype, known_granularity), ""),
        part_keys=evidence.part_keys,
    )


def read_fp8_granularity(evidence: LayerEvidence) -> Granularity:
    """Which numbers of an fp8 weight share a scale; an empty name for a cast, which has none.

    Raises:
        FileError: a scale that does not fit, or none where the marker promises one.
    """
    if evidence.has_part("scale"):
        return read_granularity(evidence)
    marker = evidence.marker
    if marker is not None:
        raise FileError(
            f"{marker.location} names the format {marker.format_name!r}, and {evidence.name} has no "
            "weight_scale, without which its numbers mean nothing; the file is incomplete, download it again"
        )
    return Granularity("")


def parse_block_layer(evidence: LayerEvidence, storage_dtype: str) -> CheckpointLayer:
    """A weight in mxfp8 or nvfp4; `resolve_block_layers` finds its format name when all layers are known.

    Raises:
        FileError: a weight that does not go together with what stands beside it.
    """
    logical_shape = block_scaled.check_block_scaled(evidence, storage_dtype)
    if evidence.has_part("factor"):
        check_positive(evidence.files, evidence.part_keys["factor"], (logical_shape.columns,))
    return CheckpointLayer(
        name=evidence.name,
        storage_dtype=storage_dtype,
        shape=evidence.weight.shape,
        rows=logical_shape.rows,
        columns=logical_shape.columns,
        label=storage_dtype,
        granularity="block",
        block_size=BLOCK_FORMATS[storage_dtype].block_size,
        part_keys=evidence.part_keys,
        declared=logical_shape.declared,
    )


def parse_grouped_layer(evidence: LayerEvidence, storage_dtype: str) -> CheckpointLayer:
    """A weight in codes of 4 or 6 bits, which is always rotated.

    Args:
        evidence: what the file says about the layer.
        storage_dtype: w4a8 or w6a8.

    Raises:
        FileError: a weight that does not go together with what stands beside it.
    """
    layout = grouped.check_grouped(evidence, storage_dtype)
    bits, rotation = GROUPED_BITS[storage_dtype], layout.rotation_group_size
    return CheckpointLayer(
        name=evidence.name,
        storage_dtype=storage_dtype,
        shape=evidence.weight.shape,
        rows=layout.rows,
        columns=layout.columns,
        label=f"{GROUPED_FORMAT}, {bits} bits, group {layout.group_size}, convrot {rotation}",
        granularity="group",
        block_size=layout.group_size,
        format_name=storage_dtype,
        part_keys=evidence.part_keys,
        outlier_method="convrot",
        outlier_settings={"group_size": rotation},
        rotation_group_size=rotation,
    )
