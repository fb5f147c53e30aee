"""ComfyUI-INT8-Toolkit 1.4 `runtime_backend=triton`, restated: its data flow, tile and launch, not its code.

Two kernels. One row per program quantizes x in a block of next_power_of_2(K); then a product of 128x128x64
tiles, 8 row blocks to a group, 4 warps, 4 stages, reads the weight [N, K] through pointers of a [K, N] view
and ends with both scales and the bias.
"""

import torch
import triton
import triton.language as tl
from toolkit import quantize_rows
from torch import Tensor, nn
from triton.language.extra import libdevice

BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M = 128, 128, 64, 8
WARPS, STAGES = 4, 4


@triton.jit
def row_kernel(x_ptr, q_ptr, scale_ptr, K, BLOCK: tl.constexpr):
    """One row of x [M, K] to int8 and its scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(x_ptr + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / 127.0, 1e-30)
    q = tl.clamp(libdevice.rint(x / scale), -128.0, 127.0)
    tl.store(q_ptr + row * K + columns, q.to(tl.int8), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def product_kernel(
    q_ptr,
    w_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_qm,
    stride_wk,
    stride_wn,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of y."""
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * blocks_n) * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    rows = (first + pid % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid % (GROUP_M * blocks_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    q_tile = q_ptr + rows[:, None] * stride_qm + steps[None, :]
    w_tile = w_ptr + steps[:, None] * stride_wk + columns[None, :] * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        q = tl.load(q_tile, mask=(rows[:, None] < M) & (steps[None, :] < K - start), other=0)
        w = tl.load(w_tile, mask=(columns[None, :] < N) & (steps[:, None] < K - start), other=0)
        total += tl.dot(q, w)
        q_tile += BLOCK_K
        w_tile += BLOCK_K * stride_wk
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)
    y = total.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0)[None, :]
    tl.store(
        y_ptr + rows[:, None] * stride_ym + columns[None, :],
        y,
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


class ToolkitTritonLinear(nn.Module):
    """One converted layer on that path."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.qdata, scale = (nn.Buffer(t) for t in quantize_rows(linear.weight.float()))
        self.scale, self.bias = nn.Buffer(scale.flatten()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        (m, k), n = rows.shape, self.qdata.shape[0]
        q = torch.empty_like(rows, dtype=torch.int8)
        x_scale = torch.empty(m, dtype=torch.float32, device=x.device)
        row_kernel[(m,)](rows, q, x_scale, k, BLOCK=max(128, triton.next_power_of_2(k)))
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        product_kernel[(triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N),)](
            q,
            self.qdata,
            y,
            x_scale,
            self.scale,
            rows if self.bias is None else self.bias,
            m,
            n,
            k,
            q.stride(0),
            self.qdata.stride(1),
            self.qdata.stride(0),
            y.stride(0),
            HAS_BIAS=self.bias is not None,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            GROUP_M=GROUP_M,
            num_warps=WARPS,
            num_stages=STAGES,
        )
        return y.unflatten(0, x.shape[:-1])
