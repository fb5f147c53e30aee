"""The product with a weight of 4 or 6 bits on the GPU, in one Triton kernel that decodes it on the way.

`reference.py` is the definition: the integers are those of `decode_grouped_weight`. `layout.py` has the
weight's layout, `programs.py` what a program computes, `tile.py` its tiles; `backends/triton.py` calls this.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from int8run.kernels.grouped_weight.layout import PackedCodes, check_groups, count_span_columns
from int8run.kernels.grouped_weight.programs import decode_weight_kernel, grouped_linear_kernel
from int8run.kernels.int8_linear.layouts import check_branch, check_product
from int8run.kernels.int8_linear.tile import Tile, choose_block_r
from int8run.kernels.triton_calls import Layout, choose_dot_precision, describe_layout, needs_operator

# what one program of `decode_weight` computes
DECODED_ROWS, DECODED_COLUMNS, DECODING_WARPS = 16, 256, 4


def grouped_linear(
    q: Tensor,
    x_scale: Tensor,
    weight: PackedCodes,
    w_scale: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    strengths: Tensor | None = None,
) -> Tensor:
    """`int8_linear/kernel.py` with the int8 weight that codes and group scales decode to.

    Args:
        q: int8 [M, K].
        x_scale: float32 [M, 1].
        weight: [N, K]; its groups divide K, and are a divisor or a multiple of 16.
        w_scale: float32 [N].
        bias: [N], any float dtype, or None.
        h: float32 [M, R], as for `int8_linear`; so are the following.
        up: [N, R].
        out_dtype: bfloat16, float16 or float32.
        tile: block_k is a multiple of a span (`layout.count_span_columns`).
        strengths: float32 [R].

    Returns:
        [M, N] in out_dtype.

    Raises:
        ValueError: for shapes, dtypes, strides or a tile that do not fit each other.
    """
    if needs_operator(q):
        op = torch.ops.int8run.triton_grouped_linear.default
        y: Tensor = op(q, x_scale, *weight, w_scale, bias, h, up, strengths, out_dtype, tile.as_list())
        return y
    return _launch_grouped_linear(q, x_scale, weight, w_scale, bias, h, up, strengths, out_dtype, tile)


def _run_operator(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    codebook: Tensor | None,
    bits: int,
    group: int,
    w_scale: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    strengths: Tensor | None,
    out_dtype: torch.dtype,
    tile: list[int],
) -> Tensor:
    """As an operator of torch, which knows neither tiles nor weights."""
    weight = PackedCodes(codes, group_scale, codebook, bits, group)
    return _launch_grouped_linear(
        q, x_scale, weight, w_scale, bias, h, up, strengths, out_dtype, Tile.from_list(tile)
    )


def _launch_grouped_linear(
    q: Tensor,
    x_scale: Tensor,
    weight: PackedCodes,
    w_scale: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    strengths: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    codes, group_scale, codebook, bits, group = weight
    if group_scale.dtype != torch.float32:
        codebook = None  # the table has its levels
    options = _plan_launch(
        describe_layout(q),
        describe_layout(x_scale),
        describe_layout(codes),
        describe_layout(group_scale),
        None if codebook is None else describe_layout(codebook),
        bits,
        group,
        describe_layout(w_scale),
        None if bias is None else describe_layout(bias),
        None if h is None else describe_layout(h),
        None if up is None else describe_layout(up),
        None if strengths is None else describe_layout(strengths),
        out_dtype,
        tile,
    )
    (m, k), n = q.shape, codes.shape[0]
    rank, stride_hm = (0, 0) if h is None else (h.shape[1], h.stride(0))
    y = torch.empty(m, n, dtype=out_dtype, device=q.device)
    n_programs = -(-m // tile.block_m) * -(-n // tile.block_n)
    # Triton launches on the current device, which need not be q's
    with torch.accelerator.device_index(q.device.index):
        grouped_linear_kernel[(n_programs,)](
            q,
            x_scale,
            codes,
            group_scale,
            codebook,
            w_scale,
            bias,
            h,
            up,
            strengths,
            y,
            m,
            n,
            k,
            rank,
            stride_hm,
            **options,
        )
    return y


@functools.lru_cache(maxsize=4096)
def _plan_launch(
    q: Layout,
    x_scale: Layout,
    codes: Layout,
    group_scale: Layout,
    codebook: Layout | None,
    bits: int,
    group: int,
    w_scale: Layout,
    bias: Layout | None,
    h: Layout | None,
    up: Layout | None,
    strengths: Layout | None,
    out_dtype: torch.dtype,
    tile: Tile,
) -> dict[str, Any]:
    """Check the arguments, once for every layout of them, and choose the kernel's constants and its warps.

    Raises:
        ValueError: for layouts that do not fit each other, or that the kernel does not take.
    """
    n = codes.shape[0]
    k = q.shape[1] if len(q.shape) == 2 else 0
    decoded = Layout((n, k), torch.int8, (k, 1))
    check_product(q, x_scale, decoded, w_scale, bias, group=0, out_dtype=out_dtype)
    check_groups(codes, group_scale, codebook, columns=k, bits=bits, group=group)
    span = count_span_columns(bits)
    if tile.block_k % span:
        raise ValueError(f"block_k of a tile for {bits} bits is a multiple of {span}, not {tile.block_k}")
    rank = check_branch(h, up, strengths, m=q.shape[0], n=n)
    return {
        "BITS": bits,
        "GROUP": group,
        "HAS_BIAS": bias is not None,
        "BLOCK_R": choose_block_r(rank),
        "PRECISION": choose_dot_precision(torch.float32 if up is None else up.dtype),
        "EVEN_N": n % tile.block_n == 0,
        "EVEN_K": k % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def decode_weight(weight: PackedCodes, columns: int) -> Tensor:
    """The int8 weight [N, columns] that the product decodes tile by tile, as `int8_linear` takes it.

    Raises:
        ValueError: for a weight whose parts do not fit each other.
    """
    if needs_operator(weight.codes):
        qdata: Tensor = torch.ops.int8run.triton_decode_weight.default(*weight, columns)
        return qdata
    return _launch_decode_weight(*weight, columns)


def _launch_decode_weight(
    codes: Tensor, group_scale: Tensor, codebook: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    if group_scale.dtype != torch.float32:
        codebook = None  # the table has its levels
    levels = None if codebook is None else describe_layout(codebook)
    check_groups(
        describe_layout(codes), describe_layout(group_scale), levels, columns=columns, bits=bits, group=group
    )
    rows = codes.shape[0]
    qdata = torch.empty(rows, columns, dtype=torch.int8, device=codes.device)
    grid = (-(-rows // DECODED_ROWS), -(-columns // DECODED_COLUMNS))
    with torch.accelerator.device_index(codes.device.index):
        decode_weight_kernel[grid](
            codes,
            group_scale,
            codebook,
            qdata,
            rows,
            columns,
            BITS=bits,
            GROUP=group,
            BLOCK_N=DECODED_ROWS,
            BLOCK_K=DECODED_COLUMNS,
            num_warps=DECODING_WARPS,
        )
    return qdata


def _decode_weight_fake(
    codes: Tensor, group_scale: Tensor, codebook: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    return codes.new_empty((codes.shape[0], columns), dtype=torch.int8)


def _grouped_linear_fake(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    codebook: Tensor | None,
    bits: int,
    group: int,
    w_scale: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    up: Tensor | None,
    strengths: Tensor | None,
    out_dtype: torch.dtype,
    tile: list[int],
) -> Tensor:
    return q.new_empty((q.shape[0], codes.shape[0]), dtype=out_dtype)


# registered by hand: `custom_op` adds 12 microseconds to every call, this 3
ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "triton_grouped_linear(Tensor q, Tensor x_scale, Tensor codes, Tensor group_scale, Tensor? codebook, "
    "int bits, int group, Tensor w_scale, Tensor? bias, Tensor? h, Tensor? up, Tensor? strengths, "
    "ScalarType out_dtype, int[] tile) -> Tensor"
)
ops.impl("triton_grouped_linear", _run_operator, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_grouped_linear", _grouped_linear_fake, lib=ops)
ops.define(
    "triton_decode_weight(Tensor codes, Tensor group_scale, Tensor? codebook, int bits, int group, "
    "int columns) -> Tensor"
)
ops.impl("triton_decode_weight", _launch_decode_weight, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_decode_weight", _decode_weight_fake, lib=ops)
