"""What calls of the Triton kernels have in common: how their arguments lie in memory, and what varies by GPU.

Arguments are checked once for each layout of them: a layer has the same at every call, and checks in Python
would take longer than the launch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANK = 256  # of a low-rank branch whose first half a quantization keeps in registers


class Layout(NamedTuple):
    """Everything about a tensor that a kernel's checks ask for; equal for equal calls."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    def is_contiguous(self, shape: tuple[int, ...], *dtypes: torch.dtype) -> bool:
        """Whether it is of this shape and one of these dtypes, without gaps."""
        return (
            self.shape == shape and self.dtype in dtypes and self.has_packed_columns and self.has_packed_rows
        )

    @property
    def has_packed_columns(self) -> bool:
        """Whether neighboring columns are neighbors in memory."""
        return not self.shape or self.shape[-1] == 1 or self.stride[-1] == 1

    @property
    def has_packed_rows(self) -> bool:
        """Whether each row of a matrix follows the one before it."""
        return len(self.shape) < 2 or self.shape[0] == 1 or self.stride[0] == self.shape[1]


def describe_layout(tensor: Tensor) -> Layout:
    """How a tensor lies in memory."""
    return Layout(tensor.shape, tensor.dtype, tensor.stride())


def needs_operator(tensor: Tensor) -> bool:
    """Whether a call must go through torch's dispatcher, so that compilers and fake tensors see an operator.

    Else the kernel is launched directly: the dispatcher takes longer than everything else of a call.
    """
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


# whether the GPUs that this torch is for are AMD's
IS_AMD = torch.version.hip is not None


def choose_dot_precision(dtype: torch.dtype, *, is_amd: bool = IS_AMD) -> str:
    """The `input_precision` of `tl.dot` for operands of this dtype.

    Of float32 operands NVIDIA's tensor cores take 10 bits of mantissa: three products in tf32 make up for it.
    AMD's take all bits, and its compiler refuses the word. Half precision has nothing to choose.
    """
    if dtype == torch.float32 and not is_amd:
        return "tf32x3"
    return "ieee"
