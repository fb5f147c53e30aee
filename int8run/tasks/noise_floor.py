"""`metrics.noise_floor`: the float model generates once more, computed otherwise.

Two passes: one that computes the same otherwise (another batch, attention kernel and number of threads, at
once, as far as they can be had), and one in another dtype. `tasks.run` draws them before any other model is
built, as it does with `metrics.baseline=cached`; `noise_floor_metrics` compares.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from int8run.config.run_spec import RunSpec
from int8run.generate.generate import Differences, Generation, GenerationHooks, generate
from int8run.generate.pipeline_call import choose_noise_seed
from int8run.generate.prompts import Sample, split_batches
from int8run.metrics.names import DTYPE_FLOOR, NOISE_FLOOR
from int8run.models.loader import pick_device
from int8run.models.sampling import NUM_FRAMES
from int8run.models.schedulers import set_scheduler
from int8run.models.source import resolve_model
from int8run.pipeline import process_cache
from int8run.pipeline.build import build_model
from int8run.pipeline.float_baseline import BaselineOrigin, get_float_baseline
from int8run.pipeline.model_files import count_weight_numbers
from int8run.tasks.run_inputs import RunInputs
from int8run.utils.disk_cache import DiskCache
from int8run.utils.hardware import count_free_bytes

log = logging.getLogger(__name__)
BATCH = "batch"  # how its change begins
FLOAT32_BYTES = 4
# what a float model is computed in besides its own dtype: the next exact one, else the usual narrow one
OTHER_DTYPES = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
# attention of these devices without the kernel that torch takes first
OTHER_ATTENTION = {
    "cpu": ("math", [SDPBackend.MATH]),
    "cuda": ("memory-efficient", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    "xpu": ("math", [SDPBackend.MATH]),
}


@dataclass(frozen=True)
class FloatVariation:
    """The float model, computed otherwise.

    Args:
        metric: the name of its PSNR to the float model as it is.
        changes: in what it is another one, in words.
        spec: of the float model alone.
        attention: kernels that attention may take; empty: those that it takes anyway.
        num_threads: None: as many as before.
        own_batch: of the run, where this one's is another; else None.
    """

    metric: str
    changes: Sequence[str]
    spec: RunSpec
    attention: Sequence[SDPBackend] = ()
    num_threads: int | None = None
    own_batch: int | None = None

    @property
    def description(self) -> str:
        """In what it is another one, in one phrase."""
        return ", ".join(self.changes)

    @property
    def has_other_batch(self) -> bool:
        """Whether the samples are generated in other batches."""
        return self.own_batch is not None

    def with_own_batch(self) -> "FloatVariation":
        """The same with the batches of the run."""
        assert self.own_batch is not None
        sampler = replace(self.spec.sampler, batch=self.own_batch)
        changes = [change for change in self.changes if not change.startswith(BATCH)]
        return replace(self, changes=changes, spec=replace(self.spec, sampler=sampler), own_batch=None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Attention kernels and threads of this variation; those of before come back afterwards."""
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            if self.attention:
                stack.enter_context(sdpa_kernel(list(self.attention)))
            if self.num_threads is not None:
                torch.set_num_threads(self.num_threads)
                stack.callback(torch.set_num_threads, threads)
            yield


@dataclass(frozen=True)
class NoiseFloor:
    """What the float model generated when it was computed otherwise.

    Args:
        variations: how it was.
        impossible: what could not be varied, each with the reason.
        generations: by the metric of each variation.
    """

    variations: Sequence[FloatVariation]
    impossible: Sequence[str]
    generations: Mapping[str, Generation]


# -- what is varied ------------------------------------------------------------------------------------------


def plan_variations(spec: RunSpec, inputs: RunInputs, impossible: list[str]) -> list[FloatVariation]:
    """Decide how the float model of a run can be computed otherwise here.

    Args:
        spec: of the run.
        inputs: its samples.
        impossible: is told what cannot be varied.
    """
    kernels = vary_kernels(spec, inputs, impossible)
    dtype = vary_dtype(spec)
    return [dtype] if kernels is None else [kernels, dtype]


