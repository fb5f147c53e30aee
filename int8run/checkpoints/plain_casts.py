"""Tell a plain cast to fp8 from scaled numbers whose scale was lost, by the numbers alone.

Both look the same in a header: fp8 weights without a scale. Programs that write scales divide by the largest
number of a weight, row or block first, so that the stored numbers reach the end of what fp8 holds (448, code
0x7E, in e4m3). Casts of real weights stop far below, at numbers such as 0.3 or 12. `detect.py` calls
`check_casts`; weights are read in pieces, so that a file may be larger than the memory.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from int8run.checkpoints.format_names import FORMAT_NAMES
from int8run.checkpoints.layer import FP8, CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
SIGN_BIT = 0x80  # of a code
# the largest code that is a number, without its sign
TOP_CODES = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}
# a scaled weight reaches 448 (57344 in e5m2), or half of it where scales are powers of 2. No weight of a
# layer comes near; only tables of words have such numbers, T5's for one
LARGEST_CAST = 224.0
TABLE_NAMES = ("shared", "embed_tokens", "token_embedding", "word_embeddings", "wte")
PIECE_BYTES = 2**24


def check_casts(
    files: TensorFiles, layers: Mapping[str, CheckpointLayer], quant_format: str
) -> dict[str, CheckpointLayer]:
    """Check that fp8 weights without a scale are casts, and find the largest number of each.

    A scale that is 1 everywhere says no more than none.

    Args:
        files: the checkpoint.
        layers: by name.
        quant_format: that the user declares; that of a cast says that such weights are casts, whatever their
            numbers are.

    Returns:
        The layers that were looked at, with `largest` filled in.

    Raises:
        FileError: a weight that is no cast by its numbers: its scale was lost.
    """
    unscaled = [layer for layer in layers.values() if is_unscaled(files, layer)]
    if not unscaled:
        return {}
    checked = {layer.name: replace(layer, largest=find_largest(files, layer.key)) for layer in unscaled}
    has_scales = any(layer.storage_dtype == FP8 and layer.granularity for layer in layers.values())
    no_casts = [layer for layer in checked.values() if not is_cast(files, layer, has_scales=has_scales)]
    if not no_casts:
        return checked
    if all(quant_format == FORMAT_NAMES.get((files[layer.key].dtype, "")) for layer in no_casts):
        log.warning(
            "%s: %s no scale and numbers up to %g (first: %s), as scaled ones have; %s says that these are "
            "casts, so they are read as they are",
            files.path,
            count_noun(len(no_casts), "fp8 weight", "have"),
            no_casts[0].largest,
            no_casts[0].name,
            quant_format,
        )
        return checked
    raise make_lost_scale_error(files, no_casts, n_casts=len(checked) - len(no_casts))


def is_unscaled(files: TensorFiles, layer: CheckpointLayer) -> bool:
    """Whether an fp8 matrix, or weight of a convolution, has no scale or one that says nothing."""
    if layer.storage_dtype != FP8 or len(layer.shape) < 2 or 0 in layer.shape:
        return False
    if not layer.granularity:
        return True
    return bool((files.read(layer.part_keys["scale"]).float() == 1).all())


def find_largest(files: TensorFiles, key: str) -> float:
    """The largest magnitude of an fp8 tensor; NaN and infinity, which other checks find, do not count."""
    info = files[key]
    top_code = TOP_CODES[info.dtype]
    row_bytes = max(prod(info.shape[1:]), 1)
    rows_per_piece = max(PIECE_BYTES // row_bytes, 1)
    buffer = torch.empty(min(rows_per_piece * row_bytes, info.nbytes), dtype=torch.uint8)
    largest_code = 0
    for start in range(0, info.shape[0], rows_per_piece):
        rows = slice(start, min(start + rows_per_piece, info.shape[0]))
        codes = files.read_into(key, rows, buffer).view(torch.uint8)
        largest_code = max(largest_code, find_largest_code(codes, top_code))
        if largest_code == top_code:
            break
    code = torch.tensor([largest_code], dtype=torch.uint8)
    dtype = torch.float8_e4m3fn if info.dtype == "F8_E4M3" else torch.float8_e5m2
    return float(code.view(dtype).float())


def find_largest_code(codes: Tensor, top_code: int) -> int:
    """The largest code, without its sign, that is a number.

    Args:
        codes: uint8, at least one; the highest bit is the sign.
        top_code: the largest that is a number.
    """
    largest_positive = int(codes.view(torch.int8).max())  # codes with a sign are below 0 there
    largest_negative = int(codes.max()) - SIGN_BIT
    largest = max(largest_positive, largest_negative, 0)
    if largest <= top_code:
        return largest
    numbers = codes & (SIGN_BIT - 1)
    return int(numbers.where(numbers <= top_code, 0).max())


def is_cast(files: TensorFiles, layer: CheckpointLayer, *, has_scales: bool) -> bool:
    """Whether the numbers of a weight can be those of a cast.

    Args:
        files: the checkpoint.
        layer: with its largest number.
        has_scales: whether other fp8 weights of the file have scales.
    """
    assert layer.largest is not None
    if layer.largest <= LARGEST_CAST:
        return True
    is_table = layer.name.rpartition(".")[2] in TABLE_NAMES
    return is_table and not has_scales and files[layer.key].dtype == "F8_E4M3"


def make_lost_scale_error(
    files: TensorFiles, layers: Sequence[CheckpointLayer], *, n_casts: int
) -> FileError:
    """The error for fp8 weights that are no casts and have no scale.

    Args:
        files: the checkpoint.
        layers: these weights.
        n_casts: other weights without a scale, which are casts.
    """
    first = layers[0]
    scale = "a scale of 1" if first.granularity else "no scale"
    beside = f"; {count_noun(n_casts, 'other weight')} may be one" if n_casts else ""
    word = FORMAT_NAMES[files[first.key].dtype, ""]
    return FileError(
        f"{files[first.key].file}: {count_noun(len(layers), 'fp8 weight', 'have')} {scale} and numbers "
        f"that no plain cast has{beside} (first: {first.key}, which reaches {first.largest:g}; casts of real "
        f"weights stop far below {LARGEST_CAST:g}): their scales were lost, and without them the numbers "
        "mean nothing. "
        "Download the file again, or take it as its maker published it; if it is a cast all the same, "
        f"model.quant_format={word} says so (clip={word} for a text encoder)"
    )
