"""Step caches on denoisers: what they keep, what they leave behind, and which denoisers can have them."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from families.instance_sets import INSTANCES
from torch import nn

from int8run.cache_steps.base import CacheCalls, StepCache, StepPosition
from int8run.cache_steps.first_block import FirstBlock
from int8run.cache_steps.registry import list_cache_names, make_cache
from int8run.errors import ConfigError
from int8run.generate.capture import capture_step
from int8run.generate.generate import Generation, GenerationHooks, generate
from int8run.generate.prompts import Sample
from int8run.models.dual_denoisers import DualDenoiser
from int8run.pipeline.step_cache import CacheSwitch, StepCaches, put_on_cache
from int8run.pipeline.step_cache_fit import check_cache_fits, check_modules
from int8run.pipeline.step_cache_ratios import measure_ratios

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = [Sample("a b", 1, "a"), Sample("b", 2, "b")]
STEPS = 6


class TinyModel:
    """A pipeline of a family, and what runs it."""

    def __init__(self, family: str):
        self.instance = INSTANCES[family]
        self.pipe: Any = self.instance.build()
        self.pipe.set_progress_bar_config(disable=True)
        for module in self.pipe.components.values():
            if isinstance(module, nn.Module):
                module.eval()
        self.component = "transformer" if "transformer" in self.pipe.components else "unet"
        self.denoiser: nn.Module = getattr(self.pipe, self.component)
        if self.pipe.components.get("transformer_2") is not None:
            parts = {"transformer": self.pipe.transformer, "transformer_2": self.pipe.transformer_2}
            self.denoiser = DualDenoiser(parts)
        self.sampling = replace(self.instance.sampling, steps=STEPS)

    def capture(self) -> list[Any]:
        batch = [Sample(self.instance.prompt, 1, "a")]
        return capture_step(self.pipe, self.component, self.denoiser, batch, self.instance.sampling)

    def make_switch(self, cache: StepCache) -> CacheSwitch:
        return CacheSwitch(self.pipe, self.denoiser, cache, CacheCalls(StepPosition(), num_calls=STEPS))

    def generate(self, switch: CacheSwitch | None, samples: list[Sample] = SAMPLES) -> Generation:
        caches = StepCaches({} if switch is None else {"": switch})
        hooks = GenerationHooks(
            before_batch=caches.start,
            on_batch=lambda name, batch, generation: caches.stop(generation),
            on_fraction=caches.begin_step,
        )
        made = generate(self.pipe, self.component, {"": self.denoiser}, samples, self.sampling, hooks=hooks)
        return made[""]


@pytest.fixture(scope="module")
def flux() -> TinyModel:
    return TinyModel("flux")


def list_changed_modules(denoiser: nn.Module) -> list[str]:
    return [name for name, module in denoiser.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("name", list_cache_names())
def test_a_cache_skips_steps_and_leaves_nothing_behind(flux: TinyModel, name: str) -> None:
    switch = flux.make_switch(make_cache(name).force())
    if name == "magcache":
        switch.ratios = {"": [1.0] * STEPS}
    plain = flux.generate(None)

    cached = flux.generate(switch)

    assert cached.step_counts is not None
    assert cached.step_counts.skipped > 0
    assert cached.step_counts.skipped + cached.step_counts.computed == STEPS * len(SAMPLES)
    assert list_changed_modules(flux.denoiser) == []
    again = flux.generate(None)
    assert all(map(torch.equal, again.trajectories, plain.trajectories))


@pytest.mark.parametrize("name", list_cache_names())
def test_nothing_is_kept_from_one_image_to_the_next(flux: TinyModel, name: str) -> None:
    switch = flux.make_switch(make_cache(name).force())
    switch.ratios = {"": [1.0] * STEPS}

    both = flux.generate(switch)
    second = flux.generate(switch, SAMPLES[1:])

    assert torch.equal(both.trajectories[1], second.trajectories[0])


def test_a_call_that_fails_leaves_no_hooks(flux: TinyModel) -> None:
    switch = flux.make_switch(make_cache("first_block"))
    caches = StepCaches({"": switch})

    with pytest.raises(RuntimeError), caches.removed_at_end():
        caches.start("")
        assert list_changed_modules(flux.denoiser)
        raise RuntimeError

    assert list_changed_modules(flux.denoiser) == []


def test_a_cache_that_fails_half_way_leaves_no_hooks(flux: TinyModel) -> None:
    class FailsAtTheEnd(FirstBlock):
        def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
            super().put_on(denoiser, calls)
            raise ValueError("not a block")

    with pytest.raises(ValueError, match="not a block"):
        put_on_cache(FailsAtTheEnd(), flux.denoiser, CacheCalls(StepPosition(), num_calls=STEPS))

    assert list_changed_modules(flux.denoiser) == []


def test_two_prompts_of_a_step_have_a_state_each() -> None:
    wan = TinyModel("wan")
    wan.sampling = replace(wan.sampling, guidance=4.0)
    switch = wan.make_switch(make_cache("pab").force())
    names = set()
    seen: list[set[int]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        part = switch.parts[0]
        names.update(name for _, name in part.states)
        seen.append({id(hook.hook.state) for hook in part.counted})

    switch.start()
    switch.stop()
    handle = None
    real_start = switch.start

    def start() -> None:
        nonlocal handle
        real_start()
        handle = wan.denoiser.register_forward_pre_hook(note, with_kwargs=True)

    switch.start = start  # type: ignore[method-assign]
    wan.generate(switch, SAMPLES[:1])
    assert handle is not None
    handle.remove()

    assert len(names) == 2, "the pipeline calls its denoiser for each prompt"
    assert len(seen) == 2 * STEPS
    assert seen[0].isdisjoint(seen[1]) and seen[0] == seen[2]


def test_two_experts_have_a_cache_each() -> None:
    wan22 = TinyModel("wan22")
    switch = wan22.make_switch(make_cache("first_block").force())

    counts = wan22.generate(switch, SAMPLES[:1]).step_counts

    assert counts is not None
    assert counts.skipped > 0 and counts.computed >= 2, "each expert computes its first step"
    assert counts.skipped + counts.computed == STEPS


def test_ratios_are_measured_for_each_step() -> None:
    flux = TinyModel("flux")
    switch = flux.make_switch(make_cache("magcache"))

    ratios = measure_ratios(switch, flux.component, SAMPLES, flux.sampling)

    assert list(ratios) == [""]
    assert len(ratios[""]) == STEPS
    assert ratios[""][0] == 1.0
    assert all(ratio > 0 for ratio in ratios[""])
    switch.ratios = ratios
    counts = flux.generate(switch).step_counts
    assert counts is not None and counts.computed + counts.skipped == STEPS * len(SAMPLES)


def test_a_unet_is_refused_with_what_it_can_have() -> None:
    unet = TinyModel("sd15").denoiser

    with pytest.raises(ConfigError, match="cannot be put on UNet2DConditionModel") as refused:
        check_modules(make_cache("first_block"), {"unet": unet})

    assert "it has no list of repeated blocks" in str(refused.value)
    assert "cache_steps=pab" in str(refused.value)


def test_blocks_that_return_different_things_are_refused_before_weights_are_read() -> None:
    skeleton = TinyModel("flux2").denoiser.to("meta")

    with pytest.raises(ConfigError, match="return different numbers of tensors; it can have") as refused:
        check_modules(make_cache("first_block"), {"transformer": skeleton})

    assert "cache_steps=magcache" in str(refused.value)
    assert list_changed_modules(skeleton) == []


def test_ratios_of_one_denoiser_are_refused_for_two() -> None:
    denoiser = TinyModel("wan22").denoiser
    cache = make_cache("magcache", ratios=[1.0, 0.9])

    with pytest.raises(ConfigError, match=r"2 denoisers .* set cache_steps.ratios=auto, which measures each"):
        check_modules(cache, dict(denoiser.named_children()))


def test_a_batch_whose_halves_cannot_be_parted_is_refused_with_what_helps() -> None:
    sd3 = TinyModel("sd3")

    with pytest.raises(ConfigError, match=r"cache_steps=fastercache cache_steps\.guidance=false"):
        check_cache_fits(make_cache("fastercache"), sd3.denoiser, sd3.capture(), num_samples=1)


@pytest.mark.slow
def test_what_is_added_between_blocks_is_found() -> None:
    vace = TinyModel("wan_vace")

    with pytest.raises(ConfigError, match="it computes something between its blocks") as refused:
        check_cache_fits(make_cache("first_block"), vace.denoiser, vace.capture(), num_samples=1)

    assert "cache_steps=pab" in str(refused.value)
    assert re.search(r"cache_steps=first_block cannot be put on WanVACE", str(refused.value))
    assert list_changed_modules(vace.denoiser) == []


@pytest.mark.parametrize("name", list_cache_names())
def test_every_cache_fits_flux(flux: TinyModel, name: str) -> None:
    calls = check_cache_fits(make_cache(name), flux.denoiser, flux.capture(), num_samples=1)

    assert not calls.is_batched
