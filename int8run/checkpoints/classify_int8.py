"""Find out what one INT8 weight of a checkpoint is: which numbers share a scale, and how it was transformed.

Called by `classify.py`. ComfyUI's markers, int8run's own, the INT8-Toolkit's tensors and QuIP's say how a
weight was transformed before it was rounded; two of them on one weight contradict each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from int8run.checkpoints import quip
from int8run.checkpoints.format_names import name_granularity, name_int8_format
from int8run.checkpoints.granularity import Granularity, check_positive, read_granularity
from int8run.checkpoints.header import FLOATS
from int8run.checkpoints.layer import INT8, MAX_EXACT_GROUP_SIZE, CheckpointLayer, get_hadamard
from int8run.checkpoints.quant_metadata import INT8RUN_FORMAT, Marker, is_power_of_4
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.checkpoints.sdnq import SdnqMethod
from int8run.errors import FileError
from int8run.outlier.base import NONE

# the INT8-Toolkit describes a rotation by these and not by a marker
TOOLKIT_PARTS = {"matrix", "sigma"}
# of a rotation that a file does not describe: the first that divides K
USUAL_GROUP_SIZES = (256, 64, 16)


@dataclass(frozen=True)
class TransformInfo:
    """What was done to an INT8 weight before it was rounded; its factors are tensors of the file."""

    method: str = NONE
    group_size: int = 0  # columns that were rotated together; 0: none
    is_sylvester: bool = False
    is_centered: bool = False

    @property
    def label(self) -> str:
        """Method and group size, for people."""
        return f"{self.method} {self.group_size}" if self.group_size else self.method


def parse_int8_layer(
    files: TensorFiles,
    info: TensorInfo,
    *,
    name: str,
    keys: Mapping[str, str],
    marker: Marker | None,
    assume_rotated: bool,
    sdnq: SdnqMethod | None = None,
) -> CheckpointLayer:
    """An INT8 weight: which numbers share a scale, and what was done to it before it was rounded.

    Args:
        files: the checkpoint.
        info: of the weight.
        name: of the layer.
        keys: what for -> key, of the tensors beside the weight.
        marker: of the layer, if it has one.
        assume_rotated: whether a weight with a scale for each row is rotated where it does not say so.
        sdnq: how SDNQ made the weight, where it did.

    Raises:
        FileError: a weight that cannot be read.
    """
    check_int8_weight(info, name, keys)
    granularity = read_granularity(files, info, keys["scale"], marker, may_be_transposed=sdnq is not None)
    rows, columns = info.shape[::-1] if granularity.name == "transposed" else info.shape
    transform = parse_transform(files, info, name=name, keys=keys, marker=marker)
    if sdnq is not None:
        transform = make_sdnq_transform(sdnq, columns)
    elif assume_rotated and granularity.name == "row" and not is_transformed_by_tensors(keys):
        transform = assume_rotation(columns, transform)
    check_transform(info, name, keys, columns, granularity, transform)
    if quip.is_transformed(keys):
        quip.check_quip(files, keys, info)
        transform = replace(transform, method="quip")
    for part in ("factor", "sigma"):
        if part in keys:
            check_positive(files, keys[part], (columns,))

    labels = [marker.format_name if marker and marker.format_name else "int8", str(granularity)]
    if transform.method != NONE:
        labels.append(transform.label)
    has_name = not (transform.is_sylvester or transform.is_centered or quip.is_transformed(keys))
    known_granularity = name_granularity(granularity.name, rows, columns, marker)
    return CheckpointLayer(
        name=name,
        storage_dtype=INT8,
        shape=info.shape,
        rows=rows,
        columns=columns,
        label=", ".join(labels),
        granularity=granularity.name,
        block_size=granularity.block_size,
        format_name=name_int8_format(known_granularity, transform.group_size) if has_name else "",
        part_keys=keys,
        outlier_method=transform.method,
        outlier_settings=read_settings(marker, transform.group_size),
        rotation_group_size=transform.group_size,
        is_sylvester=transform.is_sylvester,
        is_centered=transform.is_centered,
    )


def check_int8_weight(info: TensorInfo, name: str, keys: Mapping[str, str]) -> None:
    """Raise FileError unless an INT8 weight is a matrix and has a scale."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise FileError(
            f"{info.file}: {info.key} is I8 {list(info.shape)}; int8run reads int8 weights [N, K]"
        )
    if "scale" not in keys:
        raise FileError(
            f"{info.file}: {name} is INT8 and has no weight_scale, so its numbers mean nothing; "
            "the file is incomplete, download it again"
        )


