"""ComfyUI's `asym_w4a8_int8`: weights of 4 and 6 bits as tensors of a safetensors file, by its names.

Beside the codes, `weight`, stand `weight_s_rel` and `weight_s_channel`, where levels come from a table
`weight_codebook`, in files of other programs `weight_correction`, and a marker. The format is always rotated
by regular matrices. `export` and the tasks that quantize files write by this module; `detect.py` reads the
result back.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.checkpoints.comfy_int8 import CONVROT, FACTOR, sibling_key
from int8run.checkpoints.grouped import (
    CODEBOOK,
    CODEBOOK_LEVELS,
    CORRECTION,
    GROUP_SCALE,
    PART_SUFFIXES,
    ROW_SCALE,
)
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.quant_metadata import GROUPED_FORMAT, MARKER
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import TensorEntry
from int8run.kernels.grouped_weight.reference import count_row_bytes
from int8run.outlier.base import OutlierTransform
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.grouped_weight import GROUPED_BITS, GroupedWeight

# safetensors' names of the dtypes that scales and corrections may have
DTYPE_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


@dataclass(frozen=True)
class CodeTensors:
    """Which tensors a weight in codes is, besides its rows.

    Args:
        bits: of a code.
        group_size: columns that share a scale.
        scale_dtype: of the scales of groups, by safetensors' name.
        has_codebook: whether levels come from a table.
        correction_dtype: of the corrections, by safetensors' name; empty: there are none.
    """

    bits: int
    group_size: int
    scale_dtype: str = "F8_E4M3"
    has_codebook: bool = False
    correction_dtype: str = ""


def describe_made_codes(layout: GroupLayout) -> CodeTensors:
    """The tensors of a weight that int8run rounds itself: levels of 4 bits come from a table."""
    return CodeTensors(layout.bits, layout.group_size, has_codebook=layout.bits == 4)


def describe_stored_codes(files: TensorFiles, layer: CheckpointLayer) -> CodeTensors:
    """The tensors of a weight that a file has already, which are copied as they are.

    Args:
        files: the checkpoint.
        layer: of codes.
    """
    correction_dtype = ""
    if CORRECTION in layer.part_keys:
        correction_dtype = files[layer.part_keys[CORRECTION]].dtype
    return CodeTensors(
        bits=GROUPED_BITS[layer.storage_dtype],
        group_size=layer.block_size,
        scale_dtype=files[layer.part_keys[GROUP_SCALE]].dtype,
        has_codebook=CODEBOOK in layer.part_keys,
        correction_dtype=correction_dtype,
    )


def describe_codes(weight: GroupedWeight) -> CodeTensors:
    """The tensors of a weight that is in memory."""
    correction_dtype = "" if weight.correction is None else DTYPE_NAMES[weight.correction.dtype]
    return CodeTensors(
        bits=weight.bits,
        group_size=weight.group_size,
        scale_dtype=DTYPE_NAMES[weight.group_scale.dtype],
        has_codebook=weight.codebook is not None,
        correction_dtype=correction_dtype,
    )


def find_marker_obstacle(transform: OutlierTransform) -> str | None:
    """Why the format cannot describe a transform; None when it can."""
    is_regular = transform.method == CONVROT and transform.group_size > 0 and not transform.sylvester
    if is_regular and not transform.centered:
        return None
    return (
        f"{GROUPED_FORMAT}, the format of 4 and 6 bits, is always rotated by outlier=convrot, not "
        f"{transform.label}"
    )


def build_grouped_marker(group_size: int, transform: OutlierTransform) -> dict[str, object]:
    """What a reader must know about one layer besides its tensors.

    Args:
        group_size: columns that share a scale.
        transform: what was done to the weight before it was rounded.

    Raises:
        ValueError: for a transform that the format cannot describe.
    """
    obstacle = find_marker_obstacle(transform)
    if obstacle is not None:
        raise ValueError(obstacle)
    return {
        "format": GROUPED_FORMAT,
        "group_size": group_size,
        "convrot": True,
        "convrot_groupsize": transform.group_size,
    }


def encode_grouped_marker(group_size: int, transform: OutlierTransform) -> bytes:
    """The marker as the file holds it: JSON, as a row of bytes. Arguments as of `build_grouped_marker`."""
    return json.dumps(build_grouped_marker(group_size, transform)).encode()


def plan_grouped_entries(
    key: str, shape: tuple[int, int], codes: CodeTensors, transform: OutlierTransform
) -> list[TensorEntry]:
    """List the tensors that a weight in codes adds to a file, before any of its numbers is known.

    Args:
        key: of the weight, `L.weight`.
        shape: N and K of the weight.
        codes: which tensors it is.
        transform: what was done to the weight before it was rounded.

    Raises:
        ValueError: as `encode_grouped_marker`.
    """
    rows, columns = shape
    groups = columns // codes.group_size
    marker = encode_grouped_marker(codes.group_size, transform)
    entries = [
        TensorEntry(key, "I8", (rows, count_row_bytes(columns, codes.bits))),
        TensorEntry(part_key(key, GROUP_SCALE), codes.scale_dtype, (rows, groups)),
        TensorEntry(part_key(key, ROW_SCALE), "F32", (rows,)),
    ]
    if codes.has_codebook:
        entries.append(TensorEntry(part_key(key, CODEBOOK), "F32", (CODEBOOK_LEVELS,)))
    if codes.correction_dtype:
        entries.append(TensorEntry(part_key(key, CORRECTION), codes.correction_dtype, (groups, rows)))
    entries.append(TensorEntry(sibling_key(key, MARKER), "U8", (len(marker),)))
    if transform.factor is not None:
        entries.append(TensorEntry(sibling_key(key, FACTOR), "F32", (columns,)))
    return entries


def part_key(key: str, part: str) -> str:
    """The key of a tensor beside a weight in codes. part: of `grouped.PART_SUFFIXES`."""
    return sibling_key(key, PART_SUFFIXES[part])


def iterate_code_rows(key: str, weight: GroupedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors that have a row for each output row, of some rows of a weight, as the file holds them."""
    yield key, weight.codes.cpu().contiguous()
    yield part_key(key, GROUP_SCALE), weight.group_scale.cpu().contiguous()
    yield part_key(key, ROW_SCALE), weight.scale.float().cpu().flatten()


def collect_grouped_tensors(
    key: str, weight: GroupedWeight, transform: OutlierTransform
) -> dict[str, Tensor | bytes]:
    """All tensors of a weight in codes, by their keys; arguments as of `iterate_code_tables`."""
    tables = iterate_code_tables(key, weight.codebook, weight.correction, weight.group_size, transform)
    return {**dict(iterate_code_rows(key, weight)), **dict(tables)}


def iterate_code_tables(
    key: str, codebook: Tensor | None, correction: Tensor | None, group_size: int, transform: OutlierTransform
) -> Iterator[tuple[str, Tensor | bytes]]:
    """What stands once beside a weight in codes: levels, corrections, the marker, factors of columns.

    Args:
        key: of the weight.
        codebook: float32 [16], or None.
        correction: [K / g, N] of the whole weight, or None.
        group_size: columns that share a scale.
        transform: what was done to the weight before it was rounded.

    Raises:
        ValueError: as `encode_grouped_marker`.
    """
    if codebook is not None:
        yield part_key(key, CODEBOOK), codebook.float().cpu().contiguous()
    if correction is not None:
        yield part_key(key, CORRECTION), correction.cpu().contiguous()
    yield sibling_key(key, MARKER), encode_grouped_marker(group_size, transform)
    if transform.factor is not None:
        yield sibling_key(key, FACTOR), transform.factor.float().cpu().contiguous()
