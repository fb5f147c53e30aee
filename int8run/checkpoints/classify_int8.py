"""Find out what one INT8 weight of a checkpoint is: which numbers share a scale, and how it was transformed.

Called by `classify.py`. ComfyUI's markers, int8run's own, the INT8-Toolkit's tensors and QuIP's say how a
weight was transformed before it was rounded; two of them on one weight contradict each other. Of the numbers
only scales, factors and matrices are read, never the weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from int8run.checkpoints import quip
from int8run.checkpoints.comfy_int8 import is_conv_shape
from int8run.checkpoints.format_names import name_granularity, name_int8_format
from int8run.checkpoints.granularity import Granularity, check_positive, read_granularity
from int8run.checkpoints.header import FLOATS
from int8run.checkpoints.layer import INT8, MAX_EXACT_GROUP_SIZE, CheckpointLayer, get_hadamard
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.powers import is_power_of_2, is_power_of_4
from int8run.checkpoints.quant_metadata import INT8RUN_CONV_FORMAT, INT8RUN_FORMAT, Marker
from int8run.checkpoints.sdnq import SdnqMethod
from int8run.errors import FileError
from int8run.outlier.base import NONE

# the INT8-Toolkit describes its transforms by these tensors and not by a marker
TOOLKIT_PARTS = {"matrix", "sigma"}
# group sizes to try, in this order, where a file does not describe its rotation: the first that divides K
USUAL_GROUP_SIZES = (256, 64, 16)


@dataclass(frozen=True)
class TransformInfo:
    """What was done to an INT8 weight before it was rounded; its factors are tensors of the file.

    Args:
        method: the outlier method.
        group_size: columns that were rotated together; 0: none.
        is_sylvester: whether rotated by Sylvester's matrix, not by the regular one.
        is_centered: whether tokens are centered before the product.
    """

    method: str = NONE
    group_size: int = 0
    is_sylvester: bool = False
    is_centered: bool = False

    @property
    def label(self) -> str:
        """Method and group size, for people."""
        if not self.group_size:
            return self.method
        return f"{self.method} {self.group_size}"


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


def parse_conv_rotation(evidence: LayerEvidence, marker: Marker) -> TransformInfo:
    """How the marker of a convolution says that its channels are rotated.

    Raises:
        FileError: for groups that do not divide the channels, or that no kernel rotates.
    """
    group_size, channels = marker.rotation_group_size(), evidence.weight.shape[1]
    if not group_size:
        return TransformInfo()
    if channels % group_size or group_size > MAX_EXACT_GROUP_SIZE:
        raise FileError(
            f"{marker.location} names groups of {group_size}; rotated are groups of up to "
            f"{MAX_EXACT_GROUP_SIZE} that divide its {channels} channels: the file is damaged"
        )
    return TransformInfo(marker.fields["outlier"], group_size, marker.is_sylvester())


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


def find_transform(
    evidence: LayerEvidence,
    granularity: Granularity,
    columns: int,
    *,
    assume_rotated: bool,
    sdnq: SdnqMethod | None,
) -> TransformInfo:
    """What was done to an INT8 weight, by what the file says and by what is known of its maker.

    Args:
        evidence: what the file says about the layer.
        granularity: of the weight.
        columns: K of the weight.
        assume_rotated: no INT8 layer of the file has a marker, and the user says that its rows are rotated.
        sdnq: how SDNQ made the weight, where it did.

    Raises:
        FileError: marker and tensors that contradict each other, or a matrix that is not a Hadamard matrix.
    """
    transform = parse_transform(evidence)  # also for SDNQ: it refuses contradictions
    if sdnq is not None:
        transform = make_sdnq_transform(sdnq, columns)
    elif assume_rotated and granularity.name == "row" and not is_transformed_by_tensors(evidence.part_keys):
        transform = assume_rotation(transform, columns)
    if quip.is_transformed(evidence.part_keys):
        return replace(transform, method="quip")
    return transform


def parse_transform(evidence: LayerEvidence) -> TransformInfo:
    """What was done to an INT8 weight, by its marker or by the INT8-Toolkit's tensors; QuIP is left out.

    Raises:
        FileError: marker and tensors that contradict each other, or a matrix that is not a Hadamard matrix.
    """
    marker = evidence.marker
    if marker is not None and marker.format_name == INT8RUN_FORMAT:
        return parse_int8run_transform(evidence, marker)

    group_size, is_sylvester = 0, False
    if marker is not None:
        group_size, is_sylvester = marker.rotation_group_size(), marker.is_sylvester()

    if TOOLKIT_PARTS & set(evidence.part_keys):
        if group_size or evidence.has_part("factor"):
            raise FileError(
                f"{evidence.weight.file}: {evidence.name} is rotated by its marker and by the INT8-Toolkit's "
                "tensors; they contradict each other"
            )
        return parse_toolkit_transform(evidence)
    if group_size:
        return make_rotation(group_size, is_sylvester=is_sylvester)
    if evidence.has_part("factor"):
        return TransformInfo("smoothquant")
    return TransformInfo()


def parse_int8run_transform(evidence: LayerEvidence, marker: Marker) -> TransformInfo:
    """What int8run's own marker says.

    Raises:
        FileError: a factor beside the weight that the marker does not name, or the other way round; or the
            INT8-Toolkit's tensors.
    """
    factor_agrees = marker.fields["factor"] == evidence.has_part("factor")
    if not factor_agrees or TOOLKIT_PARTS & set(evidence.part_keys):
        raise FileError(
            f"{marker.location} and the tensors of {evidence.name} contradict each other in their factors; "
            "the file is damaged"
        )
    return TransformInfo(
        method=marker.fields["outlier"],
        group_size=marker.rotation_group_size(),
        is_sylvester=marker.is_sylvester(),
        is_centered=marker.fields["centered"],
    )


def parse_toolkit_transform(evidence: LayerEvidence) -> TransformInfo:
    """What the INT8-Toolkit did: the matrix itself, and the factors of HadaNorm, stand beside the weight."""
    rotation = TransformInfo()
    if evidence.has_part("matrix"):
        rotation = identify_hadamard(evidence)
    if evidence.has_part("sigma"):
        return replace(rotation, method="hadanorm", is_centered=True)
    return rotation


def identify_hadamard(evidence: LayerEvidence) -> TransformInfo:
    """Find out which Hadamard matrix stands beside a weight.

    Raises:
        FileError: it is neither Sylvester's nor a regular one.
    """
    info = evidence.get_part("matrix")
    is_square = len(info.shape) == 2 and info.shape[0] == info.shape[1]
    size = info.shape[0] if is_square else 0
    if is_power_of_2(size) and 2 <= size <= MAX_EXACT_GROUP_SIZE and info.dtype in FLOATS:
        matrix = evidence.read_part("matrix")  # [size, size]
        tolerance = 0.01 / size**0.5  # 1 % of an entry, which half precision keeps
        if torch.allclose(matrix, get_hadamard(size, is_sylvester=True), atol=tolerance):
            return make_rotation(size, is_sylvester=True)
        has_regular = is_power_of_4(size)
        if has_regular and torch.allclose(matrix, get_hadamard(size, is_sylvester=False), atol=tolerance):
            return make_rotation(size, is_sylvester=False)
    raise FileError(
        f"{info.file}: {info.key} {info.dtype} {list(info.shape)} is not a Hadamard matrix by Sylvester or a "
        "regular one"
    )


def make_sdnq_transform(sdnq: SdnqMethod, columns: int) -> TransformInfo:
    """How SDNQ rotated a weight of so many columns."""
    group_size = sdnq.get_group_size(columns)
    if not group_size:
        return TransformInfo()
    return make_rotation(group_size, is_sylvester=sdnq.is_sylvester(columns))


def make_rotation(group_size: int, *, is_sylvester: bool) -> TransformInfo:
    """A rotation alone, by the name of the method that does it: Sylvester's matrix is QuaRot's."""
    method = "quarot" if is_sylvester else "convrot"
    return TransformInfo(method, group_size, is_sylvester)


def assume_rotation(transform: TransformInfo, columns: int) -> TransformInfo:
    """The rotation that an `int8_convrot` file leaves out, if a usual group size divides the columns."""
    for group_size in USUAL_GROUP_SIZES:
        if columns % group_size == 0:
            return replace(transform, method="convrot", group_size=group_size)
    return transform


def is_transformed_by_tensors(part_keys: Mapping[str, str]) -> bool:
    """Whether tensors beside a weight say how it was transformed, so that it needs no marker.

    Args:
        part_keys: what for -> key, of the tensors beside the weight.
    """
    return quip.is_transformed(part_keys) or bool(TOOLKIT_PARTS & set(part_keys))


# -- whether it fits -------------------------------------------------------------------------------


def check_transform(
    evidence: LayerEvidence, transform: TransformInfo, granularity: Granularity, columns: int
) -> None:
    """Check that a transform fits its weight, and that QuIP's stands alone.

    Args:
        evidence: what the file says about the layer.
        transform: what was done to the weight.
        granularity: of the weight.
        columns: K of the weight.

    Raises:
        FileError: a group size that does not divide K; QuIP's tensors beside another transform, or in a
            weight stored as [K, N]; QuIP's tensors that do not fit.
    """
    where = f"{evidence.weight.file}: {evidence.name}"
    group_size = transform.group_size
    if group_size and columns % group_size:
        raise FileError(
            f"{where} is rotated in groups of {group_size}, which do not divide its {columns} inputs; "
            "the file is damaged"
        )
    if not quip.is_transformed(evidence.part_keys):
        return
    has_factor = evidence.has_part("factor") or evidence.has_part("sigma")
    if group_size or has_factor or granularity.name == "transposed":
        raise FileError(
            f"{where} is transformed by QuIP and is rotated, scaled or stored transposed too; "
            "int8run does not know such a format"
        )
    quip.check_quip(evidence)


def check_factors(evidence: LayerEvidence, columns: int) -> None:
    """Raise FileError unless the factors of the columns, float [K], are finite and above 0."""
    for part in ("factor", "sigma"):
        if evidence.has_part(part):
            check_positive(evidence.files, evidence.part_keys[part], (columns,))


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
