"""Files in nvfp4 and mxfp8 that must be refused."""

import numpy as np
from checkpoints.drafts.blocks import draft_ambiguous_blocks, draft_blocks
from checkpoints.drafts.changes import (
    apply_change,
    draft_with_marker,
    draft_with_tensor,
    drop_tensors,
    merge_layers,
    put_zeros,
    replace_part,
    replace_scale,
)
from checkpoints.drafts.draft import LAYER, CheckpointDraft, Mistake
from checkpoints.drafts.fp8 import draft_fp8


def draft_with_block_scale(kind: str, byte: int, tiles: bool = True) -> CheckpointDraft:
    """One scale of many is another; nvfp4 of [16, 48], mxfp8 of [32, 64]."""
    draft = draft_blocks(kind, tiles=tiles)
    dtype, shape, data = draft.tensors[f"{LAYER}.weight_scale"]
    changed = bytearray(data)
    changed[16 if tiles else 3] = byte  # that of row 1, block 0
    draft.tensors[f"{LAYER}.weight_scale"] = dtype, shape, bytes(changed)
    return draft


BLOCK_MISTAKES: dict[str, Mistake] = {
    # mxfp8 and nvfp4
    "nvfp4's scale for int8": (
        lambda: draft_with_tensor("weight_scale_2"),
        "is I8 and has blocks.0.q.weight_scale_2, which such a weight cannot have",
    ),
    "hybrid mxfp8's scale for fp8": (
        lambda: draft_with_tensor("weight_scalar", draft=draft_fp8((), "tensor")),
        "is F8_E4M3 and has blocks.0.q.weight_scalar, which such a weight cannot have",
    ),
    "nvfp4's label on int8": (
        lambda: draft_with_marker({"format": "nvfp4"}),
        "names the format 'nvfp4', and blocks.0.q.weight is I8 with a scale in F32; they contradict",
    ),
    "mxfp8's label on fp8": (
        lambda: draft_with_marker({"format": "mxfp8"}, draft_fp8((), "tensor")),
        "names the format 'mxfp8', and blocks.0.q.weight is F8_E4M3 with a scale in F32; they contradict",
    ),
    "mxfp8's label on a cast": (
        lambda: draft_with_marker({"format": "mxfp8"}, draft_fp8(None, "")),
        "names the format 'mxfp8', and blocks.0.q.weight is F8_E4M3 with no scale; they contradict",
    ),
    "fp8's label on mxfp8": (
        lambda: draft_with_marker({"format": "float8_e4m3fn"}, draft_blocks("mxfp8")),
        (
            "names the format 'float8_e4m3fn', and blocks.0.q.weight "
            "is F8_E4M3 with a scale in U8; they contradict"
        ),
    ),
    "pre-native label on nvfp4": (
        lambda: draft_with_marker({"convrot": False}, draft_blocks("nvfp4")),
        "names the format ''; int8run reads",
    ),
    "nvfp4 rotated": (
        lambda: draft_with_marker({"format": "nvfp4", "convrot": True}, draft_blocks("nvfp4")),
        "says that a weight in nvfp4 is rotated",
    ),
    "nvfp4 of other blocks": (
        lambda: draft_with_marker({"format": "nvfp4", "group_size": 32}, draft_blocks("nvfp4")),
        "names blocks of 32; nvfp4 has blocks of 16",
    ),
    "mxfp8 of other blocks": (
        lambda: draft_with_marker({"format": "mxfp8", "group_size": 16}, draft_blocks("mxfp8")),
        "names blocks of 16; mxfp8 has blocks of 32",
    ),
    "mxfp8 of experts": (
        lambda: draft_with_marker({"format": "mxfp8", "num_experts": 8}, draft_blocks("mxfp8")),
        "describes a bank of experts",
    ),
    "nvfp4 without scales": (
        lambda: drop_tensors(draft_blocks("nvfp4"), "weight_scale"),
        "blocks.0.q.weight is U8 and has no blocks.0.q.weight_scale; int8run reads such weights of nvfp4",
    ),
    "nvfp4 without its second scale": (
        lambda: drop_tensors(draft_blocks("nvfp4"), "weight_scale_2"),
        "blocks.0.q.weight is U8 and has no blocks.0.q.weight_scale_2; int8run reads such weights of nvfp4",
    ),
    "nvfp4 with two second scales": (
        lambda: apply_change(draft_blocks("nvfp4"), lambda d: d.put_scale(f"{LAYER}.weight_scale_2", 2)),
        r"weight_scale_2 has the shape \[2\]; it is one number for the whole weight",
    ),
    "nvfp4 with a second scale of zero": (
        lambda: replace_part(draft_blocks("nvfp4"), "weight_scale_2", 0),
        "1 of 1 numbers of blocks.0.q.weight_scale_2 are not finite and above 0",
    ),
    "nvfp4 with a whole second scale": (
        lambda: replace_part(draft_blocks("nvfp4"), "weight_scale_2", 1, dtype="I32"),
        "weight_scale_2 is I32; allowed are F32",
    ),
    "nvfp4 with float scales": (
        lambda: replace_scale(draft_blocks("nvfp4"), 128, 4),
        "weight_scale is F32; the scales of nvfp4 are F8_E4M3 or U8",
    ),
    "nvfp4 of 3 dimensions": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight", "U8", 2, 8, 24),
        r"weight is U8 \[2, 8, 24\]; weights in nvfp4 are U8 \[N, K / 2\], K a multiple of 16",
    ),
    "nvfp4 of no rows": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight", "U8", 0, 24),
        r"weight is U8 \[0, 24\]; weights in nvfp4",
    ),
    "nvfp4 of half a block": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight", "U8", 16, 20),
        r"weight is U8 \[16, 20\]; weights in nvfp4",
    ),
    "mxfp8 of half a block": (
        lambda: put_zeros(draft_blocks("mxfp8"), f"{LAYER}.weight", "F8_E4M3", 32, 48),
        r"weight is F8_E4M3 \[32, 48\]; weights in mxfp8 are F8_E4M3 \[N, K\], K a multiple of 32",
    ),
    "mxfp8 of e5m2": (
        lambda: put_zeros(draft_blocks("mxfp8"), f"{LAYER}.weight", "F8_E5M2", 32, 64),
        r"weight is F8_E5M2 \[32, 64\]; weights in mxfp8",
    ),
    "nvfp4's scales of another shape": (
        lambda: put_zeros(draft_blocks("nvfp4"), f"{LAYER}.weight_scale", "F8_E4M3", 128, 8),
        (
            r"weight_scale has the shape \[128, 8\]; of blocks.0.q.weight "
            r"\[16, 24\] in nvfp4 it is \[128, 4\] in tiles, \[16, 3\] in rows"
        ),
    ),
    "mxfp8's scales of another shape": (
        lambda: put_zeros(draft_blocks("mxfp8"), f"{LAYER}.weight_scale", "U8", 64, 2),
        (
            r"weight_scale has the shape \[64, 2\]; of blocks.0.q.weight "
            r"\[32, 64\] in mxfp8 it is \[128, 4\] in tiles, \[32, 2\] in rows"
        ),
    ),
    "ComfyUI's label on scales in rows": (
        lambda: draft_with_marker({"format": "nvfp4"}, draft_blocks("nvfp4", 16, 64, tiles=False)),
        (
            "says 'nvfp4', whose scales lie in tiles, and blocks.0.q.weight_scale "
            "has the shape of scales in rows; they contradict"
        ),
    ),
    "tiles beside rows": (
        lambda: merge_layers(draft_blocks("mxfp8"), draft_blocks("mxfp8", 32, 64, tiles=False)),
        (
            "the scales of blocks.0.q lie in tiles as ComfyUI has them, "
            "those of blocks.1.q in rows as ModelOpt has them; a file has one"
        ),
    ),
    "nvfp4 of nobody": (
        lambda: draft_ambiguous_blocks("nvfp4"),
        (
            "1 weight is nvfp4 .first: blocks.0.q. by ComfyUI or by ModelOpt, "
            "and neither shapes nor markers show which; set model.quant_format=nvfp4 or "
            "model.quant_format=nvfp4_modelopt, for a text encoder clip=nvfp4 or clip=nvfp4_modelopt "
            ".quant_format in a program."
        ),
    ),
    "mxfp8 of nobody": (lambda: draft_ambiguous_blocks("mxfp8"), "clip=mxfp8 or clip=mxfp8_rows"),
    "mxfp8 of nobody beside nvfp4": (
        lambda: merge_layers(draft_blocks("nvfp4"), draft_ambiguous_blocks("mxfp8")),
        "1 weight is mxfp8 .first: blocks.1.q. by",
    ),
    "nvfp4's scale is nan": (
        lambda: draft_with_block_scale("nvfp4", 0x7F),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN or negative",
    ),
    "nvfp4's scale is negative": (
        lambda: draft_with_block_scale("nvfp4", 0x81),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN or neg",
    ),
    "ModelOpt's scale is negative": (
        lambda: draft_with_block_scale("nvfp4", 0xB8, False),
        "1 of 48 numbers of blocks.0.q.weight_scale are NaN",
    ),
    "mxfp8's scale is nan": (
        lambda: draft_with_block_scale("mxfp8", 0xFF),
        "1 of 64 numbers of blocks.0.q.weight_scale are NaN or negative",
    ),
    "shape that is none": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": "12x40"}, draft_blocks("mxfp8")),
        r"names the shape 12x40, and blocks.0.q.weight has \[32, 64\], which is not padded from it",
    ),
    "shape of one number": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": [12]}, draft_blocks("mxfp8")),
        r"names the shape \[12\], and",
    ),
    "shape of fractions": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": [12.0, 40]}, draft_blocks("mxfp8")),
        r"names the shape \[12.0, 40\], and",
    ),
    "shape of another weight": (
        lambda: draft_with_marker({"format": "mxfp8", "orig_shape": [12, 65]}, draft_blocks("mxfp8")),
        r"names the shape \[12, 65\], and",
    ),
    "shape without end": (
        lambda: draft_with_marker({"format": "nvfp4", "orig_shape": [10**400, 40]}, draft_blocks("nvfp4")),
        r"names the shape \[1000",
    ),
    "shape of nothing": (
        lambda: draft_with_marker({"format": "nvfp4", "orig_shape": [0, 40]}, draft_blocks("nvfp4")),
        r"names the shape \[0, 40\], and",
    ),
    "bias of another weight": (
        lambda: replace_part(draft_blocks("nvfp4"), "bias", np.ones(17)),
        (
            r"blocks.0.q.bias has the shape \[17\], and blocks.0.q.weight "
            r"has \[16, 48\], which is not padded from it"
        ),
    ),
    "bias of two dimensions": (
        lambda: replace_part(draft_blocks("nvfp4"), "bias", np.ones((12, 1))),
        r"blocks.0.q.bias has the shape \[12, 1\], and",
    ),
    "factor of another width of nvfp4": (
        lambda: replace_part(draft_blocks("nvfp4"), "pre_quant_scale", np.ones(30)),
        (
            r"blocks.0.q.pre_quant_scale has the shape \[30\], and "
            r"blocks.0.q.weight has \[16, 48\], which is not padded from it"
        ),
    ),
    "factor of another width than said": (
        lambda: draft_with_tensor(
            "pre_quant_scale",
            draft=draft_with_marker({"format": "mxfp8", "orig_shape": [12, 40]}, draft_blocks("mxfp8")),
        ),
        r"pre_quant_scale has the shape \[64\], its weight needs \[40\]",
    ),
    "sigma for nvfp4": (
        lambda: draft_with_tensor("hadanorm_sigma", draft=draft_blocks("nvfp4")),
        "is U8 and has blocks.0.q.hadanorm_sigma, which such a",
    ),
}
