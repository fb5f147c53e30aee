"""Whether a denoiser can have a step cache: by its modules before weights are read, then by what it computes.

diffusers keeps a list of the blocks that it knows (`TransformerBlockRegistry`), and does not check whether a
model adds something between its blocks, such as the outputs of a ControlNet: a skipped block would add it
twice. So a cache is tried: where a denoiser is called with equal arguments again, what it gives with the
cache must be what it gave without.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

from int8run.cache_steps.base import BLOCKS, CacheCalls, StepCache, StepPosition
from int8run.cache_steps.blocks import register_blocks
from int8run.cache_steps.registry import list_cache_names, make_cache
from int8run.errors import ConfigError
from int8run.models.dual_denoisers import split_denoiser
from int8run.pipeline.step_cache import CachedPart, list_blocks, put_on_cache, remove_hooks
from int8run.utils.text import shorten_error

Call = Mapping[str, Any]  # the arguments of one call of a denoiser, by name
TRIALS = 3  # equal calls: two that may compute, and one that skips
TRIAL_STEPS = 1000  # of which the trial is the first ones, far from the last that a cache computes
MAX_CHANGE = 0.05  # of bfloat16 sums of residuals; what is added twice is more
# what diffusers' hooks raise at a model that they were not made for
HOOK_ERRORS = (ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, RuntimeError)


def check_modules(cache: StepCache, denoisers: Mapping[str, nn.Module]) -> None:
    """Check that a cache finds its modules in some denoisers, which need no weights.

    Args:
        cache: the settings.
        denoisers: of a pipeline, by component.

    Raises:
        ConfigError: where it does not, with the caches that would.
    """
    if len(denoisers) > 1 and not cache.takes_two_denoisers:
        raise ConfigError(
            f"the pipeline has {len(denoisers)} denoisers ({', '.join(denoisers)}), each with its part of "
            "the steps, and cache_steps.ratios is one list; set cache_steps.ratios=auto, which measures each"
        )
    for denoiser in denoisers.values():
        reason = find_missing_modules(cache, denoiser)
        if reason is None:
            continue
        fitting = [
            name for name in list_cache_names() if find_missing_modules(make_cache(name), denoiser) is None
        ]
        raise ConfigError(describe_refusal(cache, denoiser, reason, fitting))


def find_missing_modules(cache: StepCache, denoiser: nn.Module) -> str | None:
    """Why a cache cannot be put on a denoiser; None: it can."""
    if cache.skips == BLOCKS:
        reason = find_unknown_blocks(denoiser, needs_equal=cache.needs_equal_blocks)
        if reason is not None:
            return reason
    try:
        hooks = put_on_cache(cache, denoiser, CacheCalls(StepPosition(), num_calls=TRIAL_STEPS))
    except HOOK_ERRORS as error:
        return shorten_error(error)
    num_counted = sum(hook.is_counted and hook.name != "" for hook in hooks)
    remove_hooks(hooks)
    return None if num_counted else f"diffusers finds no {cache.skips} in it that it could skip"


def find_unknown_blocks(denoiser: nn.Module, *, needs_equal: bool) -> str | None:
    """Why the blocks of a denoiser cannot be skipped; None: diffusers, or `blocks.yaml`, knows them.

    Args:
        denoiser: whose blocks are looked at.
        needs_equal: whether all must return as many tensors.
    """
    register_blocks(list_blocks(denoiser))
    classes = list(dict.fromkeys(type(block) for block in list_blocks(denoiser)))
    if not classes:
        return "it has no list of repeated blocks"
    has_text = []
    for cls in classes:
        try:
            metadata = TransformerBlockRegistry.get(cls)
        except ValueError:
            return f"it is not known what its {cls.__name__} returns"
        has_text.append(metadata.return_encoder_hidden_states_index is not None)
    if needs_equal and len(set(has_text)) > 1:
        names = " and ".join(cls.__name__ for cls in classes)
        return f"its {names} return different numbers of tensors"
    return None


def describe_refusal(cache: StepCache, denoiser: nn.Module, reason: str, fitting: Sequence[str]) -> str:
    """The message of a cache that a denoiser cannot have.

    Args:
        cache: that was asked for.
        denoiser: that cannot have it.
        reason: why not.
        fitting: names of those that it can have.
    """
    others = "leave cache_steps out: no cache works with it"
    if fitting:
        others = f"it can have {', '.join(f'cache_steps={name}' for name in fitting)}"
    return f"cache_steps={cache.name} cannot be put on {type(denoiser).__name__}: {reason}; {others}"


def check_cache_fits(
    cache: StepCache, denoiser: nn.Module, calls: Sequence[Call], num_samples: int
) -> CacheCalls:
    """Try a cache on equal calls of a denoiser.

    Args:
        cache: the settings.
        denoiser: a single one, or two as one module.
        calls: arguments of a call; of two denoisers those of each.
        num_samples: of the batch that made them.

    Returns:
        How the denoiser is called; its position and its number of calls are not known yet.

    Raises:
        ConfigError: where the cache changes what they compute, or cannot be put on, with those that can.
    """
    described = describe_calls(denoiser, calls, num_samples)
    for part, call in iterate_calls(denoiser, calls):
        reason = find_wrong_output(cache, part, call, described)
        if reason is None:
            continue
        fitting = []
        alone = replace(described, is_batched=False)
        if described.is_batched and find_wrong_output(cache, part, call, alone) is None:
            fitting.append(f"{cache.name} cache_steps.guidance=false")
        for name in list_cache_names():
            other = make_cache(name)
            if name != cache.name and find_wrong_output(other, part, call, described) is None:
                fitting.append(name)
        raise ConfigError(describe_refusal(cache, part, reason, fitting))
    return described


def iterate_calls(denoiser: nn.Module, calls: Sequence[Call]) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Each denoiser that is called, with its arguments."""
    parts = split_denoiser(denoiser)
    for call in calls:
        arguments = dict(call)
        expert = arguments.pop("expert", "")
        yield parts[f"{expert}." if expert else ""], arguments


