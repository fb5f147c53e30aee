"""Files that must be refused for their scales or their weight."""

from functools import partial

import numpy as np
from checkpoints.drafts.blocks import draft_blocks
from checkpoints.drafts.changes import (
    apply_change,
    draft_with_scales,
    drop_tensors,
    put_ones,
    put_zeros,
    replace_part,
    replace_scale,
)
from checkpoints.drafts.draft import LAYER, CheckpointDraft, K, Mistake, N
from checkpoints.drafts.floats import draft_plain_float
from checkpoints.drafts.fp8 import draft_fp8
from checkpoints.drafts.int8 import ROW, draft_int8, draft_rowwise


def list_lost_scales() -> dict[str, Mistake]:
    """fp8 of both kinds and of all granularities, its scales gone."""
    mistakes: dict[str, Mistake] = {}
    for dtype, word, largest in (("F8_E4M3", "float8_e4m3fn", 448), ("F8_E5M2", "float8_e5m2", 57344)):
        words = (
            rf"1 fp8 weight has no scale and numbers that no plain cast has \(first: blocks.0.q.weight, "
            rf"which reaches {largest}; .*their scales were lost.*model.quant_format={word}_cast"
        )
        for granularity, shape, block in (
            ("tensor", (), (1, 1)),
            ("row", (N,), (1, 1)),
            ("grid", (3, 16), (4, 4)),
            ("block3d", (N, 4, 1), (1, 16)),
        ):
            make = partial(draft_lost_scale, shape, granularity, dtype=dtype, block=block)
            mistakes[f"scale of unmarked {dtype} lost, {granularity}"] = make, words
    return mistakes


def draft_lost_scale(
    shape: tuple[int, ...], granularity: str, *, dtype: str, block: tuple[int, int]
) -> CheckpointDraft:
    return drop_tensors(draft_fp8(shape, granularity, dtype=dtype, block=block), "weight_scale")


