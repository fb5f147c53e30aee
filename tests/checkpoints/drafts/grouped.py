"""Checkpoints in `asym_w4a8_int8`: codes of 4 and 6 bits, a scale for each group and one for each row."""

import numpy as np
from checkpoints.drafts.draft import LAYER, CheckpointDraft, Draft, N, set_expected
from checkpoints.drafts.numbers import Array, decode_fp8, make_regular, rotate_groups
from numpy.typing import NDArray

K = 64
ROTATION = 16
MARKER = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": ROTATION}
CODEBOOK = np.array(
    [-1, -0.8, -0.64, -0.5, -0.38, -0.26, -0.16, -0.05, 0.05, 0.16, 0.27, 0.38, 0.5, 0.64, 0.8, 1]
)


def pack(codes: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """Bytes of a row: two codes a byte, the even column below; then the upper two bits of four codes each."""
    low = codes & 15
    packed = low[:, 0::2] | low[:, 1::2] << 4
    if bits == 6:
        high = codes >> 4
        upper = high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
        packed = np.concatenate([packed, upper], axis=1)
    return packed


def draft_grouped(
    bits: int = 4,
    n: int = N,
    k: int = K,
    *,
    group: int = 16,
    marker: object = MARKER,
    header: object = None,
    codebook: bool = True,
    correction: str = "",
    scale_dtype: str = "F8_E4M3",
    rotation: int = ROTATION,
    smoothed: bool = False,
) -> CheckpointDraft:
    """Random codes; of 4 bits by a codebook, or evenly spaced, then perhaps with corrections in a dtype."""
    draft = CheckpointDraft()
    codes = draft.generator.integers(1 if bits == 6 else 0, 2**bits, (n, k))
    packed = pack(codes, bits).astype("u1")
    draft.tensors[f"{LAYER}.weight"] = "I8", packed.shape, packed.tobytes()
    levels: Array = np.arange(2**bits) - 2.0 ** (bits - 1)
    top = 12.0
    if bits == 6:
        top = 3.0
    elif codebook:
        levels = draft.put(f"{LAYER}.weight_codebook", "F32", CODEBOOK)
        top = 110.0
    scale = put_group_scales(draft, top, (n, k // group), scale_dtype)
    of_rows = draft.put_scale(f"{LAYER}.weight_s_channel", n)
    # products as a reader computes them, so that both round the same number
    products = levels[codes].astype("<f4") * np.repeat(scale, group, axis=1).astype("<f4")
    real = np.clip(np.round(products), -127, 127).astype(np.float64) * of_rows[:, None]
    if correction:
        added = draft.put(
            f"{LAYER}.weight_correction", correction, draft.generator.normal(0, 0.01, (k // group, n))
        )
        real = real + np.repeat(added.T, group, axis=1)
    real = rotate_groups(real, make_regular(rotation))
    if smoothed:
        factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.generator.uniform(0.5, 2, k))
        real = real * factor
    if marker is not None:
        draft.put_marker(f"{LAYER}.comfy_quant", marker)
    if header is not None:
        draft.put_header({LAYER: header})
    label = f"asym_w4a8_int8, {bits} bits, group {group}, convrot {rotation}"
    return set_expected(
        draft,
        real,
        f"w{bits}a8",
        "group",
        label,
        is_usable_as_is=True,
        is_packable=True,
        outlier_method="convrot",
        rotation_group_size=rotation,
        block_size=group,
        format_name=f"w{bits}a8",
    )


def put_group_scales(draft: CheckpointDraft, top: float, shape: tuple[int, int], dtype: str) -> Array:
    """Add scales from a quarter of the largest up; one is zero, as of a group without numbers."""
    key = f"{LAYER}.weight_s_rel"
    if dtype == "F32":
        return draft.put(key, dtype, draft.generator.uniform(top / 4, top, shape))
    numbers = decode_fp8(np.arange(0x7F), 4)
    codes = draft.generator.integers(np.searchsorted(numbers, top / 4), np.searchsorted(numbers, top), shape)
    codes.flat[0] = 0
    draft.tensors[key] = dtype, shape, codes.astype("u1").tobytes()
    return numbers[codes]


GROUPED_DRAFTS: dict[str, Draft] = {
    "w4a8": lambda: draft_grouped(),
    "w4a8 in the header": lambda: draft_grouped(marker=None, header=MARKER),
    "w4a8 in both": lambda: draft_grouped(header=MARKER),
    "w4a8, evenly spaced": lambda: draft_grouped(codebook=False),
    "w4a8 with corrections": lambda: draft_grouped(codebook=False, correction="F32"),
    "w4a8 with corrections in bfloat16": lambda: draft_grouped(codebook=False, correction="BF16"),
    "w4a8 of small groups": lambda: draft_grouped(group=4, marker={**MARKER, "group_size": 4}),
    "w4a8 of large groups": lambda: draft_grouped(group=32, marker={**MARKER, "group_size": 32}),
    "w4a8, scales in float32": lambda: draft_grouped(scale_dtype="F32"),
    "w4a8 that leaves the sizes out": lambda: draft_grouped(
        k=256, marker={"format": "asym_w4a8_int8"}, rotation=256
    ),
    "w4a8 with nested fields": lambda: draft_grouped(
        marker={
            "format": "asym_w4a8_int8",
            "params": {"group_size": 16, "convrot_groupsize": 16, "convrot": True},
        }
    ),
    "w4a8 smoothed": lambda: draft_grouped(smoothed=True),
    "w6a8": lambda: draft_grouped(6),
    "w6a8 in the header": lambda: draft_grouped(6, marker=None, header=MARKER),
    "w6a8 of large groups": lambda: draft_grouped(6, group=64, marker={**MARKER, "group_size": 64}),
    "w6a8, scales in float32": lambda: draft_grouped(6, scale_dtype="F32"),
}
