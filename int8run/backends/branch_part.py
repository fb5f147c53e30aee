"""What the Triton products take of a low-rank branch."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from int8run.backends.base import FusedBranch, QuantizedInput


class BranchPart(NamedTuple):
    """What the product takes of a low-rank branch; None without one.

    Args:
        h: float32 [M, r], the input times the branch's first factor.
        up: [N, r], its second factor.
        strengths: float32 [r].
    """

    h: Tensor | None = None
    up: Tensor | None = None
    strengths: Tensor | None = None


def select_branch_part(x: QuantizedInput, branch: FusedBranch | None, strengths: Tensor | None) -> BranchPart:
    """What the product takes of a branch.

    Args:
        x: from `quantize`, which has multiplied it with the branch's first factor.
        branch: or None.
        strengths: float32 [r], one per rank.

    Raises:
        ValueError: where that product is missing.
    """
    if branch is None:
        return BranchPart()
    if x.down_product is None:
        raise ValueError("a branch needs down_product, which quantize(down=branch.down) computes")
    padding = 0 if strengths is None else branch.up.shape[1] - strengths.shape[0]
    if strengths is not None and padding:
        strengths = F.pad(strengths, (0, padding))
    return BranchPart(x.down_product, branch.up, strengths)
