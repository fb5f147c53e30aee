"""`outlier=auto`: for each layer the method that loses least on its own activations, within a measured cost.

`int8run.pipeline.quantize_denoiser` scores every layer after the calibration and then chooses for groups of
layers. What a method costs is measured elsewhere (`int8run.ptq.layer_costs`) and given as a function.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from int8run.errors import ConfigError, check_range
from int8run.kernels.int8_conv.reference import quantize_pixels
from int8run.outlier.base import (
    LayerStatistics,
    OutlierMethod,
    OutlierTransform,
    find_channel_obstacle,
    fit_convolution,
)
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.rounding import AbsMax, round_to_bits
from int8run.quant.weight import quantize_weight, sqnr_db


class Fold(NamedTuple):
    """One part of a layer's calibration inputs to fit a method to, and another to judge it by.

    Args:
        statistics: what the method is fitted to.
        sample: [S, T, K], what its error is measured on.
    """

    statistics: LayerStatistics
    sample: Tensor


@dataclass(frozen=True)
class AutoOutlier:
    """The candidate with the least output error on calibration activations, if it costs little enough.

    Candidates within `tolerance_db` of the best count as equal: then the first in the list is taken, and one
    that all layers with the same input can share goes before one that a single layer prefers.

    Args:
        candidates: methods with their settings, the plainest first.
        max_cost: a method may make a layer slower by at most this share; None: by any. Costs are measured
            once for each layer shape on this machine and remembered.
        tolerance_db: how far below the best a candidate may be and count as equal.
    """

    candidates: Mapping[str, OutlierMethod]
    max_cost: float | None = 0.15
    tolerance_db: float = 0.1
    name: ClassVar[str] = "auto"
    needs_calibration: ClassVar[bool] = True
    takes_convolutions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("outlier.candidates is empty; name at least one method")
        if self.max_cost is not None:
            check_range("outlier.max_cost", self.max_cost, 0, 10)
        check_range("outlier.tolerance_db", self.tolerance_db, 0, 10)

    def score_candidates(
        self,
        weight: Tensor,
        statistics: LayerStatistics,
        cost: Callable[[OutlierTransform], float],
        layout: GroupLayout | None = None,
    ) -> dict[str, float]:
        """Output SQNR in dB of every candidate that can take the layer and is not too slow.

        Args:
            weight: [N, K].
            statistics: what the calibration saw of the layer.
            cost: time of the layer with a transform over its time without.
            layout: of a weight that gets 4 or 6 bits; None: it gets 8.
        """
        folds = split_samples(statistics)
        scores = {}
        for name, method in self.candidates.items():
            if method.unsupported_reason(weight.shape[1]) is not None:
                continue
            if self.max_cost is not None and cost(method.fit(weight, statistics)) > 1 + self.max_cost:
                continue
            scores[name] = measure_output_sqnr_db(weight, method, folds, layout)
        return scores

    def score_conv_candidates(
        self,
        weight: Tensor,
        statistics: LayerStatistics,
        *,
        taps: int,
        cost: Callable[[OutlierTransform], float],
    ) -> dict[str, float]:
        """The same of a convolution, whose candidates only rotate channels.

        Args:
            weight: [N, K], channel after channel.
            statistics: its sample holds patches, [S, T, groups * K].
            taps: size of the kernel.
            cost: time of the layer with a transform over its time without.
        """
        scores = {}
        for name, method in self.candidates.items():
            if find_channel_obstacle(method, weight.shape[1] // taps) is not None:
                continue
            transform = fit_convolution(method, weight, taps).to(weight.device)
            if self.max_cost is not None and cost(transform) > 1 + self.max_cost:
                continue
            exact, rounded = compute_conv_outputs(weight, transform, statistics.sample)
            scores[name] = sqnr_db(exact, rounded)
        return scores

    def choose_methods(
        self,
        scores: Mapping[str, Mapping[str, float]],
        groups: Iterable[Sequence[str]],
        joined: Iterable[Sequence[str]] = (),
    ) -> dict[str, str | None]:
        """The candidate of each layer, by name; None where no candidate can take the layer.

        Args:
            scores: SQNR of each candidate, by layer.
            groups: layers that read the same tensor; each layer stands in one group.
            joined: layers that must have the same candidate, because the file to write holds them as one.
                They get the one that is best in the mean.
        """
        chosen: dict[str, str | None] = {}
        for group in groups:
            chosen |= self._choose_for_group({layer: scores[layer] for layer in group})
        for layers in joined:
            if len({chosen[layer] for layer in layers}) > 1:
                chosen |= dict.fromkeys(layers, self._find_best_in_mean(scores, layers))
        return chosen

    def _choose_for_group(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, str | None]:
        """The first candidate that is near the best for every layer, else the first of each layer's own."""
        near_best = {layer: self.list_near_best(layer_scores) for layer, layer_scores in scores.items()}
        for name in self.candidates:
            if all(name in names for names in near_best.values()):
                return dict.fromkeys(near_best, name)
        return {layer: names[0] if names else None for layer, names in near_best.items()}

    def _find_best_in_mean(
        self, scores: Mapping[str, Mapping[str, float]], layers: Sequence[str]
    ) -> str | None:
        totals = {}
        for name in self.candidates:
            if all(name in scores[layer] for layer in layers):
                totals[name] = sum(scores[layer][name] for layer in layers)
        return max(totals, key=totals.__getitem__, default=None)

    def list_near_best(self, scores: Mapping[str, float]) -> list[str]:
        """The candidates within `tolerance_db` of the best, in the order of the candidates."""
        least = max(scores.values(), default=0.0) - self.tolerance_db
        return [name for name in self.candidates if name in scores and scores[name] >= least]


