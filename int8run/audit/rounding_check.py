"""By which recipe integers were rounded: whether they, and their scales, are what a known rounding gives.

`compare_layer` feeds it with the base's rows under the transform that was proven.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.audit.row_sums import sum_products
from int8run.checkpoints.layer import CheckpointLayer
from int8run.kernels.cpu.rows import RowSums, quantize_weight_rows
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, TINY
from int8run.outlier.base import OutlierTransform
from int8run.quant.block_encoding import compute_block_absmax
from int8run.quant.rounding import Mse

EXACT_SCALE, COARSE_SCALE = 1e-6, 4e-3  # relative, of scales in float32 and in fewer bits
ABSMAX, MSE, NEAREST = "absmax", "mse", "nearest at its own scales"


def round_exactly(weight: Tensor, transform: OutlierTransform) -> tuple[Tensor, Tensor, RowSums]:
    """Integers and scales as `task=quantize` writes them, with the sums of their errors.

    Args:
        weight: rows of the base, [n, K] of any float dtype.
        transform: that the file's numbers are stored under.

    Returns:
        int8 [n, K], float32 [n, 1], sums.
    """
    arranged = transform.arrange_columns(weight).contiguous()
    q = torch.empty(arranged.shape, dtype=torch.int8)
    scale = torch.empty(len(arranged), 1)
    sums = quantize_weight_rows(arranged, q, scale, transform.factor, transform.rotation)
    return transform.restore_columns(q), scale, sums


@dataclass(frozen=True)
class RoundedRows:
    """Some rows of a file and what they should be.

    Args:
        q: int8 [n, K], of the file.
        scales: float32 [n, blocks of a row], of the file.
        steps: the same for every number, [n, 1] or [n, K].
        reference: the base's rows under the transform, float32 [n, K].
    """

    q: Tensor
    scales: Tensor
    steps: Tensor
    reference: Tensor


class RoundingCheck:
    """Counts what is not as the nearest integers at scales of absmax / 127.

    Args:
        layer: of the file.
        tolerance: relative, of its scales.
    """

    def __init__(self, layer: CheckpointLayer, tolerance: float):
        self.layer = layer
        self.tolerance = tolerance
        self.differing = self.total = 0
        self.largest_step = 0
        self.wrong_scales = self.inexact_scales = 0
        self.absmax = 0.0  # of all rows, for one scale of all

    def add(self, rows: RoundedRows) -> float:
        """Compare some rows. Returns the squared error of the nearest integers at the file's scales."""
        nearest = (rows.reference / rows.steps).round_().clamp_(-INT8_MAX, INT8_MAX)
        steps_apart = nearest - rows.q
        lowest, highest = steps_apart.aminmax()
        self.total += rows.q.numel()
        self.differing += int(steps_apart.count_nonzero())
        self.largest_step = max(self.largest_step, int(highest), -int(lowest))
        self.check_scales(rows)
        error = nearest.mul_(rows.steps).sub_(rows.reference)
        return float(sum_products(error, error).sum())

    def add_exact(self, count: int) -> None:
        """Count integers that are the recipe's to the bit."""
        self.total += count

    def check_scales(self, rows: RoundedRows) -> None:
        """Count scales that are not absmax / 127 of what shares them."""
        granularity, size = self.layer.granularity, self.layer.block_size
        if granularity == "tensor":
            self.absmax = max(self.absmax, float(rows.reference.abs().max()))
            return
        height = size if granularity == "grid" else 1
        width = size or rows.reference.shape[1]
        if len(rows.reference) % height or rows.reference.shape[1] % width:
            self.wrong_scales += 1  # blocks that are cut off are not looked at
            return
        expected = compute_block_absmax(rows.reference, height, width)
        scales = rows.scales[::height]
        self.wrong_scales += self.count_wrong(scales, expected)

    def count_wrong(self, scales: Tensor, absmax: Tensor) -> int:
        """Count scales that are not absmax / 127; those of zeros may be anything."""
        expected = (absmax / INT8_MAX).clamp(min=TINY)
        self.inexact_scales += int((scales != expected).sum())
        is_right = torch.isclose(scales, expected, rtol=self.tolerance, atol=0) | (absmax == 0)
        return int((~is_right).sum())

    def check_tensor_scale(self, scale: Tensor) -> None:
        """The same of one scale for all, when all rows were seen. scale: one number."""
        self.wrong_scales += self.count_wrong(scale.reshape(1), scale.new_tensor([self.absmax]))

    def is_nearest(self, max_tie_share: float) -> bool:
        """Whether all integers are the nearest at the file's scales, but for ties that fall otherwise."""
        is_tie = self.largest_step <= 1 and self.differing <= max_tie_share * self.total
        return self.differing == 0 or is_tie

    def is_exact(self) -> bool:
        """Whether integers and scales are the recipe's to the bit."""
        return self.differing == 0 and self.inexact_scales == 0 and self.wrong_scales == 0

    def has_absmax_scales(self) -> bool:
        """Whether all scales are absmax / 127."""
        return self.wrong_scales == 0


def matches_mse(q: Tensor, scale: Tensor, reference: Tensor) -> bool:
    """Whether `rounding=mse` at its defaults gives these integers and scales.

    Args:
        q: int8 [n, K], of the file.
        scale: float32 [n, 1], of the file.
        reference: the base under the transform, float32 [n, K].
    """
    rounded = Mse().round_weight(reference)
    return torch.equal(rounded.qdata, q) and torch.equal(rounded.scale, scale)
