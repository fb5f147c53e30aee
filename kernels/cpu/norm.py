"""RMSNorm on a CPU as a torch operator, `int8run::cpu_rms_norm`: one pass over memory.

`backends/cpu.py` calls it. Torch's own takes a pass for the squares, their mean, and each product.
"""

import torch
from torch import Tensor

from int8run.kernels.cpu.instructions import AUTO
from int8run.kernels.cpu.library import load_linear_library
from int8run.kernels.cpu.linear import DTYPES

ops = torch.library.Library("int8run", "FRAGMENT")
ops.define("cpu_rms_norm(Tensor x, Tensor? weight, float eps, str instructions) -> Tensor")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, instructions: str = AUTO) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, computed in float32 and rounded once.

    Args:
        x: [..., K], contiguous; float32, bfloat16 or float16.
        weight: [K] in x's dtype, contiguous, or None.
        eps: added to the mean.
        instructions: name of an instruction set, or `auto`.

    Returns:
        [..., K] in x's dtype.

    Raises:
        ValueError: for tensors that do not fit each other.
    """
    y: Tensor = torch.ops.int8run.cpu_rms_norm.default(x, weight, eps, instructions)
    return y


def _rms_norm_impl(x: Tensor, weight: Tensor | None, eps: float, instructions: str) -> Tensor:
    width = x.shape[-1]
    fits = weight is None or (weight.dtype == x.dtype and weight.shape == (width,) and weight.is_contiguous())
    if x.dtype not in DTYPES or not x.is_contiguous() or not fits:
        raise ValueError(
            "x must be contiguous float32, bfloat16 or float16 [..., K] with a contiguous weight [K] alike"
        )
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    load_linear_library(instructions).functions.int8run_rms_norm(
        x.data_ptr(),
        None if weight is None else weight.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // width,
        width,
        eps,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _rms_norm_fake(x: Tensor, weight: Tensor | None, eps: float, instructions: str) -> Tensor:
    return torch.empty_like(x)


ops.impl("cpu_rms_norm", _rms_norm_impl, "CPU")
torch.library.register_fake("int8run::cpu_rms_norm", _rms_norm_fake, lib=ops)
