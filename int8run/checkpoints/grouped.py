"""Weights of 4 and 6 bits with a scale for each group of columns (`asym_w4a8_int8`), checked and read.

`classify.py` checks layers with this module, `layer.py` reads their numbers; what they mean stands in
`kernels/grouped_weight`. A row of K codes has K / 2 bytes with 4 bits, 3 K / 4 with 6: nothing else says how
many bits there are. The rules are those of comfy-kitchen 0.2.40, which writes and reads such files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.checkpoints.granularity import check_positive
from int8run.checkpoints.header import FLOATS
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.powers import is_power_of_4
from int8run.checkpoints.quant_metadata import GROUPED_FORMAT, Marker
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.quant.grouped_weight import GROUPED_BITS, GroupedWeight, find_group_obstacle

# what a tensor beside `L.weight` is for -> its name, `L.` in front
GROUP_SCALE, ROW_SCALE, CODEBOOK, CORRECTION = "group_scale", "row_scale", "codebook", "correction"
PART_SUFFIXES = {
    GROUP_SCALE: "weight_s_rel",
    ROW_SCALE: "weight_s_channel",
    CODEBOOK: "weight_codebook",
    CORRECTION: "weight_correction",
}
REQUIRED_PARTS = (GROUP_SCALE, ROW_SCALE)
GROUP_SCALE_DTYPES = ("F8_E4M3", "F32")
PART_DTYPES = {
    GROUP_SCALE: GROUP_SCALE_DTYPES,
    ROW_SCALE: FLOATS,
    CODEBOOK: FLOATS,
    CORRECTION: FLOATS,
}
DEFAULT_GROUP_SIZE = 16  # of columns that share a scale, where a marker does not say it
CODEBOOK_LEVELS = 16
E4M3_NAN = 0x7F  # the byte; those of negative numbers are larger


@dataclass(frozen=True)
class GroupedLayout:
    """The sizes of a weight in codes.

    Args:
        rows: N.
        columns: K.
        group_size: columns that share a scale.
        rotation_group_size: columns that were rotated together, by a regular matrix.
    """

    rows: int
    columns: int
    group_size: int
    rotation_group_size: int


def is_grouped(evidence: LayerEvidence) -> bool:
    """Whether an int8 tensor holds codes: its marker says so, or what stands beside it."""
    is_named = evidence.marker is not None and evidence.marker.format_name == GROUPED_FORMAT
    return is_named or any(evidence.has_part(part) for part in PART_SUFFIXES)


def find_storage_dtype(evidence: LayerEvidence) -> str:
    """`w4a8` or `w6a8`, by the width of a row of codes.

    Args:
        evidence: what the file says about a layer of codes.

    Raises:
        FileError: a marker or a tensor that is missing or contradicts the others, or rows of another width.
    """
    marker = get_marker(evidence)
    check_required_parts(evidence)
    weight, scale = evidence.weight, evidence.get_part(GROUP_SCALE)
    check_matrix(weight, "codes of 4 or 6 bits")
    check_matrix(scale, "a scale for each group of each row")
    if scale.shape[0] != weight.shape[0]:
        raise FileError(
            f"{scale.file}: {scale.key} has {scale.shape[0]} rows and {weight.key} {weight.shape[0]}; "
            "the file is damaged"
        )
    group_size = get_group_size(marker)
    columns, row_bytes = scale.shape[1] * group_size, weight.shape[1]
    for storage_dtype, bits in GROUPED_BITS.items():
        if columns * bits == row_bytes * 8:
            return storage_dtype
    raise FileError(
        f"{weight.file}: {weight.key} has rows of {row_bytes} bytes, and {scale.key} {list(scale.shape)} "
        f"with groups of {group_size} is for {columns} columns, whose codes have {columns // 2} bytes "
        f"(4 bits) or {columns * 3 // 4} (6 bits); the weight is cut off, or the marker names another "
        "group size"
    )


def get_marker(evidence: LayerEvidence) -> Marker:
    """The marker of a layer of codes.

    Raises:
        FileError: there is none, or it says what such a layer cannot be.
    """
    weight, marker = evidence.weight, evidence.marker
    key = next((evidence.part_keys[part] for part in PART_SUFFIXES if evidence.has_part(part)), weight.key)
    if marker is None:
        raise FileError(
            f"{weight.file}: {key} belongs to {GROUPED_FORMAT}, and {evidence.name} has no comfy_quant "
            "marker, which says its group size and rotation; the file is incomplete, download it again"
        )
    if marker.format_name != GROUPED_FORMAT:
        raise FileError(
            f"{marker.location} names the format {marker.format_name!r}, and {key} belongs to "
            f"{GROUPED_FORMAT}; they contradict each other, so the weight cannot be read"
        )
    if marker.fields.get("convrot") is False:
        raise FileError(
            f"{marker.location} says that a weight in {GROUPED_FORMAT} is not rotated; such weights always "
            "are, so it is unclear what its numbers mean"
        )
    return marker


def get_group_size(marker: Marker) -> int:
    """Columns that share a scale."""
    return DEFAULT_GROUP_SIZE if marker.block_size is None else marker.block_size


def check_required_parts(evidence: LayerEvidence) -> None:
    """Raise FileError for scales that a layer of codes needs and that are not there."""
    for part in REQUIRED_PARTS:
        if not evidence.has_part(part):
            raise FileError(
                f"{evidence.weight.file}: {evidence.name} is {GROUPED_FORMAT} and has no "
                f"{PART_SUFFIXES[part]}, without which its codes mean nothing; the file is incomplete, "
                "download it again"
            )


def check_matrix(info: TensorInfo, what: str) -> None:
    """Raise FileError for a tensor that is not a matrix with numbers. what: it holds, for the message."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise FileError(
            f"{info.file}: {info.key} has the shape {list(info.shape)}; {what} are a matrix: the file is "
            "damaged"
        )