def vary_kernels(spec: RunSpec, inputs: RunInputs, impossible: list[str]) -> FloatVariation | None:
    """The float model with another batch, attention kernel and number of threads; None where none can be had.

    Args:
        spec: of the run.
        inputs: its samples.
        impossible: is told what cannot be varied.
    """
    device = pick_device(spec.device).type
    float_spec = spec.float_only
    changes = []
    batch = choose_other_batch(spec, inputs)
    if batch is None:
        impossible.append("batch: no two samples of this run share a call")
    else:
        changes.append(f"{BATCH} {batch} in place of {spec.sampling.batch}")
        float_spec = replace(float_spec, sampler=replace(float_spec.sampler, batch=batch))
    attention = choose_other_attention(spec, device, changes, impossible)
    num_threads = choose_other_threads(device, changes, impossible)
    if not changes:
        return None
    return FloatVariation(
        metric=NOISE_FLOOR,
        changes=changes,
        spec=float_spec,
        attention=attention,
        num_threads=num_threads,
        own_batch=None if batch is None else spec.sampling.batch,
    )


def choose_other_batch(spec: RunSpec, inputs: RunInputs) -> int | None:
    """Another number of samples for each call; None where every sample has a call of its own anyway."""
    if spec.sampling.batch > 1:
        return 1 if len(inputs.get_first_batch(spec)) > 1 else None
    pairs = split_batches(inputs.samples, 2)
    has_pairs = any(len(batch) > 1 for batch in pairs)
    return 2 if has_pairs and NUM_FRAMES not in spec.sampling.extra else None


def choose_other_attention(
    spec: RunSpec, device: str, changes: list[str], impossible: list[str]
) -> Sequence[SDPBackend]:
    """Kernels that attention does not take by itself; none where it has no other ones.

    Args:
        spec: of the run.
        device: type of the device.
        changes: is told the kernel.
        impossible: is told why there is none.
    """
    obstacle = find_attention_obstacle(spec, device)
    if obstacle:
        impossible.append(f"attention: {obstacle}")
        return ()
    name, kernels = OTHER_ATTENTION[device]
    changes.append(f"{name} attention")
    return kernels


def choose_other_threads(device: str, changes: list[str], impossible: list[str]) -> int | None:
    """Another number of threads; None where the CPU does not compute.

    Args:
        device: type of the device.
        changes: is told the number.
        impossible: is told where the model runs.
    """
    if device != "cpu":
        impossible.append(f"threads: the model runs on {device}")
        return None
    threads = torch.get_num_threads()
    other = threads // 2 if threads > 1 else 2
    changes.append(f"{other} in place of {threads} CPU threads")
    return other


def find_attention_obstacle(spec: RunSpec, device: str) -> str:
    """Why attention cannot be computed by another kernel; empty where it can."""
    if spec.attention != "native":
        return f"attention={spec.attention} is no kernel of torch"
    if spec.compile != "none":
        return f"compile={spec.compile} has chosen its kernels"
    if device not in OTHER_ATTENTION:
        return f"torch has one kernel on {device}"
    if device != "cuda" and NUM_FRAMES in spec.sampling.extra:
        return "that of a video does not fit into memory as a whole"
    return ""


def vary_dtype(spec: RunSpec) -> FloatVariation:
    """The float model in another dtype."""
    dtype = OTHER_DTYPES[spec.model.dtype]
    float_spec = replace(spec.float_only, model=replace(spec.model, dtype=dtype))
    return FloatVariation(
        metric=DTYPE_FLOOR, changes=[f"{dtype} in place of {spec.model.dtype}"], spec=float_spec
    )


# -- drawing -------------------------------------------------------------------------------------------------


class NoiseBetweenStepsError(Exception):
    """A scheduler adds noise between steps: a sample's noise depends on its batch, so that may not change."""


class NoFitError(Exception):
    """The model does not fit into memory in another dtype."""


def draw_noise_floor(spec: RunSpec, inputs: RunInputs) -> NoiseFloor | None:
    """What the float model generates when it is computed otherwise, from the cache or now.

    Args:
        spec: of the run.
        inputs: its samples and LoRAs.

    Returns:
        None where it was not asked for.
    """
    if not spec.metrics.noise_floor:
        return None
    impossible: list[str] = []
    passes: list[FloatVariation] = []
    generations = {}
    for variation in plan_variations(spec, inputs, impossible):
        drawn, generation = draw_variation(variation, inputs, spec.cache, impossible)
        if generation is not None:
            passes.append(drawn)
            generations[drawn.metric] = generation
    for reason in impossible:
        log.info("noise floor, not varied: %s", reason)
    return NoiseFloor(passes, impossible, generations)


