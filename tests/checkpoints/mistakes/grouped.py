"""Files in `asym_w4a8_int8` that must be refused."""

from collections.abc import Callable

import numpy as np
from checkpoints.drafts.changes import drop_tensors, put_zeros, replace_part
from checkpoints.drafts.draft import LAYER, CheckpointDraft, Mistake, N
from checkpoints.drafts.grouped import CODEBOOK, MARKER, K, draft_grouped

GROUPS = K // 16


def draft_marked(bits: int = 4, **fields: object) -> CheckpointDraft:
    """A file whose marker says something else than its tensors."""
    return draft_grouped(bits, marker={**MARKER, **fields})


def draft_with_bytes(width: int, bits: int = 4) -> CheckpointDraft:
    """Rows of codes that are cut off, or longer."""
    return put_zeros(draft_grouped(bits), f"{LAYER}.weight", "I8", N, width)


def draft_with_group_byte(byte: int) -> CheckpointDraft:
    """One scale of a group is another."""
    draft = draft_grouped()
    dtype, shape, data = draft.tensors[f"{LAYER}.weight_s_rel"]
    draft.tensors[f"{LAYER}.weight_s_rel"] = dtype, shape, bytes([byte]) + data[1:]
    return draft


def draft_with_part(
    suffix: str, values: object, dtype: str = "F32", bits: int = 4, **options: object
) -> CheckpointDraft:
    return replace_part(draft_grouped(bits, **options), suffix, values, dtype)  # type: ignore[arg-type]


def make_narrow(
    k: int, *, bits: int = 4, group: int = 16, rotation: int = 16
) -> Callable[[], CheckpointDraft]:
    """A file of so many columns, rotated by a matrix that divides them while its marker names another."""
    marker = {**MARKER, "group_size": group, "convrot_groupsize": rotation}
    return lambda: draft_grouped(bits, k=k, group=group, marker=marker, rotation=4)


def change_one(values: object, place: int, number: float) -> object:
    """Numbers of which one is another."""
    changed = np.array(values, dtype=float)
    changed.flat[place] = number
    return changed