def check_grouped(evidence: LayerEvidence, storage_dtype: str) -> GroupedLayout:
    """Check a layer of codes and everything that stands beside it.

    Args:
        evidence: what the file says about the layer.
        storage_dtype: from `find_storage_dtype`.

    Returns:
        Its sizes.

    Raises:
        FileError: sizes that no kernel decodes, scales, levels or corrections that are not finite or have
            another shape, or a rotation that does not fit.
    """
    bits, marker = GROUPED_BITS[storage_dtype], get_marker(evidence)
    group_size = get_group_size(marker)
    rows, num_groups = evidence.get_part(GROUP_SCALE).shape
    layout = GroupedLayout(rows, num_groups * group_size, group_size, marker.rotation_group_size())
    obstacle = find_group_obstacle(layout.columns, bits=bits, group_size=group_size)
    if obstacle is not None:
        raise FileError(f"{marker.location} and the tensors of {evidence.name} make {obstacle}")
    check_rotation(marker, layout)
    check_group_scales(evidence)
    check_positive(evidence.files, evidence.part_keys[ROW_SCALE], (rows,))
    check_codebook(evidence, bits)
    check_correction(evidence, bits, (num_groups, rows))
    if evidence.has_part("factor"):
        check_positive(evidence.files, evidence.part_keys["factor"], (layout.columns,))
    return layout


def check_rotation(marker: Marker, layout: GroupedLayout) -> None:
    """Raise FileError for rotated groups that no regular matrix has, or that do not divide the columns."""
    size = layout.rotation_group_size
    if not is_power_of_4(size):
        raise FileError(
            f"{marker.location} names rotated groups of {size}; {GROUPED_FORMAT} is rotated by regular "
            "matrices, whose sizes are powers of 4"
        )
    if layout.columns % size:
        raise FileError(
            f"{marker.location} names rotated groups of {size}, which do not divide the {layout.columns} "
            "columns; the file is damaged"
        )


