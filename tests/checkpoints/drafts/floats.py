"""Checkpoints of float weights."""

from checkpoints.drafts.draft import LAYER, CheckpointDraft, Draft, K, N, set_expected


def draft_float(dtype: str, word: str) -> CheckpointDraft:
    draft = CheckpointDraft()
    real = draft.put(f"{LAYER}.weight", dtype, draft.generator.normal(size=(N, K)))
    return set_expected(draft, real, "float", "", word, is_usable_as_is=False, outlier_method="none")


def draft_plain_float(dtype: str = "F32") -> CheckpointDraft:
    """A file with one float weight."""
    return draft_float(dtype, "")


FLOAT_DRAFTS: dict[str, Draft] = {
    # floats
    "bf16": lambda: draft_float("BF16", "bfloat16"),
    "f16": lambda: draft_float("F16", "float16"),
    "f32": lambda: draft_float("F32", "float32"),
    "f64": lambda: draft_float("F64", "float64"),
}
