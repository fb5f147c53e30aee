"""How a weight becomes integers (`rounding=`): the scale of each row, and which way each number is rounded.

`ptq/quantize.py` calls a `Rounding` for each layer, after the outlier method has transformed the weight.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from int8run.errors import ConfigError, check_range
from int8run.kernels.quantize_rowwise.reference import INT8_MAX
from int8run.quant.grouped_rounding import (
    MAKERS_SEARCH,
    WIDE_SEARCH,
    GroupLayout,
    Levels,
    round_groups,
    round_groups_by_output,
)
from int8run.quant.grouped_weight import GroupedWeight, LayerWeight
from int8run.quant.weight import QuantizedWeight, quantize_weight

CHUNK_ELEMENTS = 2**18  # weights that `mse` works on at a time
REFINEMENTS = 2


class Rounding(Protocol):
    """A frozen dataclass with the rounding's settings."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]

    def round_weight(self, weight: Tensor, inputs: Tensor | None) -> QuantizedWeight:
        """Integers and a scale for each row.

        Args:
            weight: float32 [N, K], transformed already.
            inputs: float32 [M, K], what the layer multiplied in the calibration, transformed and rounded;
                given where the rounding needs calibration.
        """
        ...


@runtime_checkable
class RoundsGroups(Protocol):
    """A rounding that also makes weights of 4 and 6 bits, which have a scale for each group of columns."""

    def round_groups(
        self, weight: Tensor, inputs: Tensor | None, layout: GroupLayout, levels: Levels | None = None
    ) -> GroupedWeight:
        """Codes, and a scale for each group and row.

        Args:
            weight: float32 [N, K], transformed already; K has no obstacle of the layout.
            inputs: as for `Rounding.round_weight`.
            layout: bits and group size.
            levels: of the whole weight, where these are some of its rows; None: they are all.
        """
        ...


@dataclass(frozen=True)
class AbsMax:
    """`scale = absmax / 127`, to the nearest, ties to even.

    In groups: what the makers of `asym_w4a8_int8` do, whose scales begin with the largest number of a group.
    """

    name: ClassVar[str] = "absmax"
    needs_calibration: ClassVar[bool] = False

    def round_weight(self, weight: Tensor, inputs: Tensor | None = None) -> QuantizedWeight:
        """The nearest integers."""
        return quantize_weight(weight)

    def round_groups(
        self, weight: Tensor, inputs: Tensor | None, layout: GroupLayout, levels: Levels | None = None
    ) -> GroupedWeight:
        """The nearest levels, with the scales of comfy-kitchen's own quantizer."""
        return round_groups(weight, layout, neighbors=MAKERS_SEARCH[layout.bits], levels=levels)


