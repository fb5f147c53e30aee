"""Sums over a quantized weight and its base, block of rows by block of rows: noise, factor, low rank.

`compare_layer` feeds it. Both sides are given under the same transform, in which a rotation changes neither
energies nor ranks.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from int8run.audit.low_rank import LowRank, LowRankSketch
from int8run.audit.row_sums import sum_products

# a row of other numbers than the base's has no factor
MIN_ROW_CORRELATION = 0.995


@dataclass(frozen=True)
class Residue:
    """What a whole weight differs by from its base.

    Args:
        sqnr_db: of the weight; infinite where nothing differs.
        excess_db: of its noise over that of the nearest numbers; None: not known.
        correlation: of the two, from -1 to 1.
        gain: factor between the two: 1 where the scales are right.
        wrong_rows: rows whose own factor is far from 1.
        low_rank: what stands out of the noise.
    """

    sqnr_db: float
    excess_db: float | None
    correlation: float
    gain: float
    wrong_rows: int
    low_rank: LowRank


class ResidueSums:
    """Collects them.

    Args:
        columns: K of the weight.
        max_row_gain_error: from where on a row's factor is far from 1.
    """

    def __init__(self, columns: int, max_row_gain_error: float):
        self.sketch = LowRankSketch(columns)
        self.max_row_gain_error = max_row_gain_error
        self.signal = self.noise = self.stored = self.cross = 0.0
        self.expected_noise = 0.0
        self.is_expectation_known = True
        self.wrong_rows = 0

    def add(self, stored: Tensor, reference: Tensor, expected_noise: float | None) -> None:
        """Add some rows.

        Args:
            stored: what the file's numbers stand for, float32 [n, K].
            reference: the base, likewise.
            expected_noise: sum of the squares that the nearest numbers would differ by; None: not known.
        """
        difference = stored - reference
        row_noise = sum_products(difference, difference)
        row_signal = sum_products(reference, reference)
        row_overlap = sum_products(reference, difference)  # stored is reference + difference
        row_cross = row_signal + row_overlap
        row_stored = row_cross + row_overlap + row_noise
        self.wrong_rows += self.count_wrong_rows(row_signal, row_stored, row_cross)
        self.signal += float(row_signal.sum())
        self.cross += float(row_cross.sum())
        self.stored += float(row_stored.sum())
        self.noise += float(row_noise.sum())
        self.add_expectation(expected_noise)
        self.sketch.add(difference, row_noise)

    def count_wrong_rows(self, signal: Tensor, stored: Tensor, cross: Tensor) -> int:
        """Rows that are the base's times a factor which is not 1. All float64 [n], sums over each row."""
        correlation = cross / (signal * stored).sqrt().clamp(min=1e-300)
        gain = cross / signal.clamp(min=1e-300)
        is_wrong = (correlation > MIN_ROW_CORRELATION) & ((gain - 1).abs() > self.max_row_gain_error)
        return int(is_wrong.sum())

    def add_exact(self, signal: float, noise: float) -> None:
        """Add rows that are the nearest numbers to the bit, by sums of squares.

        Args:
            signal: of the base.
            noise: of what rounding changed, which is independent of it.
        """
        self.signal += signal
        self.noise += noise
        # rounded numbers agree with the base but for half of the noise on either side
        self.stored += signal + noise
        self.cross += signal
        self.add_expectation(noise)

    def add_expectation(self, noise: float | None) -> None:
        """Add what the nearest numbers would differ by; None: not known."""
        if noise is None:
            self.is_expectation_known = False
            return
        self.expected_noise += noise

    def compute(self) -> Residue:
        """What the sums say."""
        return Residue(
            sqnr_db=compute_ratio_db(self.signal, self.noise),
            excess_db=self.compute_excess_db(),
            correlation=compute_correlation(self.cross, self.signal, self.stored),
            gain=self.cross / self.signal if self.signal else 1.0,
            wrong_rows=self.wrong_rows,
            low_rank=self.sketch.find_low_rank(),
        )

    def compute_excess_db(self) -> float | None:
        """The noise over what the nearest numbers would have; None where that is not known or nothing."""
        if not self.is_expectation_known:
            return None
        if self.noise == 0:
            return 0.0
        # a weight that the format holds exactly leaves nothing to compare with but the weight itself
        floor = 1e-12 * self.signal
        return compute_ratio_db(self.noise, max(self.expected_noise, floor))


def compute_ratio_db(signal: float, noise: float) -> float:
    """The ratio of two sums of squares in dB; infinite where the second is 0."""
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def compute_correlation(cross: float, first: float, second: float) -> float:
    """The cosine between two weights, by sums; 1 where both are 0."""
    if first == 0 and second == 0:
        return 1.0
    if first == 0 or second == 0:
        return 0.0
    cosine: float = cross / (first * second) ** 0.5
    return cosine


def correlate(stored: Tensor, reference: Tensor) -> float:
    """The cosine between two weights. Both float32 of one shape."""
    first, second = stored.double(), reference.double()
    return compute_correlation(
        float((first * second).sum()), float(second.square().sum()), float(first.square().sum())
    )