GROUPED_MISTAKES: dict[str, Mistake] = {
    # codes
    "w4a8 with rows that are cut off": (
        lambda: draft_with_bytes(K // 2 - 1),
        r"has rows of 31 bytes, and .*weight_s_rel \[12, 4\] with groups of 16 is for 64 columns, .* 32 "
        r"bytes \(4 bits\) or 48 \(6 bits\); the weight is cut off, or the marker names another group size",
    ),
    "w6a8 with rows that are cut off": (lambda: draft_with_bytes(K // 2 + 8, 6), "has rows of 40 bytes"),
    "w4a8 with rows as wide as int8": (lambda: draft_with_bytes(K), "has rows of 64 bytes"),
    "w4a8 without numbers": (
        lambda: draft_with_bytes(0),
        r"has the shape \[12, 0\]; codes of 4 or 6 bits are a",
    ),
    "w4a8 of three dimensions": (
        lambda: put_zeros(draft_grouped(), f"{LAYER}.weight", "I8", N, 4, 8),
        "codes of 4 or 6 bits are a matrix",
    ),
    "w4a8 in uint8": (
        lambda: put_zeros(draft_grouped(), f"{LAYER}.weight", "U8", N, K // 2),
        "is U8 and has blocks.0.q.weight_s_rel, which such a weight cannot have",
    ),
    # sizes
    "w4a8 of an odd number of columns": (
        make_narrow(60, group=4, rotation=4),
        "make 60 columns, which with 4 bits are a multiple of 16",
    ),
    "w6a8 of too few columns": (
        make_narrow(48, bits=6),
        "make 48 columns, which with 6 bits are a multiple of 32",
    ),
    "w4a8 of groups of 24": (
        make_narrow(48, group=24),
        "make groups of 24 columns; with 4 bits, groups have 4, 8",
    ),
    "w4a8 of groups of 2": (make_narrow(64, group=2), "make groups of 2 columns"),
    "w6a8 of groups of 8": (
        make_narrow(64, bits=6, group=8),
        "make groups of 8 columns; with 6 bits, groups have multiples of 16",
    ),
    "w4a8 rotated by groups that do not divide it": (
        make_narrow(64, rotation=256),
        "names rotated groups of 256, which do not divide the 64 columns",
    ),
    "w4a8 rotated by groups of 32": (
        lambda: draft_marked(convrot_groupsize=32),
        "names rotated groups of 32; asym_w4a8_int8 is rotated by regular matrices, whose sizes are powers",
    ),
    "w4a8 rotated by groups of 12": (
        lambda: draft_marked(convrot_groupsize=12),
        "names groups of 12; rotated are",
    ),
    # markers
    "w4a8 without a marker": (
        lambda: draft_grouped(marker=None),
        "belongs to asym_w4a8_int8, and blocks.0.q has no comfy_quant marker",
    ),
    "w4a8 with int8's marker": (
        lambda: draft_marked(format="int8_tensorwise"),
        "names the format 'int8_tensorwise', and blocks.0.q.weight_s_rel belongs to asym_w4a8_int8; they con",
    ),
    "w4a8 that is not rotated": (
        lambda: draft_marked(convrot=False),
        "is not rotated; such weights always are",
    ),
    "w4a8 with another group size": (
        lambda: draft_marked(group_size=32),
        "has rows of 32 bytes, .* with groups of 32 is for 128 columns",
    ),
    "w4a8 with half the group size": (
        lambda: draft_marked(group_size=8),
        "with groups of 8 is for 32 columns",
    ),
    "w4a8 with a group size that is no number": (
        lambda: draft_marked(group_size="16"),
        "has an invalid group_size",
    ),
    "w4a8 with two group sizes": (
        lambda: draft_grouped(header={**MARKER, "group_size": 32}),
        "has group_size=32, the layer's marker 16; they contradict each other",
    ),
    "w4a8 with two rotations": (
        lambda: draft_grouped(header={**MARKER, "convrot_groupsize": 64}),
        "has convrot_groupsize=64, the layer's marker 16; they contradict each other",
    ),
    "w4a8 with two formats": (
        lambda: draft_grouped(header={"format": "int8_tensorwise"}),
        "says 'int8_tensorwise', the layer's marker 'asym_w4a8_int8'; they contradict each other",
    ),
    "w4a8 of experts": (lambda: draft_marked(num_experts=4), "describes a bank of experts"),
    # scales
    "w4a8 without scales of groups": (
        lambda: drop_tensors(draft_grouped(), "weight_s_rel"),
        "is asym_w4a8_int8 and has no weight_s_rel, without which its codes mean nothing",
    ),
    "w4a8 without scales of rows": (
        lambda: drop_tensors(draft_grouped(), "weight_s_channel"),
        "is asym_w4a8_int8 and has no weight_s_channel, without which its codes mean nothing",
    ),
    "w4a8 with int8's scale": (
        lambda: draft_with_part("weight_scale", np.ones((N, 1))),
        "is I8 and has blocks.0.q.weight_scale, which such a weight cannot have",
    ),
    "w4a8 with scales of fewer rows": (
        lambda: put_zeros(draft_grouped(), f"{LAYER}.weight_s_rel", "F8_E4M3", N - 1, GROUPS),
        "has 11 rows and blocks.0.q.weight 12",
    ),
    "w4a8 with scales of fewer groups": (
        lambda: put_zeros(draft_grouped(), f"{LAYER}.weight_s_rel", "F8_E4M3", N, 3),
        "is for 48 columns",
    ),
    "w4a8 with scales of one dimension": (
        lambda: put_zeros(draft_grouped(), f"{LAYER}.weight_s_rel", "F8_E4M3", N * GROUPS),
        "a scale for each group of each row are a matrix",
    ),
    "w4a8 with scales in e5m2": (
        lambda: put_zeros(draft_grouped(), f"{LAYER}.weight_s_rel", "F8_E5M2", N, GROUPS),
        "weight_s_rel is F8_E5M2; allowed are F8_E4M3, F32",
    ),
    "w4a8 with a scale that is NaN": (
        lambda: draft_with_group_byte(0x7F),
        "1 of 48 numbers of blocks.0.q.weight_s_rel are NaN, infinite or negative",
    ),
    "w4a8 with a negative scale": (lambda: draft_with_group_byte(0x81), "are NaN, infinite or negative"),
    "w4a8 with an infinite scale": (
        lambda: draft_with_part("weight_s_rel", change_one(np.ones((N, GROUPS)), 5, np.inf)),
        "1 of 48 numbers of blocks.0.q.weight_s_rel are NaN, infinite or negative",
    ),
    "w4a8 with scales of rows of another shape": (
        lambda: draft_with_part("weight_s_channel", np.ones((N, 1))),
        r"weight_s_channel has the shape \[12, 1\], its weight needs \[12\]",
    ),
    "w4a8 with a scale of a row that is NaN": (
        lambda: draft_with_part("weight_s_channel", change_one(np.ones(N), 2, np.nan)),
        "1 of 12 numbers of blocks.0.q.weight_s_channel are not finite and above 0",
    ),
    # codebooks
    "w4a8 with a short codebook": (
        lambda: draft_with_part("weight_codebook", CODEBOOK[:8]),
        r"weight_codebook has the shape \[8\]; a codebook has 16 levels",
    ),
    "w4a8 with a codebook that does not rise": (
        lambda: draft_with_part("weight_codebook", change_one(CODEBOOK, 3, 0.9)),
        "the levels of blocks.0.q.weight_codebook do not rise",
    ),
    "w4a8 with a codebook that is NaN": (
        lambda: draft_with_part("weight_codebook", change_one(CODEBOOK, 3, np.nan)),
        "weight_codebook holds NaN or infinity",
    ),
    "w6a8 with a codebook": (
        lambda: draft_with_part("weight_codebook", CODEBOOK, bits=6),
        "weight_codebook belongs to codes of 4 bits, and the rows of its weight are as wide as codes of 6",
    ),
    # corrections
    "w4a8 with corrections of another shape": (
        lambda: draft_with_part("weight_correction", np.zeros((N, GROUPS))),
        r"weight_correction has the shape \[12, 4\], its weight needs \[4, 12\]",
    ),
    "w4a8 with a correction that is NaN": (
        lambda: draft_with_part("weight_correction", change_one(np.zeros((GROUPS, N)), 7, np.nan)),
        "weight_correction holds NaN or infinity",
    ),
    "w4a8 with zero points that are integers": (
        lambda: draft_with_part("weight_correction", np.zeros((GROUPS, N)), "I32"),
        "weight_correction is I32; allowed are F32",
    ),
    "w6a8 with corrections": (
        lambda: draft_with_part("weight_correction", np.zeros((GROUPS, N)), bits=6),
        "weight_correction belongs to codes of 4 bits",
    ),
    # beside other weights
    "a scale of groups without a weight": (
        lambda: drop_tensors(draft_grouped(), "weight"),
        "belongs to no weight, blocks.0.q.weight is missing",
    ),
    "a codebook beside a float": (
        lambda: replace_part(drop_tensors(draft_grouped(), "comfy_quant"), "weight", np.ones((N, K))),
        "is F32 and has blocks.0.q.weight_s_rel, which such a weight cannot have",
    ),
}
