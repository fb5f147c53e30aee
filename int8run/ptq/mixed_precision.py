"""`model_type.mixed_precision=auto`: the layers that hurt most stay float, until the measured quality is what was asked for."""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.generate import Generation, generate
from int8run.generate.prompts import Sample
from int8run.layers.int8_linear import Int8Linear
from int8run.metrics.layers import count_module_bytes
from int8run.metrics.quality import compute_relative_error
from int8run.models.sampling import Sampling
from int8run.report.console import Progress
from int8run.utils.timing import time_medians

log = logging.getLogger(__name__)
ROUNDS = 11


@dataclass(frozen=True)
class MixedPrecisionResult:
    """What a quality budget asked for, what it got and what it paid."""

    asked_db: float
    reached_db: float
    without_db: float  # with no layer kept for it
    kept: Mapping[str, float]  # layer -> its share of the error that all INT8 layers make, each on its own
    step_ratio: float  # time of a step over its time without the budget
    memory_ratio: float

    @property
    def metrics(self) -> dict[str, float]:
        """Under their public names."""
        return {
            "budget/asked_db": self.asked_db,
            "budget/reached_db": self.reached_db,
            "budget/without_db": self.without_db,
            "budget/layers_kept": len(self.kept),
            "budget/step_ratio": self.step_ratio,
            "budget/memory_ratio": self.memory_ratio,
        }

    def __str__(self) -> str:
        price = (
            f"a step takes {self.step_ratio:.2f}× the time, the denoiser {self.memory_ratio:.2f}× the memory"
        )
        if not self.kept:
            return f"quality budget {self.asked_db:g} dB: met at {self.reached_db:.1f} dB with no layer kept for it"
        kept = f"{self.reached_db:.1f} dB with {len(self.kept)} layers kept float, {self.without_db:.1f} dB without"
        return f"quality budget {self.asked_db:g} dB: {kept}; {price}"


def meet_budget(
    float_denoiser: nn.Module,
    layers: Mapping[str, Int8Linear],
    work: Mapping[str, int],
    assemble: Callable[[Sequence[str]], nn.Module],
    pipe: DiffusionPipeline,
    component: str,
    pictures: Sequence[Sample],
    sampling: Sampling,
    calls: Sequence[Mapping[str, Any]],
    asked_db: float,
    progress: Progress,
) -> tuple[nn.Module, MixedPrecisionResult]:
    """Keep as few layers float as the budget needs, the most error per multiplication first.

    How many is found by bisection, each step measured: the calibration pictures are generated and their last latents compared.

    Args:
        layers: the INT8 layers, by name.
        work: multiplications of each layer in one call of the denoiser.
        assemble: the INT8 denoiser of the layers that are named.
        pictures: calibration pictures.
        calls: arguments of the denoiser at some of their steps.
        asked_db: least signal-to-error ratio of the last latents.

    Raises:
        ConfigError: when only the float model meets it.
    """
    sampling = replace(sampling, extra={**sampling.extra, "output_type": "latent"})
    run = lambda denoiser: generate(pipe, component, {"": denoiser}, pictures, sampling)[""]  # noqa: E731
    whole = assemble(list(layers))
    bisections = math.ceil(math.log2(len(layers))) + 1
    with progress.track_loop("quality budget", len(layers) + bisections) as advance:
        exact = run(float_denoiser)
        reached = {0: measure_latents_db(run(whole), exact)}
        advance(1)
        if reached[0] >= asked_db:
            return whole, MixedPrecisionResult(asked_db, reached[0], reached[0], {}, 1.0, 1.0)
        errors = measure_layer_sensitivities(float_denoiser, layers, calls, lambda: advance(1))
        order = sorted(layers, key=lambda name: errors[name] / work[name], reverse=True)
        too_few, enough = 0, len(order)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            reached[middle] = measure_latents_db(run(assemble(order[middle:])), exact)
            log.debug("%d layers float: %.1f dB", middle, reached[middle])
            too_few, enough = (too_few, middle) if reached[middle] >= asked_db else (middle, enough)
            advance(1)
    if enough == len(order):
        best = max(reached, key=reached.__getitem__)
        raise ConfigError(
            f"quality_db={asked_db:g} is met by the float model alone: {reached[best]:.1f} dB is the most that was measured, "
            f"with {best} of {len(order)} layers float; ask for less, or try outlier=auto or rounding=gptq"
        )
    total = sum(errors.values()) or 1.0
    denoiser = assemble(order[enough:])
    with torch.no_grad():
        with_budget, without = time_medians(
            [partial(d, **calls[0]) for d in (denoiser, whole)], pipe.device, ROUNDS
        )
    kept = {name: errors[name] / total for name in order[:enough]}
    memory_ratio = count_module_bytes(denoiser) / count_module_bytes(whole)
    return denoiser, MixedPrecisionResult(
        asked_db, reached[enough], reached[0], kept, with_budget / without, memory_ratio
    )


def measure_latents_db(made: Generation, exact: Generation) -> float:
    """Signal-to-error ratio of the last latents in dB, from the mean relative error of the pictures."""
    pairs = list(zip(made.trajectories, exact.trajectories, strict=True))
    error = sum(compute_relative_error(a[-1], b[-1]) for a, b in pairs) / len(pairs)
    return math.inf if error == 0 else -20 * math.log10(error)


@torch.no_grad()
def measure_layer_sensitivities(
    denoiser: nn.Module,
    layers: Mapping[str, Int8Linear],
    calls: Sequence[Mapping[str, Any]],
    on_layer: Callable[[], None],
) -> dict[str, float]:
    """Squared relative error of the denoiser's output when one layer alone is INT8, mean over the calls."""
    exact = [get_output_tensor(denoiser(**call)) for call in calls]
    errors = {}
    for name, layer in layers.items():
        # the float model's activation has run already
        hook = lambda _, args, out, layer=layer: layer.forward_isolated(args[0])  # noqa: E731
        with ExitStack() as stack:
            stack.callback(denoiser.get_submodule(name).register_forward_hook(hook).remove)
            squares = [
                compute_relative_error(get_output_tensor(denoiser(**call)), y) ** 2
                for call, y in zip(calls, exact, strict=True)
            ]
        errors[name] = statistics.mean(squares)
        on_layer()
    return errors


def get_output_tensor(returned: Any) -> Tensor:
    """What a denoiser computed, out of the tuple or the object that diffusers returns."""
    first = returned[0]
    if isinstance(first, list):  # Z-Image's gives a tensor for each picture
        return torch.cat([t.float().flatten() for t in first])
    return first.float()
