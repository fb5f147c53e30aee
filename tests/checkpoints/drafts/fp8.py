"""Checkpoints of fp8 weights, scaled and plainly cast."""

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


def draft_fp8(
    shape: tuple[int, ...] | None,
    granularity: str,
    *,
    dtype: str = "F8_E4M3",
    name: str = "weight_scale",
    marker: object = None,
    block: tuple[int, int] = (1, 1),
    legacy: int | None = None,
    header: object = None,
) -> CheckpointDraft:
    """fp8 numbers; legacy: elements of the `scaled_fp8` marker of the file."""
    draft = CheckpointDraft()
    real = draft.put_fp8(f"{LAYER}.weight", dtype, N, K, is_cast=shape is None)
    word = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
    label = f"{word} cast"
    if shape is not None:
        s = draft.put_scale(f"{LAYER}.{name}", *shape)
        full = spread_scales(s, granularity, block)[:N, :K]
        real = real * full
        label = f"{word} scaled, {describe_granularity(granularity, block)}"
    if marker is not None:
        draft.put_marker(f"{LAYER}.comfy_quant", marker)
    if header is not None:
        draft.put_header({LAYER: header})
    if legacy is not None:
        draft.tensors["scaled_fp8"] = dtype, (legacy,), bytes(legacy)
        if shape is not None:
            draft.put(f"{LAYER}.scale_input", "F32", 1.0)
    return set_expected(draft, real, "fp8", granularity, label, is_usable_as_is=False, outlier_method="none")


def draft_smoothed_fp8() -> CheckpointDraft:
    draft = draft_fp8((), "tensor", marker={"format": "float8_e4m3fn"})
    factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.generator.uniform(0.5, 2, K))
    draft.real[LAYER] = draft.real[LAYER] * factor
    return draft


FP8_DRAFTS: dict[str, Draft] = {
    # blocks
    "fp8 grid, the last blocks cut off": lambda: draft_fp8(
        (2, 7),
        "grid",
        marker={"format": "float8_e4m3fn_blockwise", "group_size": 10},
        block=(10, 10),
    ),
    # fp8
    "fp8": lambda: draft_fp8(
        (), "tensor", marker={"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    ),
    "fp8 in the header": lambda: draft_fp8((), "tensor", header={"format": "float8_e4m3fn"}),
    "fp8 e5m2": lambda: draft_fp8((1,), "tensor", dtype="F8_E5M2", marker={"format": "float8_e5m2"}),
    "fp8 e5m2 with the label of e4m3": lambda: draft_fp8(
        (), "tensor", dtype="F8_E5M2", marker={"format": "float8_e4m3fn"}
    ),
    "fp8 legacy": lambda: draft_fp8((), "tensor", name="scale_weight", legacy=2),
    "fp8 legacy, empty marker": lambda: draft_fp8((1,), "tensor", name="scale_weight", legacy=0),
    "fp8 row": lambda: draft_fp8((N,), "row", marker={"format": "float8_e4m3fn_rowwise"}),
    "fp8 row [N, 1]": lambda: draft_fp8((N, 1), "row"),
    "fp8 grid": lambda: draft_fp8(
        (3, 16), "grid", marker={"format": "float8_e4m3fn_blockwise", "group_size": 4}, block=(4, 4)
    ),
    "fp8 grid of transformers": lambda: draft_fp8((3, 16), "grid", name="weight_scale_inv", block=(4, 4)),
    "fp8 block3d": lambda: draft_fp8((N, 4, 1), "block3d", marker={"format": "float8_e4m3fn"}, block=(1, 16)),
    "fp8 block3d by its name": lambda: draft_fp8(
        (N, 4, 1), "block3d", marker={"format": "float8_e4m3fn_block3d"}, block=(1, 16)
    ),
    "fp8 smoothed": draft_smoothed_fp8,
    "fp8 cast": lambda: draft_fp8(None, ""),
    "fp8 cast e5m2": lambda: draft_fp8(None, "", dtype="F8_E5M2"),
}
