"""Files that must be refused for the tensors of a rotation or a factor."""

import numpy as np
from checkpoints.drafts.changes import (
    apply_change,
    draft_with_marker,
    draft_with_tensor,
    drop_tensors,
    replace_part,
)
from checkpoints.drafts.draft import LAYER, CheckpointDraft, K, Mistake, N
from checkpoints.drafts.floats import draft_plain_float
from checkpoints.drafts.fp8 import draft_fp8
from checkpoints.drafts.int8 import draft_rowwise
from checkpoints.drafts.transformed import draft_older_quip, draft_quip, draft_toolkit
from checkpoints.mistakes.markers import GROUP


def draft_broken_quip() -> CheckpointDraft:
    """QuIP by Hadamard matrices of a size that has none."""
    draft = draft_quip(8, 32)
    draft.put_int8(f"{LAYER}.weight", 12, 32)
    draft.put_scale(f"{LAYER}.weight_scale", 12, 1)
    draft.put(f"{LAYER}.hadamard_size_out", "I32", 12)
    draft.put(f"{LAYER}.sign_row", "F32", np.ones(12))
    return draft


TRANSFORM_MISTAKES: dict[str, Mistake] = {
    # factors
    "factor of another width": (
        lambda: replace_part(draft_rowwise(), "pre_quant_scale", np.ones(N)),
        r"pre_quant_scale has the shape \[12\], its weight needs \[64\]",
    ),
    "factor of zero": (
        lambda: replace_part(draft_rowwise(), "pre_quant_scale", np.zeros(K)),
        "64 of 64 numbers of blocks.0.q.pre_quant_scale are not finite and above 0",
    ),
    "factor of whole numbers": (
        lambda: draft_with_tensor("pre_quant_scale", "I32"),
        "pre_quant_scale is I32; allowed are F32",
    ),
    "factor of another width of fp8": (
        lambda: replace_part(draft_fp8((), "tensor"), "pre_quant_scale", np.ones(N)),
        r"pre_quant_scale has the shape \[12\]",
    ),
    "factor for a float": (
        lambda: draft_with_tensor("pre_quant_scale", draft=draft_plain_float()),
        "is F32 and has blocks.0.q.pre_quant_scale, which such a weight cannot have",
    ),
    "factor alone": (
        lambda: apply_change(draft_plain_float(), lambda d: d.put("norm.pre_quant_scale", "F32", 1)),
        "norm.pre_quant_scale belongs to no weight",
    ),
    # INT8-Toolkit
    "matrix of another kind": (
        lambda: replace_part(draft_toolkit(False), "quarot_hadamard", np.eye(128)),
        r"quarot_hadamard F32 \[128, 128\] is not a Hadamard matrix",
    ),
    "matrix that is none": (
        lambda: replace_part(draft_toolkit(False), "quarot_hadamard", np.ones(128)),
        r"quarot_hadamard F32 \[128\] is not a Hadamard matrix",
    ),
    "matrix of 48": (
        lambda: replace_part(draft_toolkit(False), "quarot_hadamard", np.ones((48, 48))),
        r"\[48, 48\] is not a Hadamard matrix",
    ),
    "matrix and convrot": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 64}, draft_toolkit(False)),
        "rotated by its marker and by the INT8-Toolkit's tensors; they contradict",
    ),
    "matrix and a factor": (
        lambda: replace_part(draft_toolkit(False), "pre_quant_scale", np.ones(256)),
        "rotated by its marker and by the INT8-Toolkit's",
    ),
    "sigma of another width": (
        lambda: replace_part(draft_toolkit(True), "hadanorm_sigma", np.ones(4)),
        r"hadanorm_sigma has the shape \[4\], its weight needs \[256\]",
    ),
    "sigma of zero": (
        lambda: replace_part(draft_toolkit(True), "hadanorm_sigma", np.zeros(256)),
        "256 of 256 numbers of blocks.0.q.hadanorm_sigma",
    ),
    "sigma for fp8": (
        lambda: draft_with_tensor("hadanorm_sigma", draft=draft_fp8((), "tensor")),
        "is F8_E4M3 and has blocks.0.q.hadanorm_sigma, which such a weight cannot have",
    ),
    # QuIP
    "quip without signs": (
        lambda: drop_tensors(draft_quip(8, 32), "sign_col"),
        "is transformed by QuIP and sign_col is missing; its weight cannot be restored",
    ),
    "quip without its flag": (
        lambda: drop_tensors(draft_quip(8, 32), "hadamard_quip"),
        "is transformed by QuIP and hadamard_quip is missing",
    ),
    "quip of both kinds": (
        lambda: draft_with_tensor("quip_s_v", draft=draft_with_tensor("quip_s_u", draft=draft_quip(8, 32))),
        "is transformed by QuIP and it has hadamard_quip and quip_s_u",
    ),
    "older quip without v": (
        lambda: drop_tensors(draft_older_quip(False), "quip_s_v"),
        "is transformed by QuIP and quip_s_v is missing",
    ),
    "older quip of another size": (
        lambda: replace_part(draft_older_quip(False), "quip_s_u", np.ones(5)),
        r"quip_s_u is F32 \[5\]; its weight \[12, 64\] needs F32 \[12\]",
    ),
    "older quip that is nan": (
        lambda: replace_part(draft_older_quip(False), "quip_s_u", np.full(N, np.nan)),
        "quip_s_u has numbers that are not finite",
    ),
    "signs that are none": (
        lambda: replace_part(draft_quip(8, 32), "sign_row", np.full(8, 2.0)),
        "sign_row has numbers that are neither 1 nor -1",
    ),
    "quip of another size": (
        lambda: replace_part(draft_quip(8, 32), "hadamard_size_in", 64, dtype="I32"),
        r"hadamard_size_in says 64, and blocks.0.q.weight has \[8, 32\]",
    ),
    "quip that is not padded": (
        draft_broken_quip,
        r"hadamard_size_out says 12, and blocks.0.q.weight has \[12, 32\]; both are one power of 2",
    ),
    "quip of no size": (
        lambda: replace_part(draft_quip(8, 32), "hadamard_size_in", [], dtype="I32"),
        r"hadamard_size_in says None, and",
    ),
    "quip and convrot": (
        lambda: draft_with_marker({**GROUP, "convrot_groupsize": 16}, draft_quip(8, 32)),
        "is transformed by QuIP and is rotated, scaled or stored transposed too",
    ),
    "quip's smooth factors of zero": (
        lambda: replace_part(draft_quip(12, 24, True), "smooth_factors", np.zeros(24)),
        "24 of 24 numbers of blocks.0.q.smooth_factors",
    ),
}
