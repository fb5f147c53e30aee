"""Checkpoints of INT8 weights that nothing was done to before they were rounded."""

from checkpoints.drafts.draft import (
    LAYER,
    CheckpointDraft,
    Draft,
    K,
    N,
    describe_granularity,
    set_expected,
    spread_scales,
)

TENSOR, ROW = {"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "per_row": True}


def draft_int8(
    shape: tuple[int, ...],
    granularity: str,
    marker: object = None,
    *,
    weight: tuple[int, int] = (N, K),
    name: str = "weight_scale",
    dtype: str = "F32",
    block: tuple[int, int] = (1, 1),
    label: str = "int8_tensorwise",
    header: object = None,
    padding: bytes = b"",
    exact: bool = True,
) -> CheckpointDraft:
    """Codes, scales of a shape and perhaps a marker or an entry in the header; not rotated."""
    draft = CheckpointDraft()
    q = draft.put_int8(f"{LAYER}.weight", *weight)
    s = draft.put_scale(f"{LAYER}.{name}", *shape, dtype=dtype)
    if marker is not None:
        draft.put_marker(f"{LAYER}.comfy_quant", marker, padding)
    if header is not None:
        draft.put_header({LAYER: header})
    draft.put(f"{LAYER}.bias", "BF16", draft.generator.normal(size=weight[0]))

    full = spread_scales(s, granularity, block)
    full = full[: weight[0], : weight[1]]  # the last blocks may be cut off
    words = f"{label}, {describe_granularity(granularity, block)}"
    return set_expected(
        draft, q * full, "int8", granularity, words, is_usable_as_is=exact, outlier_method="none"
    )


def draft_rowwise() -> CheckpointDraft:
    return draft_int8((N, 1), "row", ROW)


def draft_transposed() -> CheckpointDraft:
    """[K, N] in the file."""
    draft = CheckpointDraft()
    q = draft.put_int8(f"{LAYER}.weight", K, N)
    s = draft.put_scale(f"{LAYER}.weight_scale", 1, N)
    return set_expected(
        draft,
        (q * s).T,
        kind="int8",
        granularity="transposed",
        label="int8, transposed",
        is_usable_as_is=False,
        outlier_method="none",
    )


def draft_lightx2v_comfy() -> CheckpointDraft:
    """int8 with the marker of fp8 files."""
    draft = draft_int8((), "tensor", name="scale_weight", label="int8")
    draft.tensors["scaled_fp8"] = "F8_E4M3", (2,), bytes(2)
    return draft


def draft_wan_int8(name: str) -> CheckpointDraft:
    """Blocks of 16 of a row, their scales by a name of their own."""
    return draft_int8((N, 4, 1), "block3d", name=name, block=(1, 16), label="int8", exact=False)


INT8_DRAFTS: dict[str, Draft] = {
    # ComfyUI's own, and the shapes of one scale
    "tensor []": lambda: draft_int8((), "tensor", TENSOR),
    "tensor [1]": lambda: draft_int8((1,), "tensor", TENSOR),
    "tensor [1, 1]": lambda: draft_int8((1, 1), "tensor", TENSOR),
    "row [N, 1]": lambda: draft_int8((N, 1), "row", ROW),
    "row [N]": lambda: draft_int8((N,), "row", TENSOR),
    "row [N] of a square": lambda: draft_int8((K,), "row", TENSOR, weight=(K, K)),
    "row [N, 1] of a square": lambda: draft_int8((K, 1), "row", ROW, weight=(K, K)),
    "one row": lambda: draft_int8((1, 1), "tensor", TENSOR, weight=(1, K)),
    "one column": lambda: draft_int8((N, 1), "row", TENSOR, weight=(N, 1)),
    "row in the header": lambda: draft_int8((N, 1), "row", header=ROW),
    "axiswise": lambda: draft_int8((N,), "row", {"format": "int8_axiswise"}, label="int8_axiswise"),
    "bf16 scale with a marker": lambda: draft_int8((N, 1), "row", ROW, dtype="BF16"),
    "embedding's padding": lambda: draft_int8((N, 1), "row", ROW, padding=b"\0\0\0"),
    "doubled braces": lambda: draft_int8((N, 1), "row", '{{"format": "int8_tensorwise"}}'),
    "orig_dtype": lambda: draft_int8(
        (N, 1), "row", {"format": "int8_tensorwise", "orig_dtype": "torch.bfloat16", "per_row": True}
    ),
    # rotations
    "quarot false": lambda: draft_int8((N, 1), "row", {"quarot": False}, label="int8"),
    "convrot false": lambda: draft_int8((N, 1), "row", {"convrot": False, "per_row": True}, label="int8"),
    # blocks
    "grid": lambda: draft_int8(
        (3, 16),
        "grid",
        {"format": "int8_blockwise", "group_size": 4},
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid in params": lambda: draft_int8(
        (3, 16),
        "grid",
        {"format": "int8_blockwise", "params": {"group_size": 4}},
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid without its size": lambda: draft_int8(
        (3, 16), "grid", {"format": "int8_blockwise"}, block=(4, 4), label="int8_blockwise", exact=False
    ),
    "grid of one column": lambda: draft_int8(
        (3, 1),
        "grid",
        {"format": "int8_blockwise"},
        weight=(12, 4),
        block=(4, 4),
        label="int8_blockwise",
        exact=False,
    ),
    "grid without a marker": lambda: draft_int8(
        (3, 16), "grid", name="scale_weight", block=(4, 4), label="int8", exact=False
    ),
    "block3d": lambda: draft_int8(
        (N, 4, 1),
        "block3d",
        {"format": "int8_blockwise", "group_size": 16},
        block=(1, 16),
        label="int8_blockwise",
        exact=False,
    ),
    "block3d of one block": lambda: draft_int8(
        (N, 1, 1), "block3d", {"format": "int8_blockwise"}, block=(1, K), label="int8_blockwise", exact=False
    ),
    "grid, the last blocks cut off": lambda: draft_int8(
        (3, 2), "grid", weight=(300, 250), block=(128, 128), label="int8", exact=False
    ),
    "grid, the last blocks cut off, marked": lambda: draft_int8(
        (3, 13),
        "grid",
        {"format": "int8_blockwise", "group_size": 5},
        block=(5, 5),
        label="int8_blockwise",
        exact=False,
    ),
    "grid of cut blocks that other blocks would fill": lambda: draft_int8(
        (2, 2),
        "grid",
        {"format": "int8_blockwise", "group_size": 128},
        weight=(192, 192),
        block=(128, 128),
        label="int8_blockwise",
        exact=False,
    ),
    "block3d, the last block cut off": lambda: draft_int8(
        (N, 2, 1),
        "block3d",
        {"format": "int8_blockwise", "group_size": 48},
        block=(1, 48),
        label="int8_blockwise",
        exact=False,
    ),
    "group, the last one cut off": lambda: draft_int8(
        (N, 3), "group", weight=(N, 130), block=(1, 64), label="int8", exact=False
    ),
    "group": lambda: draft_int8((N, 8), "group", block=(1, 8), label="int8", exact=False),
    # Wan-INT8's names
    "named scale": lambda: draft_wan_int8("scale"),
    "named weight.scale": lambda: draft_wan_int8("weight.scale"),
    "named weight.weight_scale": lambda: draft_wan_int8("weight.weight_scale"),
    "named scale_weight": lambda: draft_wan_int8("scale_weight"),
    "named weight_scale_inv": lambda: draft_wan_int8("weight_scale_inv"),
    # others
    "lightx2v bf16": lambda: draft_int8((N, 1), "row", dtype="BF16", label="int8"),
    "lightx2v f16": lambda: draft_int8((N, 1), "row", dtype="F16", label="int8"),
    "lightx2v comfy mode": draft_lightx2v_comfy,
    "transposed": draft_transposed,
}
