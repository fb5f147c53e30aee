"""ComfyUI-INT8-Toolkit 1.4 `runtime_backend=torch_int_mm`, restated from its formulas.

Every step is its own torch operator.

    s_x = max(|x_row|) / 127, q = clamp(round(x * (1 / s_x)), -128, 127), y = (q @ Qᵀ) * s_x * s_w + b

One difference, in its favour: for float32 inputs the original rounds the result to bfloat16, which costs a
pass and precision; here it keeps the dtype of x, as the original does for bfloat16 and float16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SCALE = 1e-30
GROUP = 128  # of its rotation (`quarot`)
CUDA_MIN_ROWS = 17


def make_hadamard(size: int) -> Tensor:
    """The orthonormal Sylvester Hadamard matrix of a power of two."""
    block, matrix = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(block, matrix)
    return matrix / size**0.5


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, by multiplication with the reciprocal. x: [R, K] -> int8 [R, K], float32 [R, 1]."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / 127.0).clamp(min=SMALLEST_SCALE)
    return x.float().mul(1.0 / scale).round_().clamp_(-128.0, 127.0).to(torch.int8), scale


class ToolkitLinear(nn.Module):
    """One converted layer; `group=128` adds its rotation where the width allows."""

    def __init__(self, linear: nn.Linear, group: int = 0):
        super().__init__()
        weight, self.group = linear.weight.float(), group
        if group and weight.shape[1] % group == 0:
            self.register_buffer("matrix", make_hadamard(group).to(weight.device))
            weight = (weight.unflatten(-1, (-1, group)) @ self.matrix.T).flatten(-2)
        else:
            self.matrix = None
        self.qdata, self.scale = (nn.Buffer(t) for t in quantize_rows(weight))
        self.bias = linear.bias

    def rows(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [M, K], rotated."""
        rows = x.reshape(-1, x.shape[-1])
        if self.matrix is not None:
            rows = (rows.unflatten(-1, (-1, self.group)) @ self.matrix.to(x.dtype)).flatten(-2)
        return rows

    def forward(self, x: Tensor) -> Tensor:
        q, scale = quantize_rows(self.rows(x))
        if q.is_cuda and q.shape[0] < CUDA_MIN_ROWS:
            accumulated = torch._int_mm(F.pad(q, (0, 0, 0, CUDA_MIN_ROWS - q.shape[0])), self.qdata.T)[
                : q.shape[0]
            ]
        else:
            accumulated = torch._int_mm(q, self.qdata.T)
        y = accumulated.float().mul_(scale).mul_(self.scale.T).to(x.dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.unflatten(0, x.shape[:-1])
