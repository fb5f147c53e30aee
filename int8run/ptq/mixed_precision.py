"""`model_type.mixed_precision=auto`: what is most sensitive stays float until a quality target is met.

That may be layers and attentions. With `int8.bits=auto` layers of 4 and 6 bits get more bits before.

`int8run.pipeline.quantize_denoiser` runs the search after the layers are quantized. It generates the
calibration images with trial denoisers, so every quality it reports is measured.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.generate import Differences, Generation, generate
from int8run.generate.pipeline_call import get_execution_device
from int8run.generate.prompts import Sample
from int8run.generate.step_denoisers import StepDenoisers
from int8run.layers.int8_attention import Int8Attention
from int8run.metrics.layers import count_module_bytes, count_tensor_bytes
from int8run.metrics.quality import compute_relative_error
from int8run.models.dual_denoisers import set_denoiser
from int8run.models.sampling import Sampling
from int8run.ptq.sensitivities import Computed, measure_layer_sensitivities
from int8run.ptq.upgrade_order import FLOAT_BITS, Choice, Upgrade, order_upgrades
from int8run.report.console import Progress
from int8run.utils.timing import time_medians

log = logging.getLogger(__name__)

MOST_BITS = 8
BITS_CHOICES = (4, 6, MOST_BITS)
# how often a step of each denoiser is timed to compare them
ROUNDS = 11


@dataclass(frozen=True)
class MixedPrecisionResult:
    """What a quality target asked for, what was reached and what it costs.

    The fields are keys in the metadata of INT8 files, and most of them metrics.

    Args:
        asked_db: the target, `quality_db`.
        reached_db: signal-to-error ratio of the last latents.
        without_db: the same with all of them in INT8, at the fewest bits.
        kept: the layers and attentions that stay float, each with its share of the sum of all sensitivities.
        step_ratio: time of a step over its time with all of them in INT8, at the fewest bits.
        memory_ratio: memory of the denoiser over its memory with all of them so.
        bits: of each layer that is not float, where they were chosen by the budget.
    """

    asked_db: float
    reached_db: float
    without_db: float
    kept: Mapping[str, float]
    step_ratio: float
    memory_ratio: float
    bits: Mapping[str, int] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Under their public names."""
        counts = Counter(self.bits.values())
        return {
            **{f"budget/layers_{bits}_bits": counts[bits] for bits in BITS_CHOICES if counts},
            "budget/asked_db": self.asked_db,
            "budget/reached_db": self.reached_db,
            "budget/without_db": self.without_db,
            "budget/layers_kept": len(self.kept),
            "budget/step_ratio": self.step_ratio,
            "budget/memory_ratio": self.memory_ratio,
        }

    def __str__(self) -> str:
        start = f"quality budget {self.asked_db:g} dB"
        counts = Counter(self.bits.values())
        if counts:
            listed = ", ".join(f"{counts[bits]} × {bits} bits" for bits in sorted(counts))
            start = f"{start} ({listed})"
        if not self.kept and self.memory_ratio == 1:
            return f"{start}: met at {self.reached_db:.1f} dB with nothing kept for it"
        reached = f"{self.reached_db:.1f} dB with {len(self.kept)} of the layers and attentions kept float"
        without = "at the fewest bits" if counts else "without"
        price = f"{self.step_ratio:.2f}× the time, the denoiser {self.memory_ratio:.2f}× the memory"
        return f"{start}: {reached}, {self.without_db:.1f} dB {without}; a step takes {price}"