@torch.no_grad()
def describe_calls(denoiser: nn.Module, calls: Sequence[Call], num_samples: int) -> CacheCalls:
    """What a cache must know of the calls: whether guidance is in the batch, and the form of the output.

    Args:
        denoiser: to call.
        calls: arguments of its calls.
        num_samples: of the batch that made them.
    """
    part, call = next(iterate_calls(denoiser, calls))
    tensors = [value for value in call.values() if isinstance(value, Tensor) and value.ndim > 1]
    is_batched = bool(tensors) and tensors[0].shape[0] == 2 * num_samples
    output_format = {4: "BCHW", 5: "BCFHW"}.get(run_call(part, call).ndim, "")
    # the frequencies of packed tokens are not known
    return CacheCalls(
        StepPosition(),
        num_calls=0,
        is_batched=is_batched and output_format != "",
        output_format=output_format or "BCHW",
    )


def find_wrong_output(cache: StepCache, part: nn.Module, call: Call, described: CacheCalls) -> str | None:
    """Why a cache does not fit a denoiser, by what that computes with it; None: it fits.

    Args:
        cache: the settings.
        part: the denoiser.
        call: its arguments.
        described: how it is called.
    """
    missing = find_missing_modules(cache, part)
    if missing is not None:
        return missing
    position = StepPosition(num_steps=TRIAL_STEPS, timestep=500.0, sigma=0.5)
    calls = replace(described, position=position, num_calls=TRIAL_STEPS, ratios=[1.0] * TRIAL_STEPS)
    trial = CachedPart("", part, cache.force(), calls, macs={}, look=lambda: None)
    outputs, num_skipped = [], 0
    try:
        for step in range(TRIALS):
            position.step = step
            outputs.append(run_call(part, call).float())
            num_skipped += bool(trial.end_step())
    except HOOK_ERRORS as error:
        return f"its blocks are not what diffusers' hooks take ({shorten_error(error)})"
    finally:
        trial.remove()
    if not num_skipped:
        return "nothing was skipped in equal steps"
    change = max(measure_change(output, outputs[0]) for output in outputs[1:])
    if change <= MAX_CHANGE:
        return None
    return (
        f"in equal steps its output changed by {change:.0%}: it computes something between its blocks, which "
        "would be skipped or added twice"
    )


def measure_change(output: Tensor, first: Tensor) -> float:
    """How far an output is from another, over its size; infinite where it has another shape or NaN."""
    if output.shape != first.shape or not output.isfinite().all():
        return math.inf
    return float((output - first).norm() / first.norm().clamp_min(1e-30))


@torch.no_grad()
def run_call(part: nn.Module, call: Call) -> Tensor:
    """The first tensor that a denoiser returns."""
    with torch.compiler.set_stance("force_eager"):
        output = part(**call)
    return find_tensor(output)


def find_tensor(output: Any) -> Tensor:
    """The first tensor of an output: a tensor, some, lists of them, or diffusers' classes of them."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else list(output)
    return find_tensor(values[0])
