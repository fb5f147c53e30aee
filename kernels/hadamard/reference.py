"""Hadamard matrices, by which groups of columns are rotated to spread outliers (ConvRot, QuaRot).

An orthonormal matrix H of signs over sqrt(size): `x H` for the input and `W H` for the weight leave the
product as it was, because H is its own inverse. The kernels of `quantize_rowwise` and `cpu` rotate without
the matrix, by sums and differences; this is their definition.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """How groups of neighboring columns are rotated."""

    matrix: Tensor  # float32 [g, g]: symmetric, orthonormal, its own inverse
    sylvester: bool = False  # Sylvester's construction; else the regular one

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.matrix.shape[0]


def regular_hadamard(size: int) -> Tensor:
    """The orthonormal regular Hadamard matrix of a power of 4.

    Kronecker powers of a 4x4 block, divided by sqrt(size). Every row and column sums to the same value, so
    that a group with a large mean is not moved into one entry, which Sylvester's all-ones row does (ConvRot;
    comfy-kitchen uses the same matrix). It is symmetric and its own inverse.

    Returns:
        float32 [size, size].

    Raises:
        ValueError: when size is not a power of 4.
    """
    if size < 4 or 4 ** round(torch.log2(torch.tensor(size)).item() / 2) != size:
        raise ValueError(f"a regular Hadamard matrix needs a power of 4, not {size}")
    block = torch.tensor(
        [
            [1.0, 1.0, 1.0, -1.0],
            [1.0, 1.0, -1.0, 1.0],
            [1.0, -1.0, 1.0, 1.0],
            [-1.0, 1.0, 1.0, 1.0],
        ]
    )
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, block)
    orthonormal: Tensor = matrix / size**0.5
    return orthonormal


def sylvester_hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of 2 by Sylvester.

    Kronecker powers of a 2x2 block, divided by sqrt(size). What QuaRot and the INT8-Toolkit rotate by.
    Symmetric and its own inverse.

    Returns:
        float32 [size, size].

    Raises:
        ValueError: when size is not a power of 2.
    """
    if size < 2 or size & (size - 1):
        raise ValueError(f"Sylvester's matrix needs a power of 2, not {size}")
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(block, matrix)
    orthonormal: Tensor = matrix / size**0.5
    return orthonormal


def rotate_groups(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotate each group of neighboring columns: `x_g @ matrix`.

    Args:
        x: [..., K].
        matrix: [g, g], where g divides K.

    Returns:
        [..., K].
    """
    group = matrix.shape[0]
    groups: Tensor = x.unflatten(-1, (-1, group))  # [..., K / g, g]
    return (groups @ matrix).flatten(-2)
