"""Checkpoints in nvfp4 and mxfp8, whose small scales lie in tiles (ComfyUI) or in rows (ModelOpt)."""

import numpy as np
from checkpoints.drafts.draft import LAYER, CheckpointDraft, Draft, N, set_expected
from checkpoints.drafts.numbers import E2M1, Array, decode_fp8, expand_blocks, round_up
from numpy.typing import NDArray


def swizzle(scale: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same scales where cuBLAS wants them, and rubbish where it wants none."""
    rows, columns = scale.shape
    shape = round_up(rows, 128), round_up(columns, 4)
    flat = np.full(shape, 0xFF, np.uint8).reshape(-1)

    r, c = np.indices(scale.shape)
    tiles_in_a_row = shape[1] // 4
    tile = r // 128 * tiles_in_a_row + c // 4  # of 128 rows and 4 columns
    place = r % 32 * 16 + r % 128 // 32 * 4 + c % 4  # in the tile
    flat[tile * 512 + place] = scale
    return flat.reshape(shape)


def put_block_scales(draft: CheckpointDraft, scale: NDArray[np.uint8], tiles: bool, dtype: str) -> None:
    found = swizzle(scale) if tiles else scale
    draft.tensors[f"{LAYER}.weight_scale"] = dtype, found.shape, found.tobytes()


def put_nvfp4(draft: CheckpointDraft, rows: int, columns: int, *, tiles: bool, dtype: str) -> Array:
    """Add two numbers of 4 bits a byte, a scale in e4m3 for each 16, and one for all. Returns the weight."""
    codes = draft.generator.integers(0, 256, (rows, columns // 2)).astype("u1")
    draft.tensors[f"{LAYER}.weight"] = "U8", codes.shape, codes.tobytes()
    high, low = codes >> 4, codes & 15
    pairs = (high, low) if tiles else (low, high)  # ComfyUI has the first number on top, ModelOpt below
    numbers = E2M1[np.stack(pairs, -1)]  # [rows, columns / 2, 2]

    scale = draft.generator.integers(0, 0x7F, (rows, columns // 16)).astype("u1")
    scale_of_all = draft.put_scale(f"{LAYER}.weight_scale_2")
    put_block_scales(draft, scale, tiles, dtype or "F8_E4M3")
    return numbers.reshape(rows, columns) * expand_blocks(decode_fp8(scale, 4), 1, 16) * scale_of_all


def put_mxfp8(draft: CheckpointDraft, rows: int, columns: int, *, tiles: bool, dtype: str) -> Array:
    """Add numbers in e4m3 and for each 32 of them a power of 2. Returns the weight."""
    numbers = draft.put_fp8(f"{LAYER}.weight", "F8_E4M3", rows, columns)
    scale = draft.generator.integers(100, 140, (rows, columns // 32)).astype("u1")
    put_block_scales(draft, scale, tiles, dtype or "U8")
    return numbers * expand_blocks(2.0 ** (scale - 127.0), 1, 32)


def draft_blocks(
    kind: str,
    n: int = N,
    k: int = 40,
    *,
    marker: object = None,
    tiles: bool = True,
    dtype: str = "",
    rows: int | None = None,
    header: object = None,
    bias: bool = True,
    word: str = "",
    told: tuple[bool, bool] | None = None,
    scalar: bool = False,
) -> CheckpointDraft:
    """mxfp8 or nvfp4 with random numbers, also in the padding.

    Args:
        n, k: of the weight.
        rows: in the file; None: padded as ComfyUI pads.
        told: which of them the file tells.
    """
    draft = CheckpointDraft()
    block_size, put_weight = (16, put_nvfp4) if kind == "nvfp4" else (32, put_mxfp8)
    padded_rows = rows or round_up(n, block_size)
    padded_columns = round_up(k, block_size)
    padded = put_weight(draft, padded_rows, padded_columns, tiles=tiles, dtype=dtype)

    if scalar:
        draft.put_scale(f"{LAYER}.weight_scalar")
    if marker is not None:
        draft.put_marker(f"{LAYER}.comfy_quant", marker)
    if header is not None:
        draft.put_header({LAYER: header})
    if bias:
        draft.put(f"{LAYER}.bias", "F32", np.zeros(n))

    name = word or kind
    tells_rows, tells_columns = told or (bias, False)
    set_expected(draft, padded[:n, :k], kind, "block", name, is_usable_as_is=False, outlier_method="none")
    draft.expected |= {
        "format_name": name,
        "is_packable": True,
        "declared": (tells_rows, tells_columns),
        "is_padded": not (tells_rows and tells_columns),
        "block_size": block_size,
        "rows": n if tells_rows else padded_rows,
        "columns": k if tells_columns else padded_columns,
    }
    return draft


def draft_smoothed_blocks(kind: str) -> CheckpointDraft:
    """The factors tell K."""
    draft = draft_blocks(kind, marker={"format": kind}, told=(True, True))
    factor = draft.put(f"{LAYER}.pre_quant_scale", "F32", draft.generator.uniform(0.5, 2, 40))
    draft.real[LAYER] = draft.real[LAYER] * factor
    return draft


def draft_ambiguous_blocks(kind: str, n: int = 128, k: int = 128) -> CheckpointDraft:
    """Scales of a shape that they have in tiles and in rows."""
    return draft_blocks(kind, n, k, bias=False)


BLOCK_DRAFTS: dict[str, Draft] = {
    # blocks with small scales
    "nvfp4": lambda: draft_blocks("nvfp4", marker={"format": "nvfp4"}),
    "nvfp4 in the header": lambda: draft_blocks("nvfp4", header={"format": "nvfp4"}, dtype="U8"),
    "nvfp4 with its shape": lambda: draft_blocks(
        "nvfp4", marker={"format": "nvfp4", "orig_shape": [N, 40]}, bias=False, told=(True, True)
    ),
    "nvfp4 without a marker": lambda: draft_blocks("nvfp4", 16, 64, bias=False),
    "nvfp4 of many tiles": lambda: draft_blocks(
        "nvfp4", 272, 160, marker={"format": "nvfp4", "group_size": 16}
    ),
    "nvfp4 smoothed": lambda: draft_smoothed_blocks("nvfp4"),
    "nvfp4 by ModelOpt": lambda: draft_blocks("nvfp4", 16, 64, tiles=False, word="nvfp4_modelopt"),
    "nvfp4 by ModelOpt, wide": lambda: draft_blocks(
        "nvfp4", 130, 48, tiles=False, word="nvfp4_modelopt", rows=130, bias=False
    ),
    "mxfp8": lambda: draft_blocks(
        "mxfp8", marker={"format": "mxfp8", "group_size": 32, "orig_dtype": "torch.bfloat16"}
    ),
    "mxfp8 in the header": lambda: draft_blocks(
        "mxfp8", header={"format": "mxfp8", "orig_shape": [N, 40]}, told=(True, True)
    ),
    "mxfp8 in e8m0": lambda: draft_blocks("mxfp8", dtype="F8_E8M0"),
    "mxfp8 with all its rows": lambda: draft_blocks("mxfp8", N, 64, marker={"format": "mxfp8"}, rows=N),
    "mxfp8 of many tiles": lambda: draft_blocks("mxfp8", 272, 320, bias=False),
    "mxfp8 smoothed": lambda: draft_smoothed_blocks("mxfp8"),
    "mxfp8 in rows": lambda: draft_blocks("mxfp8", 32, 320, tiles=False, word="mxfp8_rows"),
    "hybrid mxfp8": lambda: draft_blocks("mxfp8", marker={"format": "hybrid_mxfp8"}, scalar=True),
}
