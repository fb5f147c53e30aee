"""Puts a step cache on a denoiser for the length of a pipeline's call, and counts what it skips.

The hooks are diffusers' own; `cache_steps` registers them. What is added here: they are new for each call, so
that nothing is kept from one image to the next; every call of the denoiser says which step it belongs to and
which prompt it has, also where the pipeline does not; and what computes is counted at the hooks themselves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks.hooks import CacheContext, StateManager
from torch import nn

from int8run.cache_steps.base import TIMESTEPS, CacheCalls, StepCache, StepPosition
from int8run.generate.generate import Generation
from int8run.generate.step_counts import StepCounts
from int8run.generate.step_observer import count_steps
from int8run.models.dual_denoisers import split_denoiser

FORWARD = "forward"


class CountedHook:
    """One hook of a cache: how often its module was called, and how often it computed.

    Args:
        name: of the module in the denoiser.
        module: that has the hook.
        key: of the hook in the module's registry.
    """

    def __init__(self, name: str, module: nn.Module, key: str):
        self.name = name
        self.module = module
        self.key = key
        self.registry = HookRegistry.check_if_exists_or_initialize(module)
        self.hook = self.registry.hooks[key]
        self.had_forward = False
        self.reference = self.hook.fn_ref
        self.original_forward = self.reference.original_forward
        self.pre_forward = self.reference.pre_forward
        self.num_calls = self.num_computed = 0
        # None: the hook changes no computation, it only looks on
        self.is_counted = self.original_forward is not None
        if self.is_counted:
            self.reference.original_forward = self.compute
            self.reference.pre_forward = self.note_call

    @property
    def num_skipped(self) -> int:
        """Calls that were answered without computing."""
        return self.num_calls - self.num_computed

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the module's own forward."""
        self.num_computed += 1
        return self.original_forward(*args, **kwargs)

    def note_call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of what the hook does before it decides."""
        self.num_calls += 1
        return self.pre_forward(module, *args, **kwargs)

    def remove(self) -> None:
        """Give the module its own forward back."""
        self.reference.original_forward = self.original_forward
        self.reference.pre_forward = self.pre_forward
        self.registry.remove_hook(self.key, recurse=False)
        if not self.had_forward:
            # diffusers leaves the method of the class on the object
            self.module.__dict__.pop(FORWARD, None)


def put_on_cache(cache: StepCache, denoiser: nn.Module, calls: CacheCalls) -> list[CountedHook]:
    """Put a cache on a denoiser.

    Args:
        cache: the settings.
        denoiser: that a pipeline calls; one of two.
        calls: how it is called.

    Returns:
        The hooks, in the order in which they were registered. None stays where one could not be.
    """
    before = {name: list_hooks(module) for name, module in denoiser.named_modules()}
    with_forward = {name for name, module in denoiser.named_modules() if FORWARD in module.__dict__}
    hooks: list[CountedHook] = []
    is_complete = False
    try:
        cache.put_on(denoiser, calls)
        is_complete = True
    finally:
        for name, module in denoiser.named_modules():
            for key in list_hooks(module):
                if key not in before[name]:
                    hook = CountedHook(name, module, key)
                    hook.had_forward = name in with_forward
                    hooks.append(hook)
        if not is_complete:
            remove_hooks(hooks)
        forget_children(denoiser)
    return hooks


def remove_hooks(hooks: Sequence[CountedHook]) -> None:
    """Take hooks off, the last one first."""
    for hook in reversed(hooks):
        hook.remove()


def list_hooks(module: nn.Module) -> list[str]:
    """The keys of diffusers' hooks on one module, in their order."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks)


def forget_children(denoiser: nn.Module) -> None:
    """Let diffusers look again for the modules with hooks, whose list it keeps."""
    HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()


