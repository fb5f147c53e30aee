"""Checkpoints of INT8 weights that were rotated or scaled before: ConvRot, QuaRot, HadaNorm, QuIP."""

import numpy as np
from checkpoints.drafts.draft import LAYER, CheckpointDraft, Draft, K, N, set_expected
from checkpoints.drafts.int8 import ROW, TENSOR, draft_int8
from checkpoints.drafts.numbers import Array, make_regular, make_sylvester, rotate_groups


def draft_rotated(draft: CheckpointDraft, matrix: Array, method: str) -> CheckpointDraft:
    """The same file, known to be rotated: a marker must say so."""
    draft.real[LAYER] = rotate_groups(draft.real[LAYER], matrix)
    label = f"{draft.expected['label']}, {method} {len(matrix)}"
    draft.expected |= {
        "outlier_method": method,
        "rotation_group_size": len(matrix),
        "outlier_settings": {"group_size": len(matrix)},
        "label": label,
    }
    return draft


def draft_convrot(group: int, k: int = K, **marker: object) -> CheckpointDraft:
    said = {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": group,
        "per_row": True,
        **marker,
    }
    return draft_rotated(draft_int8((N, 1), "row", said, weight=(N, k)), make_regular(group), "convrot")


def draft_rotation_lost_in_header(header: dict[str, object]) -> CheckpointDraft:
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16, "per_row": True}
    return draft_rotated(draft_int8((N, 1), "row", said, header=header), make_regular(16), "convrot")


def draft_smoothed(rotation: bool) -> CheckpointDraft:
    said: dict[str, object] = {"format": "int8_tensorwise"}
    if rotation:
        said |= {"convrot": True, "convrot_groupsize": 16}

    draft = draft_int8((N, 1), "row", said)
    if rotation:
        draft_rotated(draft, make_regular(16), "convrot")
    else:
        draft.expected |= {"outlier_method": "smoothquant", "label": "int8_tensorwise, row, smoothquant"}

    factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.generator.uniform(0.5, 2, K))
    draft.real[LAYER] = draft.real[LAYER] * factor
    return draft


def draft_toolkit(
    sigma: bool, matrix: bool = True, scale: tuple[int, ...] = (N, 1), dtype: str = "F32"
) -> CheckpointDraft:
    """QuaRot's codes, divided by HadaNorm's sigma too.

    Args:
        sigma: whether the file has HadaNorm's factors.
        matrix: whether the file has the rotation.
        scale: shape of the scales: one of each row, or one.
        dtype: of the rotation.
    """
    draft = CheckpointDraft()
    k, group_size = 256, 128
    q = draft.put_int8(f"{LAYER}.weight", N, k)
    s = draft.put_scale(f"{LAYER}.weight_scale", *scale)
    draft.put(f"{LAYER}.weight_packed", "I8", q.T)

    granularity = "row" if s.size > 1 else "tensor"
    method = "hadanorm" if sigma else "quarot"
    label = f"int8, {granularity}, {method}"
    real = q * s.reshape(-1, 1)
    if matrix:
        rotation = make_sylvester(group_size)
        draft.put(f"{LAYER}.quarot_hadamard", dtype, rotation)
        real = rotate_groups(real, rotation)
        label += f" {group_size}"
    if sigma:
        real = real / draft.put(f"{LAYER}.hadanorm_sigma", "F32", draft.generator.uniform(0.5, 2, k))

    return set_expected(
        draft,
        real,
        kind="int8",
        granularity=granularity,
        label=label,
        is_usable_as_is=True,
        outlier_method=method,
        is_centered=sigma,
    )


def draft_quip(n: int, k: int, smooth: bool = False) -> CheckpointDraft:
    """Padded to powers of 2; only n and k rows and columns are the weight."""
    draft = CheckpointDraft()
    rows = 1 << (n - 1).bit_length()
    columns = 1 << (k - 1).bit_length()
    q = draft.put_int8(f"{LAYER}.weight", rows, columns)
    s = draft.put_scale(f"{LAYER}.weight_scale", rows, 1)
    draft.put_marker(f"{LAYER}.comfy_quant", TENSOR)
    draft.put(f"{LAYER}.hadamard_quip", "I8", 1)
    draft.put(f"{LAYER}.hadamard_size_out", "I32", rows)
    draft.put(f"{LAYER}.hadamard_size_in", "I32", columns)
    row_sign = draft.put(f"{LAYER}.sign_row", "F32", draft.generator.choice([-1.0, 1.0], rows))
    column_sign = draft.put(f"{LAYER}.sign_col", "F32", draft.generator.choice([-1.0, 1.0], columns))

    rotated = make_sylvester(rows) @ (q * s) @ make_sylvester(columns)
    padded = row_sign[:, None] * rotated * column_sign
    real = padded[:n, :k]
    if smooth:
        real = real / draft.put(f"{LAYER}.smooth_factors", "F32", draft.generator.uniform(0.5, 2, k))
    draft.put(f"{LAYER}.bias", "F32", np.zeros(n))

    set_expected(
        draft,
        real,
        kind="int8",
        granularity="row",
        label="int8_tensorwise, row, quip",
        is_usable_as_is=False,
        outlier_method="quip",
        is_padded=True,
    )
    draft.expected |= {"rows": rows, "columns": columns}
    return draft


