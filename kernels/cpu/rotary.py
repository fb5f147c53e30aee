"""Rotary position embedding on a CPU as a torch operator, `int8run::cpu_rotary`: one pass over memory.

`backends/cpu.py` calls it. The definition is diffusers' `apply_rotary_emb` of neighboring pairs, whose bits
it gives.
"""

import torch
from torch import Tensor

from int8run.kernels.cpu.instructions import AUTO
from int8run.kernels.cpu.library import load_linear_library
from int8run.kernels.cpu.linear import DTYPES, FLOAT32

ops = torch.library.Library("int8run", "FRAGMENT")
ops.define("cpu_rotary(Tensor x, Tensor cos, Tensor sin, bool tokens_first, str instructions) -> Tensor")


def rotate_positions(
    x: Tensor, cos: Tensor, sin: Tensor, *, tokens_first: bool, instructions: str = AUTO
) -> Tensor:
    """Rotate each pair of neighboring channels by the angle of its token, in float32, rounded once.

    Args:
        x: [B, tokens, heads, D] or [B, heads, tokens, D], contiguous; float32, bfloat16 or float16; D is
            even.
        cos: float32 [tokens, D], contiguous, of the angles.
        sin: as `cos`.
        tokens_first: whether tokens come before heads.
        instructions: name of an instruction set, or `auto`.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: for tensors that do not fit each other.
    """
    y: Tensor = torch.ops.int8run.cpu_rotary.default(x, cos, sin, tokens_first, instructions)
    return y


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor, *, tokens_first: bool) -> bool:
    """Whether the kernel takes these tensors as they are."""
    if x.dim() != 4 or x.dtype not in DTYPES or not x.is_contiguous() or x.shape[3] % 2:
        return False
    tokens = x.shape[1] if tokens_first else x.shape[2]
    return all(
        each.dtype is FLOAT32 and each.shape == (tokens, x.shape[3]) and each.is_contiguous()
        for each in (cos, sin)
    )


def _rotary_impl(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, instructions: str) -> Tensor:
    if not can_rotate(x, cos, sin, tokens_first=tokens_first):
        raise ValueError(
            "x must be contiguous float32, bfloat16 or float16 with an even number of channels, cos and sin "
            f"contiguous float32 [tokens, channels], not {list(x.shape)} and {list(cos.shape)}"
        )
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    _, second, third, width = x.shape
    tokens, rows_of_token = (second, third) if tokens_first else (third, 1)
    load_linear_library(instructions).functions.int8run_rotary(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // width,
        tokens,
        rows_of_token,
        width,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, instructions: str) -> Tensor:
    return torch.empty_like(x)


ops.impl("cpu_rotary", _rotary_impl, "CPU")
torch.library.register_fake("int8run::cpu_rotary", _rotary_fake, lib=ops)