class CachedPart:
    """A cache on one denoiser, from the start of a pipeline's call to its end.

    Args:
        prefix: of its layers' names, where a pipeline has two.
        part: the denoiser.
        cache: the settings.
        calls: how it is called.
        macs: multiply-adds of one call, by the name of the layer.
        look: brings the position of `calls` up to date.
    """

    def __init__(
        self,
        prefix: str,
        part: nn.Module,
        cache: StepCache,
        calls: CacheCalls,
        *,
        macs: Mapping[str, int],
        look: Callable[[], None],
    ):
        self.prefix = prefix
        self.part = part
        self.calls = calls
        self.look = look
        self.hooks = put_on_cache(cache, part, calls)
        self.counted = [hook for hook in self.hooks if hook.is_counted and hook.name]
        self.managers = list_state_managers(self.hooks)
        self.num_calls = self.calls_in_step = 0
        self.seen_skipped = self.seen_calls = 0
        self.context: CacheContext | None = None
        self.states: dict[tuple[int, str], Any] = {}
        own_macs = {name.removeprefix(prefix): n for name, n in macs.items() if name.startswith(prefix)}
        self.macs = sum(own_macs.values())
        self.hook_macs = [sum_below(hook.name, own_macs) for hook in self.counted]
        self.handle = part.register_forward_pre_hook(self.announce_call, with_kwargs=True)

    def announce_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the hooks which step the call belongs to, and which of its prompts."""
        self.look()
        position = self.calls.position
        self.context = CacheContext(
            name=self.name_call(),
            step_index=position.step,
            num_inference_steps=position.num_steps,
            timestep=position.timestep,
            sigma=position.sigma,
        )
        self.num_calls += 1
        self.calls_in_step += 1
        for manager in self.managers:
            manager.set_context(self.context)
        self.switch_states(self.context.name)

    def name_call(self) -> str:
        """What tells the calls of one step apart: the pipeline's own name, else their order in the step."""
        for manager in self.managers:
            own = manager._context
            if own is not None and own is not self.context:
                return str(own.name)
        return f"call {self.calls_in_step}"

    def switch_states(self, name: str) -> None:
        """Give hooks that know one trajectory alone that of the prompt which is called next.

        diffusers' FasterCache and pyramid attention broadcast would else give one prompt what they kept of
        the other, where a pipeline calls its denoiser for each.
        """
        for index, hook in enumerate(self.counted):
            state = getattr(hook.hook, "state", None)
            if state is not None:
                hook.hook.state = self.states.setdefault((index, name), type(state)())

    def end_step(self) -> bool | None:
        """Whether anything was skipped since the last step ended; None: the denoiser was not called."""
        self.calls_in_step = 0
        num_calls, num_skipped = self.num_calls, sum(hook.num_skipped for hook in self.counted)
        was_called, has_skipped = num_calls > self.seen_calls, num_skipped > self.seen_skipped
        self.seen_calls, self.seen_skipped = num_calls, num_skipped
        return has_skipped if was_called else None

    def count_macs(self) -> tuple[int, int]:
        """Multiply-adds of all calls without the cache, and of what was skipped."""
        skipped = 0
        for hook, macs in zip(self.counted, self.hook_macs, strict=True):
            skipped += hook.num_skipped * macs
        return self.num_calls * self.macs, skipped

    def read_ratios(self) -> dict[str, list[float]]:
        """What `magcache` has measured in this call so far, by the name of the prompt."""
        found = {}
        for manager in self.managers:
            for name, state in manager._state_cache.items():
                found[name] = list(getattr(state, "calibration_ratios", ()))
        return found

    def remove(self) -> None:
        """Take the cache off."""
        self.handle.remove()
        remove_hooks(self.hooks)
        forget_children(self.part)


def list_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a denoiser that diffusers' caches look for, in their order."""
    blocks: list[nn.Module] = []
    for name, module in denoiser.named_children():
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(module, nn.ModuleList):
            blocks += module
    return blocks


def list_state_managers(hooks: Sequence[CountedHook]) -> list[StateManager]:
    """What keeps the states of some hooks; those of a cache mostly share one."""
    found: dict[int, StateManager] = {}
    for counted in hooks:
        for value in vars(counted.hook).values():
            if isinstance(value, StateManager):
                found[id(value)] = value
    return list(found.values())


