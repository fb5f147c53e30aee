"""`outlier=auto`: for each layer the method that loses least on its own activations, within a cost that is measured too."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from int8run.errors import ConfigError, check_range
from int8run.outlier.base import LayerStatistics, OutlierMethod, OutlierTransform
from int8run.quant.weight import quantize_weight, sqnr_db


@dataclass(frozen=True)
class AutoOutlier:
    """The candidate with the least error of the layer's output on calibration activations, if it costs little enough.

    Candidates within `tolerance_db` of the best count as equal: then the first in the list is taken, and one that all layers with
    the same input can share goes before one of their own.

    Args:
        candidates: methods with their settings, the plainest first.
        max_cost: a method may make a layer slower by at most this share; None: by any. Costs are measured once for each layer shape
            on this machine and remembered.
    """

    candidates: Mapping[str, OutlierMethod]
    max_cost: float | None = 0.15
    tolerance_db: float = 0.1
    name: ClassVar[str] = "auto"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("outlier.candidates is empty; name at least one method")
        if self.max_cost is not None:
            check_range("outlier.max_cost", self.max_cost, 0, 10)
        check_range("outlier.tolerance_db", self.tolerance_db, 0, 10)

    def score_candidates(
        self, weight: Tensor, statistics: LayerStatistics, cost: Callable[[OutlierTransform], float]
    ) -> dict[str, float]:
        """Output SQNR in dB of every candidate that can take the layer at the price.

        Args:
            weight: [N, K].
            cost: time of the layer with a transform over its time without.
        """
        folds = split_samples(statistics)
        able = {
            name: m for name, m in self.candidates.items() if m.unsupported_reason(weight.shape[1]) is None
        }
        return {
            name: measure_output_sqnr_db(weight, method, folds)
            for name, method in able.items()
            if self.max_cost is None or cost(method.fit(weight, statistics)) <= 1 + self.max_cost
        }

    def choose_methods(
        self,
        scores: Mapping[str, Mapping[str, float]],
        groups: Iterable[Sequence[str]],
        joined: Iterable[Sequence[str]] = (),
    ) -> dict[str, str | None]:
        """The candidate of each layer, by name; None where no candidate could take it.

        Args:
            scores: of each layer.
            groups: layers that read the same tensor; each layer stands in one group.
            joined: layers that must have the same, because they are one in the file to be: the best in the mean.
        """
        chosen: dict[str, str | None] = {}
        for group in groups:
            good = {layer: self.list_near_best(scores[layer]) for layer in group}
            shared = [name for name in self.candidates if all(name in names for names in good.values())]
            chosen |= {layer: next(iter(shared or good[layer]), None) for layer in group}
        for layers in joined:
            if len({chosen[layer] for layer in layers}) > 1:
                able = [name for name in self.candidates if all(name in scores[layer] for layer in layers)]
                best = max(able, key=lambda name: sum(scores[layer][name] for layer in layers), default=None)
                chosen |= dict.fromkeys(layers, best)
        return chosen

    def list_near_best(self, scores: Mapping[str, float]) -> list[str]:
        """The candidates within `tolerance_db` of the best, in their order."""
        best = max(scores.values(), default=0.0)
        return [
            name for name in self.candidates if name in scores and scores[name] >= best - self.tolerance_db
        ]


def split_samples(statistics: LayerStatistics) -> list[tuple[LayerStatistics, Tensor]]:
    """What to fit to, and what to judge by: each half of the inputs once, because a method that was fitted to its judge looks too good."""
    parts = [part for part in statistics.sample.tensor_split(2) if len(part)]
    if len(parts) == 1:
        return [(statistics, parts[0])]
    return [
        (replace(statistics, sample=a, input_absmax=a.abs().amax((0, 1)).float()), b)
        for a, b in (parts, parts[::-1])
    ]


def measure_output_sqnr_db(
    weight: Tensor, method: OutlierMethod, folds: Sequence[tuple[LayerStatistics, Tensor]]
) -> float:
    """Output SQNR of a method over all folds, in dB. weight: [N, K]."""
    exact, made = [], []
    for fit, sample in folds:
        products = compute_output_products(weight, method.fit(weight, fit).to(weight.device), sample)
        exact.append(products[0])
        made.append(products[1])
    return sqnr_db(torch.cat(exact), torch.cat(made))


def compute_output_products(
    weight: Tensor, transform: OutlierTransform, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """`x @ W.T`, and the same with both sides transformed and rounded; arithmetic in float32.

    Args:
        weight: [N, K]; sample: [S, T, K].
    """
    weight, sample = weight.detach().float(), sample.to(weight.device).float()
    rounded = quantize_weight(transform.transform_weight(weight)).dequantize()
    return sample @ weight.T, transform.round_input(sample) @ rounded.T