def split_samples(statistics: LayerStatistics) -> list[Fold]:
    """Each half of the inputs once to fit to, with the other half to judge by.

    A method that is judged on what it was fitted to looks too good. A single input is used for both.
    """
    halves = [half for half in statistics.sample.tensor_split(2) if len(half)]
    if len(halves) == 1:
        return [Fold(statistics, halves[0])]
    folds = []
    for fitted, judged in (halves, halves[::-1]):
        absmax = fitted.abs().amax((0, 1)).float()  # [S, T, K] -> [K]
        folds.append(Fold(replace(statistics, sample=fitted, input_absmax=absmax), judged))
    return folds


def measure_output_sqnr_db(
    weight: Tensor, method: OutlierMethod, folds: Sequence[Fold], layout: GroupLayout | None = None
) -> float:
    """Output SQNR of a method over all folds, in dB. weight: [N, K]; layout: as for `score_candidates`."""
    exact, rounded = [], []
    for fold in folds:
        transform = method.fit(weight, fold.statistics).to(weight.device)
        exact_output, rounded_output = compute_output_products(weight, transform, fold.sample, layout)
        exact.append(exact_output)
        rounded.append(rounded_output)
    return sqnr_db(torch.cat(exact), torch.cat(rounded))


def compute_conv_outputs(
    weight: Tensor, transform: OutlierTransform, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of a convolution, and the same with weight and pixels transformed and rounded.

    Args:
        weight: [N, K], channel after channel.
        transform: of both sides.
        sample: [S, T, groups * K], patches of the input.

    Returns:
        Two float32 [S * T, N].
    """
    weight = weight.detach().float()
    rounded_weight = quantize_weight(transform.transform_weight(weight)).dequantize()
    patches = sample.flatten(0, 1).to(weight.device).float().unflatten(1, (-1, weight.shape[1]))
    # each tap of a patch is one pixel, whose channels are rounded together
    pixels = quantize_pixels(patches.flatten(0, 1).unflatten(1, (-1, transform.taps)), transform.rotation)
    rounded = (pixels.q * pixels.scale + pixels.center).flatten(1).view_as(patches)
    groups = patches.shape[1]
    exact_output = torch.einsum("mgk,gnk->mgn", patches, weight.unflatten(0, (groups, -1)))
    rounded_output = torch.einsum("mgk,gnk->mgn", rounded, rounded_weight.unflatten(0, (groups, -1)))
    return exact_output.flatten(1), rounded_output.flatten(1)


def compute_output_products(
    weight: Tensor, transform: OutlierTransform, sample: Tensor, layout: GroupLayout | None = None
) -> tuple[Tensor, Tensor]:
    """`x @ W.T`, and the same with both sides transformed and rounded; arithmetic in float32.

    Args:
        weight: [N, K].
        transform: of both sides.
        sample: [S, T, K], the x.
        layout: as for `score_candidates`.

    Returns:
        Two float32 [S, T, N].
    """
    weight, sample = weight.detach().float(), sample.to(weight.device).float()
    rounded = round_to_bits(AbsMax(), transform.transform_weight(weight), None, layout).dequantize()
    return sample @ weight.T, transform.round_input(sample) @ rounded.T