def read_position(pipe: Any, position: StepPosition) -> None:
    """Bring a position up to date, but for the number of its step, by the pipeline's scheduler.

    Args:
        pipe: that is being called.
        position: is changed.
    """
    scheduler = pipe.scheduler
    position.num_steps = count_steps(pipe)
    index = (getattr(scheduler, "begin_index", None) or 0) + position.step
    timesteps = scheduler.timesteps
    if index < len(timesteps):
        scale = TIMESTEPS / scheduler.config.num_train_timesteps
        position.timestep = float(timesteps[index]) * scale
    sigmas = getattr(scheduler, "sigmas", ())
    has_flow = "Flow" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas", False)
    position.sigma = float(sigmas[index]) if has_flow and index < len(sigmas) else None


def sum_below(name: str, macs: Mapping[str, int]) -> int:
    """Multiply-adds of a module and of everything in it."""
    return sum(count for layer, count in macs.items() if layer == name or layer.startswith(f"{name}."))


@dataclass
class CacheSwitch:
    """A step cache of one model: put on before a call of the pipeline, and off after it.

    Args:
        pipe: the pipeline.
        denoiser: a single one, or two as one module.
        cache: the settings.
        calls: how the denoiser is called; its position is kept up to date.
        macs: multiply-adds of one call, by the name of the layer.
        ratios: for `magcache`, by the prefix of the denoiser's layers; those of `calls` where there are none.
    """

    pipe: Any
    denoiser: nn.Module
    cache: StepCache
    calls: CacheCalls
    macs: Mapping[str, int] = field(default_factory=dict)
    ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)
    parts: list[CachedPart] = field(default_factory=list)
    counts: StepCounts = StepCounts()  # noqa: RUF009  # frozen

    @property
    def position(self) -> StepPosition:
        """Where in the pipeline's call it is."""
        return self.calls.position

    def start(self) -> None:
        """Put the cache on; nothing is kept of an earlier call."""
        self.stop()
        self.counts = StepCounts()
        self.position.step = -1
        for prefix, part in split_denoiser(self.denoiser).items():
            calls = self.calls
            if prefix in self.ratios:
                ratios = self.ratios[prefix]
                calls = replace(calls, ratios=ratios, num_calls=len(ratios))
            look = partial(read_position, self.pipe, self.position)
            self.parts.append(CachedPart(prefix, part, self.cache, calls, macs=self.macs, look=look))

    def begin_step(self) -> None:
        """End the step before, and begin the next; called once more after the last."""
        self.end_step()
        self.position.step += 1

    def end_step(self) -> None:
        """Count the step that has ended."""
        results = [skipped for part in self.parts if (skipped := part.end_step()) is not None]
        if results:
            is_skipped = any(results)
            self.counts += StepCounts(computed=int(not is_skipped), skipped=int(is_skipped))

    def stop(self) -> StepCounts:
        """Take the cache off; what it has counted since `start`."""
        self.end_step()
        for part in self.parts:
            macs, macs_skipped = part.count_macs()
            self.counts += StepCounts(macs=macs, macs_skipped=macs_skipped)
            part.remove()
        self.parts.clear()
        return self.counts


class StepCaches:
    """The step caches of those models of a run that have one.

    Args:
        switches: by the name of the generation.
    """

    def __init__(self, switches: Mapping[str, CacheSwitch]):
        self.switches = switches
        self.active: CacheSwitch | None = None

    def start(self, name: str) -> None:
        """Put the cache of a model on, before it generates a batch; nothing where it has none."""
        self.active = self.switches.get(name)
        if self.active is not None:
            self.active.start()

    def begin_step(self, fraction: float) -> None:
        """Begin a step of the batch, of which a fraction is done."""
        if self.active is not None:
            self.active.begin_step()

    def stop(self, generation: Generation) -> None:
        """Take the cache off after a batch, and add what it has counted to the model's generation."""
        if self.active is None:
            return
        counts = self.active.stop()
        self.active = None
        generation.step_counts = (generation.step_counts or StepCounts()) + counts

    @contextmanager
    def removed_at_end(self) -> Iterator[None]:
        """Take the caches off at the end, also of a call that fails: a later job may use the same model."""
        try:
            yield
        finally:
            for switch in self.switches.values():
                switch.stop()
