"""`model_type.mixed_precision=auto`: what is most sensitive stays float until a quality target is met.

That may be layers and attentions.

`int8run.pipeline.quantize_denoiser` runs the search after the layers are quantized. It generates the
calibration images with trial denoisers, so every quality it reports is measured.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.generate import Differences, Generation, generate
from int8run.generate.pipeline_call import get_execution_device
from int8run.generate.prompts import Sample
from int8run.generate.step_denoisers import StepDenoisers
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_attention import Int8Attention
from int8run.layers.int8_conv import Int8Layer
from int8run.metrics.layers import count_module_bytes
from int8run.metrics.quality import compute_relative_error
from int8run.models.attention_calls import entered_while_running, native_attention
from int8run.models.dual_denoisers import set_denoiser
from int8run.models.sampling import Sampling
from int8run.report.console import Progress
from int8run.utils.timing import time_medians

log = logging.getLogger(__name__)

# how often a step of each denoiser is timed to compare them
ROUNDS = 11


@dataclass(frozen=True)
class MixedPrecisionResult:
    """What a quality target asked for, what was reached and what it costs.

    The fields are keys in the metadata of INT8 files, and most of them metrics.

    Args:
        asked_db: the target, `quality_db`.
        reached_db: signal-to-error ratio of the last latents.
        without_db: the same with all of them in INT8.
        kept: the layers and attentions that stay float, each with its share of the sum of all sensitivities.
        step_ratio: time of a step over its time with all of them in INT8.
        memory_ratio: memory of the denoiser over its memory with all of them in INT8.
    """

    asked_db: float
    reached_db: float
    without_db: float
    kept: Mapping[str, float]
    step_ratio: float
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
        start = f"quality budget {self.asked_db:g} dB"
        if not self.kept:
            return f"{start}: met at {self.reached_db:.1f} dB with nothing kept for it"
        reached = f"{self.reached_db:.1f} dB with {len(self.kept)} of the layers and attentions kept float"
        price = f"{self.step_ratio:.2f}× the time, the denoiser {self.memory_ratio:.2f}× the memory"
        return f"{start}: {reached}, {self.without_db:.1f} dB without; a step takes {price}"


@dataclass(frozen=True)
class MixedPrecisionSearch:
    """Keeps as few layers and attentions float as a quality target needs.

    Those with the most error per multiply-add come first. How many that takes is found by bisection; each
    trial generates the calibration images and compares their last latents with those of the float model.

    Args:
        float_denoiser: the float model.
        layers: the INT8 layers and attentions, by name.
        macs: multiply-adds of each in one call of the denoiser.
        assemble: gives the denoiser in which the named layers are INT8 and the others float.
        pipe: generates the images.
        component: the denoiser's name in the pipe.
        offload: turns offloading on, where it is asked for, for what the pipeline has now.
        samples: prompts and seeds of the calibration images.
        sampling: steps and size of the images.
        calls: arguments of the denoiser at some of their timesteps.
        target_db: the least signal-to-error ratio of the last latents.
        progress: counts layers, attentions and trials.
        share_steps: gives what computes the steps of a trial where the float model has some; None: none.
    """

    float_denoiser: nn.Module
    layers: Mapping[str, Int8Layer | Int8Attention]
    macs: Mapping[str, int]
    assemble: Callable[[Sequence[str]], nn.Module]
    pipe: DiffusionPipeline
    component: str
    offload: Callable[[], None]
    samples: Sequence[Sample]
    sampling: Sampling
    calls: Sequence[Mapping[str, Any]]
    target_db: float
    progress: Progress
    share_steps: Callable[[nn.Module], StepDenoisers] | None = None

    def run(self) -> tuple[nn.Module, MixedPrecisionResult]:
        """Search.

        Returns:
            The denoiser, and what the search found.

        Raises:
            ConfigError: when only the float model meets the target.
        """
        n_trials = math.ceil(math.log2(len(self.layers))) + 1
        with self.progress.track_loop("Meeting the quality budget", len(self.layers) + n_trials) as advance:
            exact = self._generate_images(self.float_denoiser)
            all_int8 = self.assemble(list(self.layers))
            # dB by the number of float layers and attentions
            reached_db = {0: measure_latents_db(self._generate_images(all_int8), exact)}
            advance(1)
            if reached_db[0] >= self.target_db:
                return all_int8, self._summarize_met_without(reached_db[0])
            self._install(self.float_denoiser)
            sensitivities = measure_layer_sensitivities(
                self.float_denoiser, self.layers, self.calls, on_layer=lambda: advance(1)
            )
            order = sorted(self.layers, key=lambda name: sensitivities[name] / self.macs[name], reverse=True)
            n_float = self._bisect_float_layers(order, exact, reached_db, on_trial=lambda: advance(1))
        self._check_reachable(n_float, reached_db)
        denoiser = self.assemble(order[n_float:])
        total = sum(sensitivities.values()) or 1.0
        result = MixedPrecisionResult(
            asked_db=self.target_db,
            reached_db=reached_db[n_float],
            without_db=reached_db[0],
            kept={name: sensitivities[name] / total for name in order[:n_float]},
            step_ratio=self._compare_step_times(denoiser, all_int8),
            memory_ratio=count_module_bytes(denoiser) / count_module_bytes(all_int8),
        )
        return denoiser, result

    def _install(self, denoiser: nn.Module) -> None:
        """Let the pipeline use a denoiser, and move it like its other components."""
        set_denoiser(self.pipe, denoiser, self.component)
        self.offload()

    def _generate_images(self, denoiser: nn.Module) -> Generation:
        self._install(denoiser)
        # latents are compared, so that nothing has to be decoded
        sampling = replace(self.sampling, extra={**self.sampling.extra, "output_type": "latent"})
        step_denoisers = {}
        if self.share_steps is not None and denoiser is not self.float_denoiser:
            step_denoisers[""] = self.share_steps(denoiser)
        made = generate(
            self.pipe,
            self.component,
            {"": denoiser},
            self.samples,
            sampling,
            differences=Differences(step_denoisers=step_denoisers),
        )
        return made[""]

    def _summarize_met_without(self, reached_db: float) -> MixedPrecisionResult:
        return MixedPrecisionResult(
            asked_db=self.target_db,
            reached_db=reached_db,
            without_db=reached_db,
            kept={},
            step_ratio=1.0,
            memory_ratio=1.0,
        )

    def _bisect_float_layers(
        self,
        order: Sequence[str],
        exact: Generation,
        reached_db: dict[int, float],
        on_trial: Callable[[], None],
    ) -> int:
        """How many of the order, the first ones, have to be float to meet the target; measured on the way.

        All of them, the float model itself, always meet it.
        """
        too_few, enough = 0, len(order)
        while enough - too_few > 1:
            n_float = (too_few + enough) // 2
            trial = self.assemble(order[n_float:])
            reached_db[n_float] = measure_latents_db(self._generate_images(trial), exact)
            log.debug("%d layers and attentions float: %.1f dB", n_float, reached_db[n_float])
            if reached_db[n_float] >= self.target_db:
                enough = n_float
            else:
                too_few = n_float
            on_trial()
        return enough

    def _check_reachable(self, n_float: int, reached_db: Mapping[int, float]) -> None:
        n_all = len(self.layers)
        if n_float < n_all:
            return
        best = max(reached_db, key=reached_db.__getitem__)
        raise ConfigError(
            f"quality_db={self.target_db:g} is met by the float model alone: {reached_db[best]:.1f} dB is "
            f"the most that was measured, with {best} of {n_all} layers and "
            "attentions float; ask for less, or try outlier=auto or rounding=gptq"
        )

    @torch.no_grad()
    def _compare_step_times(self, denoiser: nn.Module, other: nn.Module) -> float:
        calls = []
        for each in (denoiser, other):
            self._install(each)
            calls.append(partial(each, **self.calls[0]))
        seconds, other_seconds = time_medians(calls, get_execution_device(self.pipe), ROUNDS)
        return seconds / other_seconds


def measure_latents_db(made: Generation, exact: Generation) -> float:
    """Signal-to-error ratio of the last latents in dB, from the mean relative error of the images."""
    errors = []
    for trajectory, exact_trajectory in zip(made.trajectories, exact.trajectories, strict=True):
        errors.append(compute_relative_error(trajectory[-1], exact_trajectory[-1]))
    mean = sum(errors) / len(errors)
    return math.inf if mean == 0 else -20 * math.log10(mean)


@torch.no_grad()
def measure_layer_sensitivities(
    denoiser: nn.Module,
    layers: Mapping[str, Int8Layer | Int8Attention],
    calls: Sequence[Mapping[str, Any]],
    *,
    on_layer: Callable[[], None],
) -> dict[str, float]:
    """Squared relative error of the denoiser's output when one layer or attention is INT8, mean over calls.

    Args:
        denoiser: the float model.
        layers: the INT8 layers and attentions, by name.
        calls: arguments of the denoiser.
        on_layer: called after each layer, for progress.
    """
    exact = [get_output_tensor(denoiser(**call)) for call in calls]
    sensitivities = {}
    for name, layer in layers.items():
        squares = []
        with computed_by(denoiser, name, layer):
            for call, exact_output in zip(calls, exact, strict=True):
                output = get_output_tensor(denoiser(**call))
                squares.append(compute_relative_error(output, exact_output) ** 2)
        sensitivities[name] = statistics.mean(squares)
        on_layer()
    return sensitivities


@contextmanager
def computed_by(denoiser: nn.Module, name: str, layer: Int8Layer | Int8Attention) -> Iterator[None]:
    """Let one layer or attention of the float model be computed in INT8 meanwhile.

    Args:
        denoiser: the float model.
        name: of the module.
        layer: computes it.
    """
    module = denoiser.get_submodule(name)
    if isinstance(layer, Int8Attention):
        with native_attention(denoiser), entered_while_running(module, layer):
            yield
        return
    with module.register_forward_hook(make_replacement_hook(copy_sharing_tensors(layer))):
        yield


def make_replacement_hook(layer: nn.Module) -> Callable[..., Tensor]:
    """A forward hook of a Linear that returns the INT8 layer's output instead of the Linear's.

    Args:
        layer: an `Int8Layer`; it is moved to its input, because with offloading it waits in memory.
    """
    int8_layer = cast(Int8Layer, layer)

    def replace_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        # the float model has its own activation before the layer
        return int8_layer.to(x.device).forward_isolated(x)

    return replace_output


def get_output_tensor(returned: Any) -> Tensor:
    """What a denoiser computed, out of the tuple or the object that diffusers returns. float32 [...]."""
    output: Tensor | list[Tensor] = returned[0]
    if isinstance(output, list):  # Z-Image's denoiser gives a tensor for each image
        return torch.cat([tensor.float().flatten() for tensor in output])
    return output.float()