def draft_older_quip(dense: bool) -> CheckpointDraft:
    """Before padding: factors of rows and columns, or whole matrices where dense."""
    draft = CheckpointDraft()
    q = draft.put_int8(f"{LAYER}.weight", N, K)
    s = draft.put_scale(f"{LAYER}.weight_scale", N, 1)
    u_shape = (N, N) if dense else (N,)
    v_shape = (K, K) if dense else (K,)
    u = draft.put(f"{LAYER}.quip_s_u", "F32", draft.generator.normal(size=u_shape))
    v = draft.put(f"{LAYER}.quip_s_v", "F32", draft.generator.normal(size=v_shape))

    real = u @ (q * s) @ v.T if dense else u[:, None] * (q * s) * v
    return set_expected(
        draft,
        real,
        kind="int8",
        granularity="row",
        label="int8, row, quip",
        is_usable_as_is=False,
        outlier_method="quip",
        is_padded=False,
    )


TRANSFORMED_DRAFTS: dict[str, Draft] = {
    # rotations
    "convrot 16": lambda: draft_convrot(16),
    "convrot 4": lambda: draft_convrot(4),
    "convrot 64": lambda: draft_convrot(64),
    "convrot 256 by default": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"format": "int8_tensorwise", "convrot": True}, weight=(N, 512)),
        make_regular(256),
        "convrot",
    ),
    "convrot 1024": lambda: draft_convrot(1024, 1024),
    "convrot 32 is Sylvester's": lambda: draft_rotated(
        draft_int8((N, 1), "row", {**ROW, "convrot": True, "convrot_groupsize": 32}),
        make_sylvester(32),
        "quarot",
    ),
    "convrot of a tensor scale": lambda: draft_rotated(
        draft_int8((), "tensor", {**TENSOR, "convrot": True, "convrot_groupsize": 16}),
        make_regular(16),
        "convrot",
    ),
    "convrot in params": lambda: draft_rotated(
        draft_int8((N, 1), "row", {**TENSOR, "params": {"convrot": True, "convrot_groupsize": 16}}),
        make_regular(16),
        "convrot",
    ),
    "convrot in the header": lambda: draft_rotated(
        draft_int8((N, 1), "row", header={**ROW, "convrot": True, "convrot_groupsize": 16}),
        make_regular(16),
        "convrot",
    ),
    "convrot lost in the header": lambda: draft_rotation_lost_in_header(
        {"format": "int8_tensorwise", "group_size": 128}
    ),
    "convrot's size lost in the header": lambda: draft_rotation_lost_in_header(
        {"format": "int8_tensorwise", "convrot": True}
    ),
    "quarot, pre-native": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"quarot": True, "quarot_groupsize": 16}, label="int8"),
        make_regular(16),
        "convrot",
    ),
    "quarot of 128": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"quarot": True, "quarot_groupsize": 128}, weight=(N, 128), label="int8"),
        make_sylvester(128),
        "quarot",
    ),
    "convrot, pre-native": lambda: draft_rotated(
        draft_int8((N, 1), "row", {"convrot": True, "convrot_groupsize": 64, "per_row": True}, label="int8"),
        make_regular(64),
        "convrot",
    ),
    "smoothed": lambda: draft_smoothed(False),
    "smoothed and rotated": lambda: draft_smoothed(True),
    # blocks
    "block3d, rotated": lambda: draft_rotated(
        draft_int8(
            (N, 4, 1),
            "block3d",
            {"format": "int8_blockwise", "convrot": True, "convrot_groupsize": 64},
            block=(1, 16),
            label="int8_blockwise",
            exact=False,
        ),
        make_regular(64),
        "convrot",
    ),
    # others
    "toolkit quarot": lambda: draft_toolkit(False),
    "toolkit quarot, one scale": lambda: draft_toolkit(False, scale=(1,)),
    "toolkit quarot in half precision": lambda: draft_toolkit(False, dtype="BF16"),
    "toolkit hadanorm": lambda: draft_toolkit(True),
    "toolkit sigma alone": lambda: draft_toolkit(True, matrix=False),
    "quip": lambda: draft_quip(8, 32),
    "quip, padded": lambda: draft_quip(12, 24),
    "quip, smoothed": lambda: draft_quip(12, 24, smooth=True),
    "older quip": lambda: draft_older_quip(False),
    "older quip, dense": lambda: draft_older_quip(True),
}