def check_group_scales(evidence: LayerEvidence) -> None:
    """Raise FileError for scales of groups that are NaN, infinite or negative; zero is allowed."""
    info = evidence.get_part(GROUP_SCALE)
    scale = evidence.files.read(info.key)
    # by their bytes, because they are an eighth of the weight: a number below NaN is positive
    if info.dtype == "F8_E4M3" and int(scale.view(torch.uint8).max()) < E4M3_NAN:
        return
    numbers = scale.float()
    is_valid = torch.isfinite(numbers) & (numbers >= 0)
    num_invalid = int((~is_valid).sum())
    if num_invalid:
        raise FileError(
            f"{info.file}: {num_invalid} of {scale.numel()} numbers of {info.key} are NaN, infinite or "
            "negative; the file is damaged"
        )


def check_codebook(evidence: LayerEvidence, bits: int) -> None:
    """Raise FileError for levels that are not 16 finite rising numbers, or beside codes of 6 bits."""
    info = evidence.find_part(CODEBOOK)
    if info is None:
        return
    check_belongs_to_four_bits(info, bits)
    if info.shape != (CODEBOOK_LEVELS,):
        raise FileError(
            f"{info.file}: {info.key} has the shape {list(info.shape)}; a codebook has {CODEBOOK_LEVELS} "
            "levels: the file is damaged"
        )
    levels = evidence.read_part(CODEBOOK)
    if not bool(torch.isfinite(levels).all()):
        raise FileError(f"{info.file}: {info.key} holds NaN or infinity; the file is damaged")
    if bool((levels.diff() < 0).any()):
        raise FileError(
            f"{info.file}: the levels of {info.key} do not rise; codebooks are sorted, so the file is damaged"
        )


def check_correction(evidence: LayerEvidence, bits: int, shape: tuple[int, int]) -> None:
    """Raise FileError for corrections of another shape, that are not finite, or beside codes of 6 bits.

    Args:
        evidence: what the file says about the layer.
        bits: of a code.
        shape: groups of a row, and rows.
    """
    info = evidence.find_part(CORRECTION)
    if info is None:
        return
    check_belongs_to_four_bits(info, bits)
    if info.shape != shape:
        raise FileError(
            f"{info.file}: {info.key} has the shape {list(info.shape)}, its weight needs {list(shape)}: one "
            "number for each group of each row; the file is damaged"
        )
    if not bool(torch.isfinite(evidence.read_part(CORRECTION)).all()):
        raise FileError(f"{info.file}: {info.key} holds NaN or infinity; the file is damaged")


def check_belongs_to_four_bits(info: TensorInfo, bits: int) -> None:
    """Raise FileError for a tensor beside codes of 6 bits, which are evenly spaced about zero."""
    if bits != 4:
        raise FileError(
            f"{info.file}: {info.key} belongs to codes of 4 bits, and the rows of its weight are as wide as "
            f"codes of {bits} bits; they contradict each other, so the weight cannot be read"
        )


def read_grouped_weight(
    files: TensorFiles, key: str, part_keys: Mapping[str, str], bits: int, rows: slice
) -> GroupedWeight:
    """Read some rows of a weight as it lies in the file.

    Args:
        files: the checkpoint.
        key: of the weight.
        part_keys: what for -> key, of the tensors beside the weight.
        bits: of a code.
        rows: from the first to the one after the last.
    """
    codebook = correction = None
    if CODEBOOK in part_keys:
        codebook = files.read(part_keys[CODEBOOK]).float()
    if CORRECTION in part_keys:
        correction = files.read(part_keys[CORRECTION])[:, rows].contiguous()
    return GroupedWeight(
        codes=files.read(key, rows),
        group_scale=files.read(part_keys[GROUP_SCALE], rows),
        scale=files.read(part_keys[ROW_SCALE], rows).float().reshape(-1, 1),
        bits=bits,
        codebook=codebook,
        correction=correction,
    )