SCALE_MISTAKES: dict[str, Mistake] = {
    # scales
    "no scale": (
        lambda: drop_tensors(draft_rowwise(), "weight_scale"),
        r"blocks.0.q is INT8 and has no weight_scale, so its numbers mean nothing",
    ),
    "scale alone": (
        lambda: drop_tensors(draft_rowwise(), "weight"),
        r"blocks.0.q.weight_scale belongs to no weight, blocks.0.q.weight is missing",
    ),
    "marker alone": (
        lambda: drop_tensors(draft_rowwise(), "weight", "weight_scale"),
        r"blocks.0.q.comfy_quant belongs to no weight",
    ),
    "scale of a legacy name alone": (
        lambda: drop_tensors(draft_fp8((), "tensor", name="scale_weight", legacy=2), "weight"),
        "scale_.* belongs to no weight",
    ),
    "one scale too few": (
        lambda: replace_scale(draft_rowwise(), N - 1, 1),
        (
            r"weight_scale has the shape \[11, 1\], which does not "
            r"fit a weight \[12, 64\]; scales are one number, \[N\]"
        ),
    ),
    "a scale for each column": (
        lambda: replace_scale(draft_rowwise(), K),
        r"has the shape \[64\], which does not fit a weight \[12, 64\]",
    ),
    "a scale for each number": (
        lambda: replace_scale(draft_rowwise(), N, K),
        r"has the shape \[12, 64\], which does not fit a weight",
    ),
    "blocks that do not divide": (
        lambda: replace_scale(draft_rowwise(), N, 7),
        r"has the shape \[12, 7\], which does not fit a weight",
    ),
    "blocks that are not square": (
        lambda: replace_scale(draft_rowwise(), 3, 8),
        r"has the shape \[3, 8\], which does not fit a weight",
    ),
    "3-D blocks that do not divide": (
        lambda: replace_scale(draft_rowwise(), N, 5, 1),
        r"has the shape \[12, 5, 1\], which does not fit",
    ),
    "3-D blocks of two": (
        lambda: replace_scale(draft_rowwise(), N, 4, 2),
        r"has the shape \[12, 4, 2\], which does not fit",
    ),
    "blocks of two possible sizes": (
        lambda: draft_int8((2, 2), "grid", weight=(192, 192), block=(96, 96)),
        r"has the shape \[2, 2\], which does not fit a weight .* with blocks of one known size",
    ),
    "transposed and square": (
        lambda: replace_scale(draft_int8((K, 1), "row", weight=(K, K)), 1, K),
        r"has the shape \[1, 64\], and blocks.0.q.weight is square: it may belong to the rows of a weight",
    ),
    "transposed and square, marked": (
        lambda: replace_scale(draft_int8((K, 1), "row", ROW, weight=(K, K)), 1, K),
        r"blocks.0.q.weight is square: it may belong to the rows",
    ),
    "transposed and marked": (
        lambda: replace_scale(draft_rowwise(), 1, K),
        r"is ComfyUI's, whose weights are \[out, in\], and blocks.0.q.weight_scale has the shape \[1, 64\]",
    ),
    "transposed fp8": (
        lambda: replace_scale(draft_fp8((), "tensor"), 1, K),
        r"has the shape \[1, 64\], which does not fit a weight \[12, 64\]",
    ),
    "no scales at all": (
        lambda: replace_scale(draft_rowwise(), 0),
        r"has the shape \[0\], which does not fit a weight",
    ),
    "fp8 scale": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight_scale", "F8_E4M3", N, 1),
        r"weight_scale is F8_E4M3, and blocks.0.q.weight is I8; its scales are F32",
    ),
    "whole scales": (
        lambda: replace_part(draft_rowwise(), "weight_scale", np.ones((N, 1)), dtype="I32"),
        "weight_scale is I32, and",
    ),
    "a scale of zero": (
        lambda: draft_with_scales(1, 0, 1),
        "4 of 12 numbers of blocks.0.q.weight_scale are not finite and above 0",
    ),
    "a negative scale": (
        lambda: draft_with_scales(1, -1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite and above 0",
    ),
    "a scale that is nan": (
        lambda: draft_with_scales(float("nan"), 1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "an infinite scale": (
        lambda: draft_with_scales(float("inf"), 1),
        "6 of 12 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "two scales": (
        lambda: apply_change(draft_rowwise(), lambda d: d.put_scale(f"{LAYER}.scale_weight", N, 1)),
        "has two scales, blocks.0.q.weight_scale and blocks.0.q.scale_weight",
    ),
    "a scale for a float": (
        lambda: replace_scale(draft_plain_float(), 1),
        "weight is F32 and has blocks.0.q.weight_scale, which is not 1; it is unclear whether",
    ),
    "an infinite scale for a float": (
        lambda: replace_part(draft_plain_float(), "weight_scale", float("inf")),
        "1 of 1 numbers of blocks.0.q.weight_scale are not finite",
    ),
    "fp8 scales lost": (
        lambda: put_zeros(draft_fp8(None, ""), "scaled_fp8", "F8_E4M3", 2),
        r"scaled_fp8 says that fp8 weights have scales, and none has one \(blocks.0.q\)",
    ),
    "row scales of fp8 lost": (
        lambda: draft_fp8(None, "", marker={"format": "float8_e4m3fn_rowwise"}),
        (
            "names the format 'float8_e4m3fn_rowwise', and blocks.0.q has no weight_scale, "
            "without which its numbers mean nothing; the file is incomplete, download it again"
        ),
    ),
    "scale of marked fp8 lost": (
        lambda: drop_tensors(draft_fp8((), "tensor", marker={"format": "float8_e4m3fn"}), "weight_scale"),
        "names the format 'float8_e4m3fn', and blocks.0.q has no weight_scale",
    ),
    "scale of marked fp8 lost, small numbers": (
        lambda: draft_fp8(None, "", marker={"format": "float8_e4m3fn"}),
        "names the format 'float8_e4m3fn', and blocks.0.q has no weight_scale",
    ),
    "scale of marked e5m2 lost": (
        lambda: draft_fp8(None, "", dtype="F8_E5M2", header={"format": "float8_e5m2"}),
        "names the format 'float8_e5m2', and blocks.0.q has no weight_scale",
    ),
    **list_lost_scales(),
    "scales of fp8 lost, 1 in their place": (
        lambda: put_ones(draft_fp8((N,), "row"), f"{LAYER}.weight_scale", N),
        "1 fp8 weight has a scale of 1 and numbers that no plain cast has",
    ),
    "scales of mxfp8 lost": (
        lambda: drop_tensors(draft_blocks("mxfp8", N, 64), "weight_scale"),
        "1 fp8 weight has no scale and numbers that no plain cast has",
    ),
    "block scales of fp8 lost": (
        lambda: draft_fp8(None, "", header={"format": "float8_e4m3fn_block3d"}),
        "names the format 'float8_e4m3fn_block3d', and blocks.0.q has no weight_scale",
    ),
    # weights
    "int8 of 3 dimensions": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight", "I8", 2, N, K),
        r"weight is I8 \[2, 12, 64\]; int8run reads int8 weights \[N, K\]",
    ),
    "int8 vector": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight", "I8", N),
        r"weight is I8 \[12\]; int8run reads int8 weights \[N, K\]",
    ),
    "int8 of no rows": (
        lambda: put_zeros(draft_rowwise(), f"{LAYER}.weight", "I8", 0, K),
        (r"weight is I8 \[0, 64\]"),
    ),
    "int8 that is no weight": (
        lambda: put_zeros(draft_plain_float(), "table", "I8", 3, 4),
        "table is I8 and not the weight of a layer",
    ),
    "whole weight": (
        lambda: replace_part(draft_plain_float(), "weight", np.ones((2, 2)), dtype="I64"),
        "blocks.0.q.weight is I64; int8run reads weights of F64, F32",
    ),
    "fp8 of AMD": (
        lambda: put_zeros(draft_plain_float(), f"{LAYER}.weight", "F8_E4M3FNUZ", 2, 2),
        "blocks.0.q.weight is F8_E4M3FNUZ; int8run reads weights",
    ),
}