def parse_transform(
    files: TensorFiles, info: TensorInfo, *, name: str, keys: Mapping[str, str], marker: Marker | None
) -> TransformInfo:
    """What was done to an INT8 weight, by its marker or by the INT8-Toolkit's tensors; QuIP is left out.

    Raises:
        FileError: marker and tensors that contradict each other, or a matrix that is not a Hadamard matrix.
    """
    if marker is not None and marker.format_name == INT8RUN_FORMAT:
        return parse_int8run_transform(name, keys, marker)
    group_size = 0 if marker is None else marker.rotation_group_size()
    is_sylvester = marker is not None and marker.is_sylvester()
    if TOOLKIT_PARTS & set(keys):
        if group_size or "factor" in keys:
            raise FileError(
                f"{info.file}: {name} is rotated by its marker and by the INT8-Toolkit's tensors; "
                "they contradict each other"
            )
        return parse_toolkit_transform(files, keys)
    if group_size:
        return TransformInfo("quarot" if is_sylvester else "convrot", group_size, is_sylvester)
    return TransformInfo("smoothquant" if "factor" in keys else NONE)


def parse_int8run_transform(name: str, keys: Mapping[str, str], marker: Marker) -> TransformInfo:
    """What int8run's own marker says."""
    if marker.fields["factor"] != ("factor" in keys) or TOOLKIT_PARTS & set(keys):
        raise FileError(
            f"{marker.location} and the tensors of {name} contradict each other in their factors; the file "
            "is damaged"
        )
    return TransformInfo(
        method=marker.fields["outlier"],
        group_size=marker.rotation_group_size(),
        is_sylvester=marker.is_sylvester(),
        is_centered=marker.fields["centered"],
    )


def parse_toolkit_transform(files: TensorFiles, keys: Mapping[str, str]) -> TransformInfo:
    """What the INT8-Toolkit did: the matrix itself, and the factors of HadaNorm, stand beside the weight."""
    group_size, is_sylvester = identify_hadamard(files, keys["matrix"]) if "matrix" in keys else (0, False)
    if "sigma" in keys:
        return TransformInfo("hadanorm", group_size, is_sylvester, is_centered=True)
    return TransformInfo("quarot" if is_sylvester else "convrot", group_size, is_sylvester)


def identify_hadamard(files: TensorFiles, key: str) -> tuple[int, bool]:
    """Find out which Hadamard matrix a file holds.

    Returns:
        Its size, and whether it is Sylvester's.

    Raises:
        FileError: it is neither Sylvester's nor a regular one.
    """
    info = files[key]
    is_square = len(info.shape) == 2 and info.shape[0] == info.shape[1]
    size = info.shape[0] if is_square else 0
    is_power_of_2 = 2 <= size <= MAX_EXACT_GROUP_SIZE and size & (size - 1) == 0
    if is_power_of_2 and info.dtype in FLOATS:
        matrix = files.read(key).float()
        tolerance = 0.01 / size**0.5  # half precision is good enough
        for is_sylvester in (True, False):
            exists = is_sylvester or is_power_of_4(size)
            if exists and torch.allclose(matrix, get_hadamard(size, is_sylvester), atol=tolerance):
                return size, is_sylvester
    raise FileError(
        f"{info.file}: {key} {info.dtype} {list(info.shape)} is not a Hadamard matrix by Sylvester or a "
        "regular one"
    )


def is_transformed_by_tensors(keys: Mapping[str, str]) -> bool:
    """Whether tensors beside a weight say how it was transformed, so that it needs no marker."""
    return quip.is_transformed(keys) or bool(TOOLKIT_PARTS & set(keys))


def make_sdnq_transform(sdnq: SdnqMethod, columns: int) -> TransformInfo:
    """How SDNQ rotated a weight of so many columns."""
    group_size, is_sylvester = sdnq.get_group_size(columns), sdnq.is_sylvester(columns)
    if not group_size:
        return TransformInfo()
    return TransformInfo("quarot" if is_sylvester else "convrot", group_size, is_sylvester)


def assume_rotation(columns: int, transform: TransformInfo) -> TransformInfo:
    """The rotation that an `int8_convrot` file leaves out, if a usual group size divides the columns."""
    for group_size in USUAL_GROUP_SIZES:
        if columns % group_size == 0:
            return replace(transform, method="convrot", group_size=group_size)
    return transform


def check_transform(
    info: TensorInfo,
    name: str,
    keys: Mapping[str, str],
    columns: int,
    granularity: Granularity,
    transform: TransformInfo,
) -> None:
    """Raise FileError for a rotation that does not fit, or one beside QuIP's own transform."""
    group_size = transform.group_size
    if group_size and columns % group_size:
        raise FileError(
            f"{info.file}: {name} is rotated in groups of {group_size}, which do not divide its {columns} "
            "inputs; "
            "the file is damaged"
        )
    if not quip.is_transformed(keys):
        return
    if group_size or {"factor", "sigma"} & set(keys) or granularity.name == "transposed":
        raise FileError(
            f"{info.file}: {name} is transformed by QuIP and in another way too; int8run does not know such "
            "a format"
        )


def read_settings(marker: Marker | None, group_size: int) -> Mapping[str, float]:
    """The settings of the outlier method, as far as the file says."""
    if marker is not None and marker.format_name == INT8RUN_FORMAT:
        return marker.fields["settings"]
    return {"group_size": group_size} if group_size else {}
