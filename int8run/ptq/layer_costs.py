"""What a transform or a LoRA branch costs a layer, measured on this machine and remembered."""

import logging
import math
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from int8run.backends.auto import AutoBackend, BackendChooser
from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Backend
from int8run.layers.int8_linear import Int8Linear, LowRankBranch, QuantizedLayer
from int8run.outlier.base import OutlierTransform
from int8run.quant.weight import quantize_weight
from int8run.utils.timing import is_steady, time_in_turns

log = logging.getLogger(__name__)
ROUNDS = 15


class LayerCosts:
    """Times of a changed layer over those of the plain one, each question measured once."""

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype):
        path = getattr(backend, "table", None)
        self.cache = AutotuneCache(Path(path) if path else None, device, dtype)
        self.backend, self.device, self.dtype = backend, device, dtype
        self.measured: dict[str, float] = {}

    def look_up(self, question: str) -> float | None:
        """The answer of this process or of one before."""
        return self.measured.get(question) or parse_ratio(self.cache.get(question))

    def random_tensor(self, *shape: int) -> Tensor:
        """Normal numbers, the same ones for every question."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    @torch.no_grad()
    def measure_ratio(self, question: str, plain: Int8Linear, changed: Int8Linear, rows: int) -> float:
        """The ratio of the shortest times, of calls that take turns; kept for later runs where the machine was quiet.

        What other work adds to a time is not the layer's: a ratio of medians doubles on a busy machine.
        """
        x = self.random_tensor(1, rows, plain.in_features).to(self.dtype)
        seconds = time_in_turns([partial(plain, x), partial(changed, x)], self.device, ROUNDS)
        without, with_change = map(min, seconds)
        self.measured[question] = round(with_change / without, 3)
        if all(map(is_steady, seconds)):
            self.cache.put(question, str(self.measured[question]))
        else:
            log.warning(
                "%s: times scatter by more than twice: other work runs here; measured anew next time",
                question,
            )
        return self.measured[question]


class TransformCosts(LayerCosts):
    """Time of an INT8 layer with an outlier transform over its time without, by the backend that runs the layer."""

    @cached_property
    def chooser(self) -> BackendChooser | None:
        """What names the backend of a shape, where `backend=auto` does."""
        return (
            self.backend.make_chooser(self.device, self.dtype)
            if isinstance(self.backend, AutoBackend)
            else None
        )

    def get_ratio(self, transform: OutlierTransform, shape: tuple[int, int, int], sharing: int = 1) -> float:
        """The ratio for a layer; it depends on what the transform does, not on its numbers.

        Args:
            shape: rows, in and out features.
            sharing: layers that read the same tensor. One transform serves them all, except centering with the weight's own factors.
        """
        return 1 + (self.get_ratio_alone(transform, shape) - 1) / (1 if transform.centered else sharing)

    def get_ratio_alone(self, transform: OutlierTransform, shape: tuple[int, int, int]) -> float:
        """The ratio for a layer that shares its input with none."""
        steps = describe_transform(transform)
        if not steps:
            return 1.0
        rows, in_features, out_features = shape
        backend = (
            self.chooser.choose_backend(rows, in_features, out_features) if self.chooser else self.backend
        )
        question = f"cost of {steps} | {backend.name} | {rows}x{in_features}x{out_features}"
        if (known := self.look_up(question)) is not None:
            return known
        weight = quantize_weight(self.random_tensor(out_features, in_features))
        plain, changed = (
            Int8Linear(QuantizedLayer(weight, t, None), backend, self.dtype)
            for t in (OutlierTransform(), transform.to(self.device))
        )
        return self.measure_ratio(question, plain, changed, rows)


class BranchCosts(LayerCosts):
    """Time of an INT8 layer with a low-rank branch over its time without."""

    def get_ratio(self, layer: Int8Linear, rank: int, rows: int) -> float:
        """The ratio for a layer of this shape and backend; the branch's numbers have no say.

        Args:
            layer: any of that shape, on the backend that runs it.
            rank: of all LoRAs together.
            rows: that it sees in one call.
        """
        shape = f"{rows}x{layer.in_features}x{layer.out_features}"
        # settings of a backend change what a branch costs it
        question = f"cost of a branch of rank {rank} | {layer.backend!r} | {shape}"
        if (known := self.look_up(question)) is not None:
            return known
        weight = quantize_weight(self.random_tensor(layer.out_features, layer.in_features))
        plain, changed = (
            Int8Linear(QuantizedLayer(weight, OutlierTransform(), None), layer.backend, self.dtype)
            for _ in range(2)
        )
        branch = LowRankBranch(
            [(self.random_tensor(rank, layer.in_features), self.random_tensor(layer.out_features, rank))],
            self.dtype,
            self.device,
        )
        branch.fuse_into_backend(layer.backend, changed.transform)
        branch.set_strengths([1.0])
        changed.adapter = branch
        return self.measure_ratio(question, plain, changed, rows)


def parse_ratio(text: str | None) -> float | None:
    """A ratio out of the table; a file that somebody edited may hold anything."""
    try:
        ratio = float(text or "")
    except ValueError:
        return None
    return ratio if 0 < ratio < math.inf else None


def describe_transform(transform: OutlierTransform) -> str:
    """What a transform does to the input, as far as its time depends on it."""
    steps = []
    if transform.centered:
        steps.append("centering")
    if transform.factor is not None:
        steps.append("factor")
    if transform.group_size:
        steps.append(
            f"{'Sylvester' if transform.sylvester else 'regular'} rotation of {transform.group_size}"
        )
    return ", ".join(steps)
