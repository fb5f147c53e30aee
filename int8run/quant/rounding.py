"""How a weight becomes integers: which scale each row gets, and which way each number is rounded."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from int8run.errors import check_range
from int8run.kernels.quantize_rowwise.reference import INT8_MAX
from int8run.quant.weight import QuantizedWeight, quantize_weight

CHUNK_ELEMENTS = 2**18  # weights that `mse` works on at a time
REFINEMENTS = 2


class Rounding(Protocol):
    """A frozen dataclass with the rounding's settings."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]

    def round_weight(self, weight: Tensor, inputs: Tensor | None) -> QuantizedWeight:
        """Integers and a scale per row.

        Args:
            weight: float32 [N, K], transformed already.
            inputs: float32 [M, K], what the layer multiplied in the calibration, transformed and rounded; given where it is needed.
        """
        ...


@dataclass(frozen=True)
class AbsMax:
    """`scale = absmax / 127`, to the nearest, ties to even."""

    name: ClassVar[str] = "absmax"
    needs_calibration: ClassVar[bool] = False

    def round_weight(self, weight: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:
        """The nearest integers."""
        return quantize_weight(weight)


@dataclass(frozen=True)
class Mse:
    """The scale of each row with the least squared error: clipping a few large weights may pay for a finer grid.

    Scales from absmax / 127 down to `smallest` of it are tried; the best is refined by turns of the least-squares scale of its
    integers, `<w, q> / <q, q>`, and the nearest integers at that scale. Each turn lowers the error, so that no row gets worse.
    """

    candidates: int = 32
    smallest: float = 0.5
    name: ClassVar[str] = "mse"
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("rounding.candidates", self.candidates, 2, 1000, whole=True)
        check_range("rounding.smallest", self.smallest, 0.1, 1)

    def round_weight(self, weight: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:
        """The best of the tried scales, row by row."""
        # a few rows at a time stay in the cache through all trials
        blocks = [self.round_rows(rows) for rows in weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))]
        return QuantizedWeight(torch.cat([b.qdata for b in blocks]), torch.cat([b.scale for b in blocks]))

    def round_rows(self, weight: Tensor) -> QuantizedWeight:
        """The same for some of the rows."""
        absmax = quantize_weight(weight)
        best = absmax
        error = compute_squared_error(weight, absmax)
        for share in torch.linspace(1, self.smallest, self.candidates).tolist()[1:]:
            best, error = keep_better_rows(
                weight, best, error, round_with_scale(weight, absmax.scale * share)
            )
        for _ in range(REFINEMENTS):
            q = best.qdata.float()
            fitted = (weight * q).sum(1, keepdim=True) / q.square().sum(1, keepdim=True).clamp(min=1)
            # a row of zeros has no scale to fit
            best, error = keep_better_rows(
                weight, best, error, round_with_scale(weight, torch.where(fitted > 0, fitted, best.scale))
            )
        return best


@dataclass(frozen=True)
class Gptq:
    """GPTQ (Frantar et al. 2023): columns are rounded one after another, and each one's error is moved into those that follow.

    What counts is the error of the layer's output on calibration inputs, by its Hessian `H = XᵀX`, not that of the weight. Columns
    go in the order of falling `H_jj` ("act order"). Scales are absmax / 127 of the unchanged weight.

    Args:
        damping: share of H's mean diagonal added to it. Little of it fits the calibration inputs and not others (experiments/fidelity).
        block: columns between two updates of the whole rest; affects speed alone.
    """

    damping: float = 0.3
    block: int = 128
    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("rounding.damping", self.damping, 1e-6, 1)
        check_range("rounding.block", self.block, 1, 4096, whole=True)

    def round_weight(self, weight: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:
        """Integers whose errors make up for each other. Costs K³ / 3 + N K² multiplications."""
        assert inputs is not None, "gptq needs calibration inputs"
        scale = quantize_weight(weight).scale
        # in float32, a few large columns that resemble each other would make it indefinite
        hessian = inputs.T.double() @ inputs.double()
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
        # a column that was always 0 has no say; damping gives it one
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean().clamp(min=1e-30))
        # the upper factor of the inverse holds, row by row, how an error in one column is best spread over the later ones
        spread = torch.linalg.cholesky(
            torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True
        ).float()

        rest = weight[:, order].clone()
        q = torch.empty_like(rest)
        for start in range(0, rest.shape[1], self.block):
            end = min(start + self.block, rest.shape[1])
            errors = torch.empty_like(rest[:, start:end])
            for j in range(start, end):
                column = rest[:, j : j + 1]
                q[:, j : j + 1] = (column / scale).round().clamp(-INT8_MAX, INT8_MAX)
                error = (column - q[:, j : j + 1] * scale) / spread[j, j]
                rest[:, j:end] -= error * spread[j, j:end]
                errors[:, j - start : j - start + 1] = error
            rest[:, end:] -= errors @ spread[start:end, end:]
        return QuantizedWeight(q[:, order.argsort()].to(torch.int8), scale)


def round_with_scale(weight: Tensor, scale: Tensor) -> QuantizedWeight:
    """The nearest integers at given scales, clipped to -127..127. weight: [N, K], scale: [N, 1]."""
    return QuantizedWeight((weight / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale)


def keep_better_rows(
    weight: Tensor, best: QuantizedWeight, error: Tensor, tried: QuantizedWeight
) -> tuple[QuantizedWeight, Tensor]:
    """Of each row the version with the smaller error, and that error."""
    tried_error = compute_squared_error(weight, tried)
    wins = tried_error < error
    chosen = QuantizedWeight(
        torch.where(wins, tried.qdata, best.qdata), torch.where(wins, tried.scale, best.scale)
    )
    return chosen, torch.where(wins, tried_error, error)


def compute_squared_error(weight: Tensor, rounded: QuantizedWeight) -> Tensor:
    """Of each row. Returns [N, 1]."""
    return (weight - rounded.dequantize()).square().sum(1, keepdim=True)