@dataclass(frozen=True)
class MixedPrecisionSearch:
    """Keeps as few layers and attentions float as a quality target needs, and the weights as few bits.

    Those with the most error per multiply-add come first; where layers may have fewer bits, the steps with
    the most error for their cost (`upgrade_order.py`), which is memory and time. How far along that order the
    target is met is found by bisection; each trial generates the calibration images and compares their last
    latents with those of the float model.

    Args:
        float_denoiser: the float model.
        layers: the INT8 layers and attentions, by name; Linears with 8 bits.
        macs: multiply-adds of each in one call of the denoiser.
        assemble: gives the denoiser with these layers and attentions, by name, and the others float.
        pipe: generates the images.
        component: the denoiser's name in the pipe.
        offload: turns offloading on, where it is asked for, for what the pipeline has now.
        samples: prompts and seeds of the calibration images.
        sampling: steps and size of the images.
        calls: arguments of the denoiser at some of their timesteps.
        target_db: the least signal-to-error ratio of the last latents.
        progress: counts layers, attentions and trials.
        share_steps: gives what computes the steps of a trial where the float model has some; None: none.
        fewer_bits: the same layers with fewer bits, by number of bits and name; none: bits are not chosen.
    """

    float_denoiser: nn.Module
    layers: Mapping[str, Computed]
    macs: Mapping[str, int]
    assemble: Callable[[Mapping[str, Computed]], nn.Module]
    pipe: DiffusionPipeline
    component: str
    offload: Callable[[], None]
    samples: Sequence[Sample]
    sampling: Sampling
    calls: Sequence[Mapping[str, Any]]
    target_db: float
    progress: Progress
    share_steps: Callable[[nn.Module], StepDenoisers] | None = None
    fewer_bits: Mapping[int, Mapping[str, Computed]] = field(default_factory=dict)

    def run(self) -> tuple[nn.Module, MixedPrecisionResult]:
        """Search.

        Returns:
            The denoiser, and what the search found.

        Raises:
            ConfigError: when only the float model meets the target.
        """
        by_bits = {**self.fewer_bits, MOST_BITS: self.layers}
        n_variants = sum(map(len, by_bits.values()))
        n_trials = math.ceil(math.log2(n_variants)) + 1
        with self.progress.track_loop("Meeting the quality budget", n_variants + n_trials) as advance:
            exact = self._generate_images(self.float_denoiser)
            fewest = {name: min(bits for bits in by_bits if name in by_bits[bits]) for name in self.layers}
            cheapest = self._assemble(fewest)
            # dB by the number of upgrades
            reached_db = {0: measure_latents_db(self._generate_images(cheapest), exact)}
            advance(1)
            if reached_db[0] >= self.target_db:
                return cheapest, self._summarize_met_without(fewest, reached_db[0])
            self._install(self.float_denoiser)
            errors = {}
            for bits, layers in by_bits.items():
                errors[bits] = measure_layer_sensitivities(
                    self.float_denoiser, layers, self.calls, on_layer=lambda: advance(1)
                )
            upgrades = order_upgrades(self._list_choices(by_bits, errors), fewest)
            n_upgrades = self._bisect_upgrades(fewest, upgrades, exact, reached_db, lambda: advance(1))
        self._check_reachable(fewest, upgrades, n_upgrades, reached_db)
        chosen_bits = apply_upgrades(fewest, upgrades[:n_upgrades])
        denoiser = self._assemble(chosen_bits)
        errors_of_fewest = {name: errors[number][name] for name, number in fewest.items()}
        total = sum(errors_of_fewest.values()) or 1.0
        kept = [upgrade.name for upgrade in upgrades[:n_upgrades] if upgrade.bits == FLOAT_BITS]
        result = MixedPrecisionResult(
            asked_db=self.target_db,
            reached_db=reached_db[n_upgrades],
            without_db=reached_db[0],
            kept={name: errors_of_fewest[name] / total for name in kept},
            step_ratio=self._compare_step_times(denoiser, cheapest),
            memory_ratio=count_module_bytes(denoiser) / count_module_bytes(cheapest),
            bits=self._list_chosen_bits(chosen_bits),
        )
        return denoiser, result

    def _assemble(self, bits: Mapping[str, int]) -> nn.Module:
        """The denoiser in which each layer has these bits."""
        by_bits = {**self.fewer_bits, MOST_BITS: self.layers}
        chosen = {}
        for name, number in bits.items():
            if number != FLOAT_BITS:
                chosen[name] = by_bits[number][name]
        return self.assemble(chosen)

    def _list_choices(
        self, by_bits: Mapping[int, Mapping[str, Computed]], errors: Mapping[int, Mapping[str, float]]
    ) -> dict[str, list[Choice]]:
        """What each layer and attention can be, with its cost.

        Without a choice of bits the cost is time alone, in multiply-adds that are not INT8: then it is the
        one thing that differs by much. With one it is memory, too, each as a share of the whole model's.

        Args:
            by_bits: layers by bits and name.
            errors: of each of them.
        """
        total_macs = sum(self.macs.values())
        float_bytes = {name: count_float_bytes(self.float_denoiser, name) for name in self.layers}
        total_bytes = sum(float_bytes.values()) or 1
        choices: dict[str, list[Choice]] = {}
        for name in self.layers:
            found = []
            for bits, layers in by_bits.items():
                if name not in layers:
                    continue
                size = count_own_bytes(layers[name]) / total_bytes if self.fewer_bits else 0.0
                found.append(Choice(bits, size, errors[bits][name]))
            time: float = self.macs[name]
            cost = time
            if self.fewer_bits:
                cost = time / total_macs + float_bytes[name] / total_bytes
            choices[name] = [*found, Choice(FLOAT_BITS, cost, error=0.0)]
        return choices

    def _list_chosen_bits(self, bits: Mapping[str, int]) -> dict[str, int]:
        """The bits of Linears that are not float; nothing where they were not chosen."""
        if not self.fewer_bits:
            return {}
        return {
            name: number
            for name, number in bits.items()
            if number != FLOAT_BITS and not isinstance(self.layers[name], Int8Attention)
        }

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

    def _summarize_met_without(self, fewest: Mapping[str, int], reached_db: float) -> MixedPrecisionResult:
        return MixedPrecisionResult(
            asked_db=self.target_db,
            reached_db=reached_db,
            without_db=reached_db,
            kept={},
            step_ratio=1.0,
            memory_ratio=1.0,
            bits=self._list_chosen_bits(fewest),
        )

    def _bisect_upgrades(
        self,
        fewest: Mapping[str, int],
        upgrades: Sequence[Upgrade],
        exact: Generation,
        reached_db: dict[int, float],
        on_trial: Callable[[], None],
    ) -> int:
        """How many of the upgrades, the first ones, meet the target; measured on the way.

        All of them make the float model itself, which always meets it.
        """
        too_few, enough = 0, len(upgrades)
        while enough - too_few > 1:
            count = (too_few + enough) // 2
            trial = self._assemble(apply_upgrades(fewest, upgrades[:count]))
            reached_db[count] = measure_latents_db(self._generate_images(trial), exact)
            log.debug("%d upgrades of layers and attentions: %.1f dB", count, reached_db[count])
            if reached_db[count] >= self.target_db:
                enough = count
            else:
                too_few = count
            on_trial()
        return enough

    def _check_reachable(
        self,
        fewest: Mapping[str, int],
        upgrades: Sequence[Upgrade],
        n_upgrades: int,
        reached_db: Mapping[int, float],
    ) -> None:
        if n_upgrades < len(upgrades):
            return
        best = max(reached_db, key=reached_db.__getitem__)
        bits = apply_upgrades(fewest, upgrades[:best])
        n_float = list(bits.values()).count(FLOAT_BITS)
        raise ConfigError(
            f"quality_db={self.target_db:g} is met by the float model alone: {reached_db[best]:.1f} dB is "
            f"the most that was measured, with {n_float} of {len(self.layers)} layers and "
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


def apply_upgrades(fewest: Mapping[str, int], upgrades: Sequence[Upgrade]) -> dict[str, int]:
    """The bits of each layer after some upgrades."""
    return {**fewest, **{upgrade.name: upgrade.bits for upgrade in upgrades}}


def count_own_bytes(layer: Computed) -> int:
    """Memory of a layer without its transform, whose matrix others share; an attention has none."""
    if isinstance(layer, Int8Attention):
        return 0
    return count_tensor_bytes(layer.buffers(recurse=False))


def count_float_bytes(denoiser: nn.Module, name: str) -> int:
    """Memory of a layer of the float model; an attention has none of its own."""
    weight = getattr(denoiser.get_submodule(name), "weight", None)
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0


def measure_latents_db(made: Generation, exact: Generation) -> float:
    """Signal-to-error ratio of the last latents in dB, from the mean relative error of the images."""
    errors = []
    for trajectory, exact_trajectory in zip(made.trajectories, exact.trajectories, strict=True):
        errors.append(compute_relative_error(trajectory[-1], exact_trajectory[-1]))
    mean = sum(errors) / len(errors)
    return math.inf if mean == 0 else -20 * math.log10(mean)