def draw_variation(
    variation: FloatVariation, inputs: RunInputs, cache: DiskCache, impossible: list[str]
) -> tuple[FloatVariation, Generation | None]:
    """One pass of the float model, in its own batches where the noise of its scheduler depends on them.

    Args:
        variation: how it is computed.
        inputs: samples and LoRAs.
        cache: of earlier and later runs.
        impossible: is told what could not be varied.

    Returns:
        The variation as it was drawn, and what was generated; None where it could not be.
    """
    try:
        return variation, find_or_generate(variation, inputs, cache)
    except NoFitError:
        impossible.append(f"dtype: the model does not fit into memory in {variation.spec.model.dtype}")
        return variation, None
    except NoiseBetweenStepsError:
        impossible.append("batch: the scheduler adds noise between steps, which depends on it")
    same_batch = variation.with_own_batch()
    if not same_batch.changes:
        return same_batch, None
    return same_batch, find_or_generate(same_batch, inputs, cache)


def find_or_generate(variation: FloatVariation, inputs: RunInputs, cache: DiskCache) -> Generation:
    """One pass of the float model: of an earlier job, out of the cache, or now.

    Args:
        variation: how it is computed.
        inputs: samples and LoRAs.
        cache: of earlier and later runs.
    """
    settings_key = f"{variation.spec.float_key} | {variation.description}"
    key = repr((settings_key, inputs.samples))
    known: Generation | None = process_cache.get(key)
    if known is not None:
        return known
    origin = BaselineOrigin(
        model=variation.spec.model,
        headers=inputs.headers,
        samples=inputs.samples,
        settings_key=settings_key,
        device=variation.spec.device,
    )
    generation, _ = get_float_baseline(origin, cache, partial(generate_variation, variation, inputs))
    process_cache.put(key, generation, generation.nbytes)
    return generation


def generate_variation(variation: FloatVariation, inputs: RunInputs) -> Generation:
    """Build the float model alone and let it generate, computed otherwise; only its images are kept.

    Args:
        variation: how it is computed.
        inputs: samples and LoRAs.

    Raises:
        NoiseBetweenStepsError: when its batch is another one, and the noise of its scheduler depends on it.
        NoFitError: when it is wider than the run's model, and does not fit.
    """
    spec = variation.spec
    # else a model of an earlier job would be in memory beside it
    process_cache.clear_build()
    if spec.model.dtype == "float32" and variation.metric == DTYPE_FLOOR:
        check_room(spec)
    built = build_model(spec, inputs.get_first_batch(spec), inputs.headers, inputs.progress)
    set_scheduler(built.pipe, built.scheduler, spec.sampling)
    built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)

    is_checked = not variation.has_other_batch

    def on_fraction(fraction: float) -> None:
        nonlocal is_checked
        if spec.lora.is_scheduled:
            built.set_strengths(spec.lora.get_strengths_at(fraction), spec.lora.text_strengths)
        has_stepped = fraction > 0
        if has_stepped and not is_checked:
            is_checked = True
            if has_drawn_noise(inputs.samples[0], built.device):
                raise NoiseBetweenStepsError

    label = f"Noise floor ({variation.description})"
    loop = inputs.progress.track_loop(label, len(inputs.samples), line_each=True)
    with loop as advance, variation.applied():
        hooks = GenerationHooks(
            on_batch=lambda name, batch, generation: advance(len(batch)), on_fraction=on_fraction
        )
        made = generate(
            built.pipe,
            built.component,
            {"float": built.denoisers["float"]},
            inputs.samples,
            spec.sampling,
            hooks=hooks,
            differences=Differences(built.text_encoders, components=built.components),
        )
    return replace(made["float"], trajectories=[])


def check_room(spec: RunSpec) -> None:
    """Raise NoFitError where a float32 copy of a model needs more memory than is free."""
    needed = FLOAT32_BYTES * count_weight_numbers(resolve_model(spec.model))
    free = count_free_bytes(pick_device(spec.device))
    if 0 < free < needed:
        raise NoFitError


def has_drawn_noise(first: Sample, device: torch.device) -> bool:
    """Whether a scheduler has taken numbers from torch's global generator since the call was seeded.

    Args:
        first: sample of the call.
        device: where the pipeline computes.
    """
    module: Any = torch if device.type == "cpu" else getattr(torch, device.type)
    state = module.get_rng_state() if device.type == "cpu" else module.get_rng_state(device)
    untouched = torch.Generator(device).manual_seed(choose_noise_seed(first)).get_state()
    return not torch.equal(state, untouched)
