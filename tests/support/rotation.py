"""The rotation of ConvRot in groups of 16 columns, written out: a formula of the tests' own."""

import torch
from torch import Tensor

GROUP = 16  # 256 in published files, whose layers are wider


def make_hadamard() -> Tensor:
    """The Kronecker square of the regular Hadamard matrix of 4; its minus signs are on the other diagonal."""
    base = 1 - 2 * torch.eye(4).flip(0)
    return torch.kron(base, base) / 4


def rotate_groups(weight: Tensor) -> Tensor:
    """Each group of columns times the transposed matrix. weight: [N, K]"""
    groups = weight.reshape(len(weight), -1, GROUP)  # [N, K] -> [N, K / 16, 16]
    return (groups @ make_hadamard().T).reshape(weight.shape)
