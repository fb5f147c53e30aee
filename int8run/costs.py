"""What an outlier transform costs a layer, measured on this machine and remembered."""

import logging
import math
import statistics
from pathlib import Path

import torch
from torch import Tensor

from int8run.backends.auto import AutoBackend, steady
from int8run.backends.base import Backend
from int8run.backends.table import ChoiceTable
from int8run.generate.generate import now
from int8run.layers.linear import Int8Linear, QuantizedLayer
from int8run.outlier.base import OutlierTransform
from int8run.quant.weight import quantize_weight

log = logging.getLogger(__name__)
ROUNDS = 15


class TransformCosts:
    """Time of an INT8 layer with a transform over its time without, by the backend that runs the layer."""

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype):
        path = getattr(backend, "table", None)
        self.table = ChoiceTable(Path(path) if path else None, device, dtype)
        self.backend, self.device, self.dtype = backend, device, dtype
        self.chooser = backend.chooser(device, dtype) if isinstance(backend, AutoBackend) else None
        self.measured: dict[str, float] = {}

    def of(self, transform: OutlierTransform, shape: tuple[int, int, int], sharing: int = 1) -> float:
        """The ratio for a layer; it depends on what the transform does, not on its numbers.

        Args:
            shape: rows, in and out features.
            sharing: layers that read the same tensor. One transform serves them all, except centering with the weight's own factors.
        """
        return 1 + (self.alone(transform, shape) - 1) / (1 if transform.centered else sharing)

    @torch.no_grad()
    def alone(self, transform: OutlierTransform, shape: tuple[int, int, int]) -> float:
        """The ratio for a layer that shares its input with none."""
        steps = describe(transform)
        if not steps:
            return 1.0
        rows, in_features, out_features = shape
        backend = self.chooser.choose(rows, in_features, out_features) if self.chooser else self.backend
        question = f"cost of {steps} | {backend.name} | {rows}x{in_features}x{out_features}"
        if (known := number(self.table.get(question))) is not None:
            return known
        if question not in self.measured:
            generator = torch.Generator().manual_seed(0)
            draw = lambda *shape: torch.randn(shape, generator=generator).to(self.device)  # noqa: E731
            weight, x = quantize_weight(draw(out_features, in_features)), draw(1, rows, in_features).to(self.dtype)
            layers = [
                Int8Linear(QuantizedLayer(weight, t, None), backend, self.dtype) for t in (OutlierTransform(), transform.to(self.device))
            ]
            seconds: list[list[float]] = [[], []]
            for _ in range(ROUNDS + 1):  # the first round warms up
                for layer, times in zip(layers, seconds, strict=True):
                    times.append(self.timed(layer, x))
            plain, changed = (statistics.median(times[1:]) for times in seconds)
            self.measured[question] = round(changed / plain, 3)
            if all(steady(times[1:]) for times in seconds):
                self.table.put(question, str(self.measured[question]))
            else:
                log.warning("%s: times scatter by more than twice: other work runs here; measured anew next time", question)
        return self.measured[question]

    def timed(self, layer: Int8Linear, x: Tensor) -> float:
        """Seconds of one call."""
        started = now(self.device)
        layer(x)
        return now(self.device) - started


def number(text: str | None) -> float | None:
    """A ratio out of the table; a file that somebody edited may hold anything."""
    try:
        ratio = float(text or "")
    except ValueError:
        return None
    return ratio if 0 < ratio < math.inf else None


def describe(transform: OutlierTransform) -> str:
    """What a transform does to the input, as far as its time depends on it."""
    steps = []
    if transform.centered:
        steps.append("centering")
    if transform.factor is not None:
        steps.append("factor")
    if transform.group_size:
        steps.append(f"{'Sylvester' if transform.sylvester else 'regular'} rotation of {transform.group_size}")
    return ", ".join(steps)
