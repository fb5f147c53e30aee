"""What adapter types other than low-rank pairs do, by plain formulas."""

import torch
from torch import Tensor


def kron_by_blocks(w1: Tensor, w2: Tensor) -> Tensor:
    """[a, c] and [b, d] -> [a b, c d]."""
    return torch.einsum("ac,bd->abcd", w1, w2).reshape(len(w1) * len(w2), -1)


def apply_dora(w: Tensor, change: Tensor, magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    """DoRA: `m (W + c) / ||W + c|| - W`, norms over `dims`."""
    return magnitude * (w + change) / (w + change).pow(2).sum(dims, keepdim=True).sqrt() - w


def multiply_tucker(mid: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[r, r, kh, kw], [out, r], [r, in] -> [out, in, kh, kw]."""
    return torch.einsum("mnhw,om,ni->oihw", mid, up, down)
