"""Find out what one INT8 weight of a checkpoint is: which numbers share a scale, and how it was transformed.

Called by `classify.py`. ComfyUI's markers, int8run's own, the INT8-Toolkit's tensors and QuIP's say how a
weight was transformed before it was rounded; two of them on one weight contradict each other. Of the numbers
only scales, factors and matrices are read, never the weight.
"""

from collections.abc import Mapping
from math import prod

from int8run.checkpoints import quip
from int8run.checkpoints.comfy_int8 import is_conv_shape
from int8run.checkpoints.format_names import name_granularity, name_int8_format
from int8run.checkpoints.granularity import Granularity, check_positive, read_granularity
from int8run.checkpoints.int8_transform import (
    TransformInfo,
    check_factors,
    check_transform,
    find_transform,
    parse_conv_rotation,
)
from int8run.checkpoints.layer import INT8, CheckpointLayer
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.quant_metadata import INT8RUN_CONV_FORMAT, INT8RUN_FORMAT, Marker
from int8run.checkpoints.sdnq import SdnqMethod
from int8run.errors import FileError
from int8run.outlier.base import NONE


def parse_int8_layer(
    evidence: LayerEvidence, *, assume_rotated: bool, sdnq: SdnqMethod | None = None
) -> CheckpointLayer:
    """An INT8 weight: which numbers share a scale, and what was done to it before it was rounded.

    Args:
        evidence: what the file says about the layer.
        assume_rotated: no INT8 layer of the file has a marker, and the user says that its rows are rotated.
        sdnq: how SDNQ made the weight, where it did.

    Raises:
        FileError: a weight that cannot be read.
    """
    marker = evidence.marker
    if marker is not None and marker.format_name == INT8RUN_CONV_FORMAT:
        return parse_int8_convolution(evidence, marker)
    check_int8_weight(evidence)
    granularity = read_granularity(evidence, may_be_transposed=sdnq is not None)
    rows, columns = evidence.weight.shape
    if granularity.name == "transposed":  # stored [K, N]
        rows, columns = columns, rows

    transform = find_transform(evidence, granularity, columns, assume_rotated=assume_rotated, sdnq=sdnq)
    check_transform(evidence, transform, granularity, columns)
    check_factors(evidence, columns)

    return CheckpointLayer(
        name=evidence.name,
        storage_dtype=INT8,
        shape=evidence.weight.shape,
        rows=rows,
        columns=columns,
        label=describe_layer(evidence.marker, granularity, transform),
        granularity=granularity.name,
        block_size=granularity.block_size,
        format_name=find_format_name(evidence, granularity, transform, rows, columns),
        part_keys=evidence.part_keys,
        outlier_method=transform.method,
        outlier_settings=read_settings(evidence.marker, transform.group_size),
        rotation_group_size=transform.group_size,
        is_sylvester=transform.is_sylvester,
        is_centered=transform.is_centered,
    )


def parse_int8_convolution(evidence: LayerEvidence, marker: Marker) -> CheckpointLayer:
    """The INT8 weight of a convolution, which int8run alone writes: a scale for each output channel.

    Args:
        evidence: what the file says about the layer.
        marker: its marker, which says whether channels are rotated.

    Raises:
        FileError: for other dimensions, other scales, groups that do not divide the channels, or what stands
            beside transformed weights of Linears.
    """
    weight = evidence.weight
    if not is_conv_shape(weight.shape) or 0 in weight.shape:
        raise FileError(
            f"{weight.file}: {weight.key} is I8 {list(weight.shape)} and marked {INT8RUN_CONV_FORMAT}; such "
            "a weight is [N, C, height, width] or [N, C, time, height, width]; the file is damaged"
        )
    unknown = sorted(set(evidence.part_keys) - {"scale", "marker"})
    if unknown or not evidence.has_part("scale"):
        found = evidence.part_keys[unknown[0]] if unknown else "no weight_scale"
        raise FileError(
            f"{weight.file}: {weight.key} is marked {INT8RUN_CONV_FORMAT} and has {found}; "
            "such a weight has a weight_scale and a marker alone: the file is damaged"
        )
    check_positive(evidence.files, evidence.part_keys["scale"], (weight.shape[0], 1))
    transform = parse_conv_rotation(evidence, marker)
    label = f"{INT8RUN_CONV_FORMAT}, row"
    if transform.group_size:
        label += f", {transform.label}"
    return CheckpointLayer(
        name=evidence.name,
        storage_dtype=INT8,
        shape=weight.shape,
        rows=weight.shape[0],
        columns=prod(weight.shape[1:]),
        label=label,
        granularity="row",
        part_keys=evidence.part_keys,
        outlier_method=transform.method,
        outlier_settings=marker.fields.get("settings", {}),
        rotation_group_size=transform.group_size,
        is_sylvester=transform.is_sylvester,
    )


def check_int8_weight(evidence: LayerEvidence) -> None:
    """Raise FileError unless an INT8 weight is a matrix and has a scale."""
    weight = evidence.weight
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise FileError(
            f"{weight.file}: {weight.key} is I8 {list(weight.shape)}; int8run reads int8 weights [N, K]"
        )
    if not evidence.has_part("scale"):
        raise FileError(
            f"{weight.file}: {evidence.name} is INT8 and has no weight_scale, so its numbers mean nothing; "
            "the file is incomplete, download it again"
        )


# -- what was done to the weight -------------------------------------------------------------------


# -- whether it fits -------------------------------------------------------------------------------


# -- how it is called ------------------------------------------------------------------------------


def describe_layer(marker: Marker | None, granularity: Granularity, transform: TransformInfo) -> str:
    """A short description for messages and lists, such as `int8_tensorwise, row, convrot 256`."""
    labels = ["int8", str(granularity)]
    if marker is not None and marker.format_name:
        labels[0] = marker.format_name
    if transform.method != NONE:
        labels.append(transform.label)
    return ", ".join(labels)


def find_format_name(
    evidence: LayerEvidence, granularity: Granularity, transform: TransformInfo, rows: int, columns: int
) -> str:
    """The word of `clip=` for this layer; empty where `clip=` has none.

    Args:
        evidence: what the file says about the layer.
        granularity: of the weight, by the shapes.
        transform: what was done to the weight.
        rows: N of the weight.
        columns: K of the weight.
    """
    if transform.is_sylvester or transform.is_centered or quip.is_transformed(evidence.part_keys):
        return ""
    known_granularity = name_granularity(granularity.name, rows, columns, evidence.marker)
    return name_int8_format(known_granularity, transform.group_size)


def read_settings(marker: Marker | None, group_size: int) -> Mapping[str, float]:
    """The settings of the outlier method, as far as the file says."""
    if marker is not None and marker.format_name == INT8RUN_FORMAT:
        settings: Mapping[str, float] = marker.fields["settings"]
        return settings
    return {"group_size": group_size} if group_size else {}