@dataclass(frozen=True)
class Mse:
    """The scale of each row with the least squared error: clipping a few weights may pay for a finer grid.

    Scales from absmax / 127 down to `smallest` of it are tried; the best is refined by turns of the
    least-squares scale of its integers, `<w, q> / <q, q>`, and the nearest integers at that scale. Each turn
    lowers the error, so that no row gets worse. In groups the scales are 8-bit floats, of which the nearest
    ones are tried.

    Args:
        candidates: scales that are tried of each row.
        smallest: share of absmax / 127 that the smallest of them is.
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
        n_rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
        chunks = [self.round_rows(rows) for rows in weight.split(n_rows)]
        return QuantizedWeight(
            qdata=torch.cat([chunk.qdata for chunk in chunks]),
            scale=torch.cat([chunk.scale for chunk in chunks]),
        )

    def round_groups(
        self, weight: Tensor, inputs: Tensor | None, layout: GroupLayout, levels: Levels | None = None
    ) -> GroupedWeight:
        """The best of the tried scales, group by group."""
        return round_groups(weight, layout, neighbors=WIDE_SEARCH, levels=levels)

    def round_rows(self, weight: Tensor) -> QuantizedWeight:
        """The same for some of the rows."""
        absmax = quantize_weight(weight)
        best, error = absmax, compute_squared_error(weight, absmax)
        for share in torch.linspace(1, self.smallest, self.candidates).tolist()[1:]:
            candidate = round_with_scale(weight, absmax.scale * share)
            best, error = keep_better_rows(weight, best, error, candidate)
        for _ in range(REFINEMENTS):
            q = best.qdata.float()
            fitted = (weight * q).sum(1, keepdim=True) / q.square().sum(1, keepdim=True).clamp(min=1)
            # a row of zeros has no scale to fit
            scale = torch.where(fitted > 0, fitted, best.scale)
            best, error = keep_better_rows(weight, best, error, round_with_scale(weight, scale))
        return best


@dataclass(frozen=True)
class Gptq:
    """GPTQ: the error of each rounded column is moved into those that follow.

    Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
    (arXiv 2210.17323).

    What counts is the error of the layer's output on calibration inputs, by its Hessian `H = XᵀX`, not that
    of the weight. Columns go in the order of falling `H_jj` ("act order"). Scales are absmax / 127 of the
    unchanged weight.

    Args:
        damping: share of H's mean diagonal added to it. Little of it fits the calibration inputs and not
            others (experiments/fidelity).
        block: columns between two updates of all later columns; affects speed alone.
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
        order, spread = self.factor_hessian(inputs)

        rest = weight[:, order].clone()  # [N, K], columns not rounded yet carry the errors of those before
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
            # the columns after the block get its errors in one product, which is faster than one by one
            rest[:, end:] -= errors @ spread[start:end, end:]
        return QuantizedWeight(q[:, order.argsort()].to(torch.int8), scale)

    def round_groups(
        self, weight: Tensor, inputs: Tensor | None, layout: GroupLayout, levels: Levels | None = None
    ) -> GroupedWeight:
        """Codes whose errors make up for each other, at the scales of `mse`."""
        assert inputs is not None, "gptq needs calibration inputs"
        assert levels is None, "gptq rounds whole weights"
        order, spread = self.factor_hessian(inputs)
        return round_groups_by_output(weight, layout, order=order, spread=spread, block=self.block)

    def factor_hessian(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Order the columns, and find how the error of each is best spread over the later ones.

        Args:
            inputs: float32 [M, K].

        Returns:
            order: int64 [K], columns by falling diagonal of the Hessian.
            spread: float32 [K, K], the upper Cholesky factor of the Hessian's inverse, in that order.
        """
        # in float32, a few large columns that resemble each other would make it indefinite
        hessian = inputs.T.double() @ inputs.double()
        order = hessian.diagonal().argsort(descending=True, stable=True)
        hessian = hessian[order][:, order]
        # a column that was always 0 would have no weight at all
        damping = self.damping * hessian.diagonal().mean().clamp(min=1e-30)
        hessian.diagonal().add_(damping)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return order, torch.linalg.cholesky(inverse, upper=True).float()


def round_to_bits(
    rounding: Rounding, weight: Tensor, inputs: Tensor | None, layout: GroupLayout | None
) -> LayerWeight:
    """A weight of 8 bits, or one in groups.

    Args:
        rounding: of its numbers.
        weight: float32 [N, K], transformed already.
        inputs: as for `Rounding.round_weight`.
        layout: bits and group size; None: 8 bits.

    Raises:
        ConfigError: for a rounding that makes no weights in groups.
    """
    if layout is None:
        return rounding.round_weight(weight, inputs)
    return check_rounds_groups(rounding, layout).round_groups(weight, inputs, layout)


def check_rounds_groups(rounding: Rounding, layout: GroupLayout) -> RoundsGroups:
    """The rounding, where it makes weights in groups.

    Args:
        rounding: any.
        layout: bits and group size.

    Raises:
        ConfigError: where it makes none.
    """
    if isinstance(rounding, RoundsGroups):
        return rounding
    raise ConfigError(
        f"rounding={rounding.name} makes weights of 8 bits alone; for int8.bits={layout.bits} it needs a "
        "method round_groups, as rounding=absmax, mse and gptq have it"
    )


def round_with_scale(weight: Tensor, scale: Tensor) -> QuantizedWeight:
    """The nearest integers at given scales, clipped to -127..127. weight: [N, K], scale: [N, 1]."""
    return QuantizedWeight((weight / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale)


def keep_better_rows(
    weight: Tensor, best: QuantizedWeight, error: Tensor, candidate: QuantizedWeight
) -> tuple[QuantizedWeight, Tensor]:
    """Keep of each row the version with the smaller error.

    Args:
        weight: float32 [N, K].
        best: the best so far.
        error: squared error of its rows, [N, 1].
        candidate: to compare with.

    Returns:
        The better rows, and their errors.
    """
    candidate_error = compute_squared_error(weight, candidate)
    is_better = candidate_error < error
    better = QuantizedWeight(
        qdata=torch.where(is_better, candidate.qdata, best.qdata),
        scale=torch.where(is_better, candidate.scale, best.scale),
    )
    return better, torch.where(is_better, candidate_error, error)


def compute_squared_error(weight: Tensor, rounded: QuantizedWeight) -> Tensor:
    """The squared error of each row. Returns [N, 1]."""
    return (weight - rounded.dequantize()).square().sum(1, keepdim=True)
