"""INT8 attention on the GPU: queries and keys in int8, values in 16 bit, in three launches of Triton kernels.

`reference.py` is the definition, `tile.py` the tile sizes, `programs.py` what one program computes:

    scores = q_int . k_int^T * q_scale * k_scale * scale            integers, exact
    output = softmax(scores + mask) . v                             online, float32 sums

The first two launches round q and k per token (rotated, keys about their mean where that is asked for), the
third is attention proper.

Probabilities and values stay 16 bit wide, where the definition rounds both to 8: the result is closer to
float attention than the definition's, by the two roundings that are left out. What that costs: the second
product runs at half the rate of int8 on data-center GPUs, at a quarter on GeForce, whose float32 sums are
slow. Why nevertheless: a chain of two int8 products has an open report of wrong results in Triton on Ada; on
Hopper Triton waits for each int8 product and lets float ones run on; and 8-bit values would have to be
transposed to lie as tensor cores read them, which costs a pass over them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from int8run.kernels.int8_attention.programs import attention_kernel, quantize_heads_kernel
from int8run.kernels.int8_attention.reference import check_attention_shapes
from int8run.kernels.int8_attention.tile import MAX_WIDTH, AttentionTile, pad_width
from int8run.kernels.quantize_rowwise.row_programs import PART
from int8run.kernels.triton_calls import FLOATS, choose_dot_precision, needs_operator

NO_STRIDES = (0, 0, 0, 0)
BLOCK_L = 32  # tokens of a program that rounds queries or keys: their channels stay in registers
HEADS_WARPS = 4


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rotation: int = 0,
    center_keys: bool = False,
    tile: AttentionTile,
) -> Tensor:
    """INT8 attention on a GPU; arguments and result are those of the reference, `int8_attention.reference`.

    q, k and v are bfloat16, float16 or float32, with up to 256 channels; a float32 value is rounded to
    bfloat16, and a tensor whose channels lie apart is copied first. `tile` is one of `tile.py`.

    Returns:
        [B, Hq, Lq, Dv] in q's dtype, the heads of a token side by side in memory.

    Raises:
        ValueError: for shapes, dtypes or a rotation that the kernels do not take.
    """
    if needs_operator(q):
        op = torch.ops.int8run.triton_int8_attention.default
        y: Tensor = op(q, k, v, mask, is_causal, scale, rotation, center_keys, tile.as_list())
        return y
    return _launch_int8_attention(q, k, v, mask, is_causal, scale, rotation, center_keys, tile)


def _run_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    rotation: int,
    center_keys: bool,
    tile: list[int],
) -> Tensor:
    """As an operator of torch, which knows no tiles."""
    return _launch_int8_attention(
        q, k, v, mask, is_causal, scale, rotation, center_keys, AttentionTile(*tile)
    )


def _int8_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    rotation: int,
    center_keys: bool,
    tile: list[int],
) -> Tensor:
    return _allocate_output(q, v).transpose(1, 2)


def _launch_int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    rotation: int,
    center_keys: bool,
    tile: AttentionTile,
) -> Tensor:
    check_attention_shapes(q, k, v, rotation)
    _check_dtypes(q, k, v, mask)
    y = _allocate_output(q, v)
    if q.shape[0] == 0:  # an empty grid cannot be launched
        return y.transpose(1, 2)
    v = _pack_channels(v.to(torch.bfloat16) if v.dtype == torch.float32 else v)
    mask = None if mask is None else _expand_mask(mask, q, k)
    mean = k.mean(dim=2, dtype=torch.float32) if center_keys else None  # [B, Hkv, D]
    if scale is None:
        scale = q.shape[3] ** -0.5
    # Triton launches on the current device, which need not be q's
    with torch.accelerator.device_index(q.device.index):
        queries = _quantize_heads(q, None, rotation)
        keys = _quantize_heads(k, mean, rotation)
        _launch_attention(queries, keys, v, mask, y, scale, is_causal, tile)
    return y.transpose(1, 2)


class Heads(NamedTuple):
    """Queries or keys in int8."""

    integers: Tensor  # int8 [B, H, L, D up to a power of two]
    scale: Tensor  # float32 [B, H, L]


def _quantize_heads(x: Tensor, mean: Tensor | None, rotation: int) -> Heads:
    """Round [B, H, L, D] per token, about a mean [B, H, D] where there is one."""
    x = _pack_channels(x)
    batch, heads, length, width = x.shape
    block_d = pad_width(width)
    integers = torch.empty((batch, heads, length, block_d), dtype=torch.int8, device=x.device)
    scale = torch.empty((batch, heads, length), dtype=torch.float32, device=x.device)
    parts = count_parts(block_d)
    quantize_heads_kernel[(batch * heads * -(-length // BLOCK_L),)](
        x,
        mean,
        integers,
        scale,
        length,
        width,
        heads,
        *x.stride()[:3],
        HAS_MEAN=mean is not None,
        ROTATION=rotation,
        SYLVESTER=not is_regular(rotation),
        PRECISION=choose_dot_precision(x.dtype),
        MEAN_PRECISION=choose_dot_precision(torch.float32),
        EVEN_D=width == parts * PART.value,
        PARTS=parts,
        BLOCK_D=block_d,
        BLOCK_L=BLOCK_L,
        num_warps=HEADS_WARPS,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return Heads(integers, scale)


def _launch_attention(
    queries: Heads,
    keys: Heads,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    scale: float,
    is_causal: bool,
    tile: AttentionTile,
) -> None:
    """Write y [B, Lq, Hq, Dv]."""
    batch, n_queries, heads, v_width = y.shape
    kv_heads, n_keys = keys.scale.shape[1:]
    block_v = pad_width(v_width)
    mask_strides = NO_STRIDES if mask is None else mask.stride()
    n_programs = batch * heads * -(-n_queries // tile.block_m)
    attention_kernel[(n_programs,)](
        queries.integers,
        queries.scale,
        keys.integers,
        keys.scale,
        v,
        mask,
        y,
        scale,
        n_queries,
        n_keys,
        v_width,
        heads,
        kv_heads,
        *v.stride()[:3],
        *mask_strides,
        MASK=name_mask(mask),
        ROW_MASK=mask_strides[2] != 0,
        CAUSAL=is_causal,
        EVEN_K=n_keys % tile.block_n == 0,
        EVEN_V=v_width == block_v,
        BLOCK_D=queries.integers.shape[3],
        BLOCK_V=block_v,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def count_parts(block_d: int) -> int:
    """Parts of 64 channels in a padded head."""
    parts: int = -(-block_d // PART.value)
    return parts


def is_regular(rotation: int) -> bool:
    """Whether a group is rotated by the regular Hadamard matrix: its size is a power of 4. 0: no rotation."""
    return rotation.bit_length() % 2 == 1 and rotation >= 4


def name_mask(mask: Tensor | None) -> str:
    """What the kernel calls a mask that `_expand_mask` made."""
    if mask is None:
        return "none"
    return "bool" if mask.dtype == torch.uint8 else "float"


def _expand_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """[B, Hq, Lq, Lk] without a copy; a bool mask as bytes."""
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return mask.expand(*q.shape[:3], k.shape[2])


def _pack_channels(x: Tensor) -> Tensor:
    """The same with neighboring channels side by side, as the kernels load them."""
    return x if x.stride(3) == 1 else x.contiguous()


def _allocate_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, Lq, Hq, Dv]: the heads of a token side by side, as the layer behind attention takes them."""
    batch, heads, queries, _ = q.shape
    return torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)


def _check_dtypes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be bfloat16, float16 or float32, not {tensor.dtype}")
    if mask is not None and mask.dtype not in (torch.bool, *FLOATS):
        raise ValueError(f"mask must be bool, bfloat16, float16 or float32, not {mask.dtype}")
    widest = max(q.shape[3], v.shape[3])
    if widest > MAX_WIDTH:
        raise ValueError(f"a head has {widest} channels; the kernel takes up to {MAX_WIDTH}")


# registered by hand: `custom_op` adds 12 microseconds to every call, this 3
ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "triton_int8_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, "
    "int rotation, bool center_keys, int[] tile) -> Tensor"
)
ops.impl("triton_int8_attention", _run_operator, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_int8_attention", _int8_attention_fake, lib=ops)
