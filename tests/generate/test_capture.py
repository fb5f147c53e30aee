"""What a denoiser is called with: every argument by name, and as it was at that time."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from support.helpers import CPU
from torch import Tensor, nn

from int8run.generate.capture import capture_calls, capture_spread_calls, capture_step, clone_tensors
from int8run.generate.generate import StepClock
from int8run.generate.pipeline_call import call_pipeline
from int8run.generate.prompts import Sample
from int8run.models.sampling import Sampling

BATCH = [Sample("a", 0, "a")]


class Denoiser(nn.Module):
    def forward(
        self, sample: list[Tensor], time: int, scale: float = 2.0, more: dict[str, Any] | None = None
    ) -> tuple[Tensor]:
        return (sample[0] * scale + time,)


class Pipe:
    """Passes the first two arguments by position, and changes what it passed in place."""

    device = CPU

    def register_modules(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser

    def __call__(self, num_inference_steps: int, callback_on_step_end: Callable, **_: Any) -> Any:
        self.num_timesteps = num_inference_steps
        x, added = torch.zeros(2), torch.zeros(1)
        for step in range(num_inference_steps):
            self.denoiser([x], step, more={"added": added})
            x += 1
            added += 1
            callback_on_step_end(self, step, None, {"latents": x})
        return SimpleNamespace(images=[])


def test_captured_arguments_have_names_and_do_not_change_later() -> None:
    calls = capture_calls(Pipe(), "denoiser", Denoiser(), BATCH, Sampling(steps=3))

    assert [sorted(c) for c in calls] == [["more", "sample", "time"]] * 3
    assert [(c["sample"][0].tolist(), c["time"], c["more"]["added"].item()) for c in calls] == [
        ([i, i], i, i) for i in range(3)
    ]
    # the same arguments by name do the same
    assert [Denoiser()(**c)[0].tolist() for c in calls] == [[3.0 * i, 3.0 * i] for i in range(3)]


def test_the_captured_step_is_the_second_of_two_and_the_hook_is_removed() -> None:
    denoiser = Denoiser()

    assert [
        made["time"] for made in capture_step(Pipe(), "denoiser", denoiser, BATCH, Sampling(steps=9))
    ] == [1]
    assert not denoiser._forward_pre_hooks


def test_first_middle_and_last_step_of_a_short_schedule_are_captured() -> None:
    denoiser = Denoiser()
    made = capture_spread_calls(Pipe(), "denoiser", denoiser, BATCH, Sampling(steps=9))
    assert [call["time"] for call in made] == [0, 1, 2]
    assert not denoiser._forward_pre_hooks


def test_noise_levels_do_not_lengthen_the_captured_step() -> None:
    heard = []

    class Listening(Pipe):
        def __call__(
            self,
            num_inference_steps: int,
            callback_on_step_end: Callable,
            sigmas: list[float] | None = None,
            **_: Any,
        ) -> Any:
            heard.append(sigmas)
            return super().__call__(num_inference_steps, callback_on_step_end)

    sampling = Sampling(steps=3, extra={"sigmas": [1.0, 0.5, 0.2]})
    capture_step(Listening(), "denoiser", Denoiser(), BATCH, sampling)

    assert heard == [None]


def test_latents_that_the_pipeline_changes_in_place_are_copied() -> None:
    clock, pipe = StepClock(CPU), Pipe()
    pipe.register_modules(Denoiser())
    call_pipeline(pipe, BATCH, Sampling(steps=3), clock.on_step_end)

    assert [x.tolist() for x in clock.latents] == [[1, 1], [2, 2], [3, 3]]


def test_a_cache_that_is_emptied_later_is_captured_with_what_it_held() -> None:
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:
        layer.store(torch.ones(2), torch.zeros(2))

    copied = clone_tensors({"kv_cache": cache})["kv_cache"]
    cache.clear()

    assert [[x.tolist() for x in layer.get()] for layer in copied.layer_caches] == [[[1, 1], [0, 0]]] * 2


def test_what_a_cache_holds_in_tuples_and_dicts_is_copied_and_a_frozen_config_is_shared() -> None:
    cache: Any = WanAnimate2KVCache(2)
    cache.config = FrozenDict({"layers": 2})
    cache.by_name = {"first": (cache.layer_caches[0],)}
    cache.layer_caches[0].store(torch.ones(2), torch.zeros(2))

    copied = clone_tensors({"kv_cache": cache})["kv_cache"]
    cache.clear()

    assert copied.config is cache.config
    assert copied.by_name["first"][0].get()[0].tolist() == [1, 1]


def test_tensors_in_a_tuple_are_copied() -> None:
    rotary = (torch.ones(2), torch.zeros(2))
    copied = clone_tensors(rotary)
    rotary[0].zero_()
    assert [x.tolist() for x in copied] == [[1, 1], [0, 0]]
