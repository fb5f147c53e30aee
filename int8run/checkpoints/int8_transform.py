"""What was done to an INT8 weight before it was rounded, as the files of each program say it.

`classify_int8` asks for it once it knows that a layer is INT8. Nothing is read here but markers and the
names and shapes of tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from int8run.checkpoints import quip
from int8run.checkpoints.granularity import Granularity, check_positive
from int8run.checkpoints.header import FLOATS
from int8run.checkpoints.layer import MAX_EXACT_GROUP_SIZE, get_hadamard
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.powers import is_power_of_2, is_power_of_4
from int8run.checkpoints.quant_metadata import INT8RUN_FORMAT, Marker
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
