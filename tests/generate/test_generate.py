"""Generation with a pipeline made here: whose time counts, and which prompts are encoded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from support.helpers import CPU
from torch import nn

from int8run.errors import ConfigError
from int8run.generate import generate as generate_module
from int8run.generate import prompt_cache
from int8run.generate.generate import GenerationHooks, StepClock, generate, split_trajectories
from int8run.generate.pipeline_call import (
    PIPELINES_FOLDER,
    SCHEDULERS_FOLDER,
    call_pipeline,
    extract_frames,
    find_unknown_arguments,
    get_execution_device,
    get_frame_rate,
    is_about_scheduler,
)
from int8run.generate.prompt_cache import PromptCache
from int8run.generate.prompts import Sample
from int8run.models.sampling import Sampling

SAMPLES = [Sample(prompt, seed, prompt) for seed, prompt in enumerate("abc", 5)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that only the test moves."""
    seconds = [100.0]
    for module in (generate_module, prompt_cache):
        monkeypatch.setattr(module, "read_clock", lambda device: seconds[0])
    yield seconds


class Pipe:
    """A pipeline: text takes 8 seconds, a step 1, decoding 2. Latents hold the denoiser's number."""

    device = CPU

    def __init__(self, clock: list[float]):
        self.clock, self.num_timesteps, self.encoded, self.arguments = clock, 0, [], []
        self.denoiser: Any = None

    def register_modules(self, **modules: Any) -> None:
        self.denoiser = modules["denoiser"]

    def encode_prompt(self, prompt: list[str], scale: float | None = None) -> torch.Tensor:
        self.clock[0] += 8
        self.encoded.append(prompt)
        return torch.tensor([ord(p[0]) for p in prompt])

    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int,
        callback_on_step_end: Callable,
        generator: torch.Generator | list[torch.Generator],
        **rest: Any,
    ) -> Any:
        self.arguments.append(rest)
        prompt = [prompt] if isinstance(prompt, str) else prompt
        generator = [generator] if isinstance(generator, torch.Generator) else generator
        text = self.encode_prompt(prompt, scale=None)
        self.num_timesteps = num_inference_steps
        for step in range(num_inference_steps):
            self.clock[0] += 1
            noise = torch.stack([torch.rand(1, generator=g) for g in generator])
            callback_on_step_end(self, step, None, {"latents": self.denoiser.number * text[:, None] + noise})
        self.clock[0] += 2
        return SimpleNamespace(images=[Image.new("RGB", (2, 2)) for _ in prompt])


class Denoiser(nn.Module):
    def __init__(self, number: float):
        super().__init__()
        self.number = number


def generate_samples(pipe: Pipe, steps: int = 4, batch: int = 1, **options: Any) -> dict[str, Any]:
    return generate(
        pipe,
        "denoiser",
        {"float": Denoiser(1), "int8": Denoiser(2)},
        SAMPLES,
        Sampling(steps=steps, batch=batch),
        hooks=GenerationHooks(**options),
    )


def test_each_denoiser_generates_every_sample_and_they_take_turns(clock: list[float]) -> None:
    order: list[tuple[str, int]] = []
    made = generate_samples(
        Pipe(clock), on_batch=lambda name, batch, made: order.append((name, len(made.images)))
    )

    assert order == [("float", 1), ("int8", 1), ("int8", 2), ("float", 2), ("float", 3), ("int8", 3)]

    for number, found in enumerate(made.values(), 1):
        assert len(found.images) == 3 and [t.shape for t in found.trajectories] == [(4, 1)] * 3
        noise = [torch.rand(4, generator=torch.Generator().manual_seed(s.seed))[:, None] for s in SAMPLES]
        for sample, latents, drawn in zip(SAMPLES, found.trajectories, noise, strict=True):
            assert torch.equal(latents, number * ord(sample.prompt) + drawn)
        assert found.nbytes == 3 * (4 * 4 + 3 * 4)


@pytest.mark.parametrize("batch", [1, 2])
def test_times_include_encodings_that_the_cache_saved(clock: list[float], batch: int) -> None:
    pipe = Pipe(clock)
    made = generate_samples(pipe, batch=batch)

    assert pipe.encoded == [["a"], ["b"], ["c"]] if batch == 1 else [["a", "b"], ["c"]], (
        "once for both denoisers"
    )

    for found in made.values():
        assert found.image_seconds == (
            [14.0] * 3 if batch == 1 else [7.0, 7.0, 14.0]
        )  # 8 text, 4 steps, 2 decoding
    clock[0] += 1000
    again = generate_samples(pipe, batch=batch)

    assert (
        len(pipe.encoded) == (3 if batch == 1 else 2)
        and again["int8"].image_seconds == made["int8"].image_seconds
    )
    assert all(steps == [1.0] * 4 for found in again.values() for steps in found.step_seconds)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_callback_gets_every_fraction_and_its_time_does_not_count(clock: list[float], steps: int) -> None:
    heard: list[float] = []

    def on_fraction(fraction: float) -> None:
        heard.append(fraction)
        clock[0] += 50

    made = generate_samples(Pipe(clock), steps, on_fraction=on_fraction)

    # the one after the last step changes nothing; the next image begins at 0 again
    assert heard == [i / steps for i in range(steps + 1)] * 6

    for found in made.values():
        # the first step holds the text where it was encoded
        assert all(s in ([1.0] * steps, [9.0] + [1.0] * (steps - 1)) for s in found.step_seconds)
        assert found.image_seconds == [10.0 + steps] * 3


def test_a_step_clock_alone_times_from_end_to_end(clock: list[float]) -> None:
    timed = StepClock(CPU)
    pipe = SimpleNamespace(num_timesteps=2)
    for step, seconds in enumerate((3.0, 4.0)):
        clock[0] += seconds
        assert (
            timed.on_step_end(
                pipe, step, torch.tensor(0), {"latents": torch.ones(1, 2, dtype=torch.bfloat16)}
            )
            == {}
        )

    assert (
        timed.seconds == [3.0, 4.0]
        and timed.paused_seconds == 0
        and [x.dtype for x in timed.latents] == [torch.float32] * 2
    )


def test_a_schedulers_own_noise_is_the_same_for_both_and_global_random_state_is_kept(
    clock: list[float],
) -> None:
    drawn: list[float] = []

    class Noisy(Pipe):
        """With a scheduler such as LCM's, which asks torch for noise."""

        def __call__(self, *, callback_on_step_end: Callable, **given: Any) -> Any:
            drawn.append(torch.randn(1).item())
            return super().__call__(callback_on_step_end=callback_on_step_end, **given)

    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    own = torch.randn(1)
    generate_samples(Noisy(clock), 1)

    assert torch.equal(torch.cat([own, torch.randn(2)]), expected)
    # in the order of calls: float int8, int8 float, float int8
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3] != drawn[4] == drawn[5] != drawn[0]

    generate_samples(Noisy(clock), 1)

    assert drawn[6:] == drawn[:6]


# -- text ----------------------------------------------------------------------------------------------------


def test_equal_prompts_are_encoded_once_until_the_encoders_change(clock: list[float]) -> None:
    pipe = Pipe(clock)
    texts = PromptCache.for_pipeline(pipe)

    assert PromptCache.for_pipeline(pipe) is texts and pipe.encode_prompt is texts

    first = pipe.encode_prompt(["a"], scale=1.0)

    assert pipe.encode_prompt(["a"], scale=1.0) is first and texts.saved_seconds == 8.0

    pipe.encode_prompt(["a"], scale=2.0)
    pipe.encode_prompt(prompt=["a"], scale=1.0)

    assert len(pipe.encoded) == 3 and texts.saved_seconds == 8.0, "other arguments"

    texts.clear()

    assert pipe.encode_prompt(["a"], scale=1.0) is not first and len(pipe.encoded) == 4


def test_each_set_of_text_encoders_has_its_own_cache(clock: list[float]) -> None:
    pipe = Pipe(clock)
    texts = PromptCache.for_pipeline(pipe)
    first = pipe.encode_prompt(["a"])
    texts.encoder_key = "other"
    second = pipe.encode_prompt(["a"])

    assert second is not first and pipe.encode_prompt(["a"]) is second and len(pipe.encoded) == 2

    texts.encoder_key = ""

    assert pipe.encode_prompt(["a"]) is first and len(pipe.encoded) == 2

    texts.clear()
    texts.encoder_key = "other"
    pipe.encode_prompt(["a"])

    assert len(pipe.encoded) == 3, "clear forgets both"


def test_the_order_of_named_arguments_does_not_matter() -> None:
    calls: list[dict] = []
    texts = PromptCache(lambda **given: calls.append(given), CPU)
    texts(prompt=["a"], scale=1)
    texts(scale=1, prompt=["a"])

    assert len(calls) == 1


@pytest.mark.parametrize(
    "own",
    [torch.ones(1), [torch.ones(1)], Image.new("RGB", (1, 1)), [[Image.new("RGB", (1, 1))]]],
    ids=["tensor", "list of a tensor", "image", "list of lists of an image"],
)
def test_calls_with_tensors_or_images_are_not_cached(clock: list[float], own: Any) -> None:
    pipe = Pipe(clock)
    texts = PromptCache.for_pipeline(pipe)
    for _ in range(2):
        pipe.encode_prompt(["a"], scale=own)
        pipe.encode_prompt(["a"], own)

    assert len(pipe.encoded) == 4 and texts.entries == {} and texts.saved_seconds == 0


def test_calls_with_devices_dtypes_and_lists_of_text_are_cached(clock: list[float]) -> None:
    pipe = Pipe(clock)
    PromptCache.for_pipeline(pipe)
    for scale in (CPU, torch.bfloat16, ["say", ("a", 1, None)], True):
        pipe.encode_prompt(["a"], scale)
        pipe.encode_prompt(["a"], scale)

    assert len(pipe.encoded) == 4


def test_only_the_latest_prompts_are_kept(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MAX_CACHED_PROMPTS", 2)
    pipe = Pipe(clock)
    PromptCache.for_pipeline(pipe)
    for prompt in "abca":
        pipe.encode_prompt([prompt])

    assert pipe.encoded == [["a"], ["b"], ["c"], ["a"]]

    pipe.encode_prompt(["c"])

    assert len(pipe.encoded) == 4


def test_the_device_is_where_an_offloaded_pipeline_computes() -> None:
    meta = torch.device("meta")

    assert (
        get_execution_device(SimpleNamespace(device=CPU)) == CPU
        and get_execution_device(SimpleNamespace(device=CPU, _execution_device=meta)) == meta
    )
    assert PromptCache.for_pipeline(SimpleNamespace(device=CPU, _execution_device=meta)).device == meta


def test_a_pipeline_without_encode_prompt_is_left_as_it_is() -> None:
    pipe = SimpleNamespace(device=CPU)
    PromptCache.for_pipeline(pipe).clear()

    assert vars(pipe) == {"device": CPU} and PromptCache.for_pipeline(pipe).saved_seconds == 0


# -- one call ------------------------------------------------------------------------------------------------


def test_unset_settings_are_left_to_the_pipeline_and_extra_ones_are_passed(
    clock: list[float],
) -> None:
    pipe = Pipe(clock)
    pipe.register_modules(denoiser=Denoiser(1))
    call_pipeline(pipe, SAMPLES[:2], Sampling(steps=1), lambda *_: {})
    call_pipeline(
        pipe,
        SAMPLES[:2],
        Sampling(steps=1, guidance=0.0, height=16, extra={"eta": 0.3, "none": None}),
        lambda *_: {},
    )
    given = {"output_type": "pil", "guidance_scale": 0.0, "height": 16, "eta": 0.3, "none": None}

    assert pipe.arguments == [{"output_type": "pil"}, given]


def test_an_extra_prompt_is_repeated_for_every_sample_of_a_batch(clock: list[float]) -> None:
    pipe = Pipe(clock)
    pipe.register_modules(denoiser=Denoiser(1))
    texts = {"negative_prompt": "blurred", "prompt_2": "b", "negative_prompt_3": "c", "prompt_4": ["d", "e"]}
    others = {"system_prompt": "draw", "negative_prompt_scale": "x"}
    call_pipeline(pipe, SAMPLES[:2], Sampling(steps=1, extra={**texts, **others}), lambda *_: {})
    (given,) = pipe.arguments

    assert [given[name] for name in texts] == [["blurred"] * 2, ["b"] * 2, ["c"] * 2, ["d", "e"]]
    assert [given[name] for name in others] == ["draw", "x"]


@pytest.mark.parametrize("kind", ["np", "pt", None])
def test_a_request_for_arrays_is_an_error(clock: list[float], kind: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"^sampler\.extra\.output_type is {kind!r}; .*choose from pil$"):
        call_pipeline(Pipe(clock), SAMPLES, Sampling(steps=1, extra={"output_type": kind}), lambda *_: {})


class OldPipe(Pipe):
    """Tells of its steps as diffusers did at first, and does not count them."""

    def __init__(self, clock: list[float]):
        super().__init__(clock)
        self.scheduler = SimpleNamespace(timesteps=[])

    def __call__(self, *, callback: Callable[[int, Any, torch.Tensor], None], **given: Any) -> Any:
        self.scheduler.timesteps = list(range(given["num_inference_steps"]))

        def step_end(pipe: Pipe, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> None:
            del pipe.num_timesteps
            callback(step, timestep, tensors["latents"])
            pipe.num_timesteps = 0

        return super().__call__(callback_on_step_end=step_end, **given)


def test_a_pipeline_with_the_older_callback_is_timed_as_well(clock: list[float]) -> None:
    heard: dict[type, list[float]] = {Pipe: [], OldPipe: []}
    new, old = (
        generate_samples(kind(clock), on_fraction=fractions.append)["int8"]
        for kind, fractions in heard.items()
    )

    assert heard[OldPipe] == heard[Pipe] and 0.25 in heard[Pipe]
    assert (old.step_seconds, old.image_seconds) == (new.step_seconds, new.image_seconds)
    assert all(map(torch.equal, old.trajectories, new.trajectories))


def test_latents_of_one_sample_may_be_rows_without_a_batch() -> None:
    batched = [torch.full((2, 3), float(step)) for step in range(4)]
    rows = [torch.full((5, 3), float(step)) for step in range(4)]

    assert [t.shape for t in split_trajectories(batched, 2)] == [(4, 3)] * 2
    assert [t.shape for t in split_trajectories(rows, 1)] == [(4, 5, 3)]
    assert [t.shape for t in split_trajectories([t[:1] for t in rows], 1)] == [(4, 3)]


# -- what a pipeline returns ---------------------------------------------------------------------------------


def make_frame(level: int, width: int = 2) -> Image.Image:
    return Image.new("L", (width, 2), level)


def test_frames_are_extracted_from_images_and_videos_but_not_latents() -> None:
    a, b, c, d = map(make_frame, range(4))

    assert extract_frames(SimpleNamespace(images=[a, b])) == [[a], [b]]
    assert extract_frames(SimpleNamespace(frames=[[a, b], [c, d]], audio=torch.ones(1))) == [[a, b], [c, d]]
    assert (
        extract_frames(SimpleNamespace(images=torch.ones(2, 3)))
        == []
        == extract_frames(SimpleNamespace(frames=torch.ones(2, 3)))
    )


def test_a_generation_of_videos_holds_every_frame(clock: list[float]) -> None:
    class Filming(Pipe):
        def __call__(self, prompt: list[str], *, callback_on_step_end: Callable, **given: Any) -> Any:
            super().__call__(prompt, callback_on_step_end=callback_on_step_end, **given)
            return SimpleNamespace(
                frames=[[make_frame(ord(p[0]) + i, width=5) for i in range(3)] for p in prompt],
                audio=self.sound,
            )

    filming = Filming(clock)
    for filming.sound in (None, torch.ones(2)):
        made = generate_samples(filming, batch=2)["int8"]
        assert [[f.getpixel((0, 0)) for f in frames] for frames in made.frames] == [
            [ord(p) + i for i in range(3)] for p in "abc"
        ]
        assert [f.getpixel((0, 0)) for f in made.images] == list(map(ord, "abc"))
        assert (
            made.nbytes == 3 * 4 * 4 + 3 * 3 * (3 * 5 * 2) and made.is_video and len(made.image_seconds) == 3
        )
        assert made.has_sound == (filming.sound is not None)


def test_the_frame_rate_is_the_requested_one_or_the_pipelines_or_wans() -> None:
    class Own:
        def __call__(self, frame_rate: int = 25) -> None: ...

    class Silent:
        def __call__(self) -> None: ...

    assert get_frame_rate(Own(), Sampling()) == 25 and get_frame_rate(Silent(), Sampling()) == 16
    assert get_frame_rate(Own(), Sampling(extra={"frame_rate": 12.5})) == 12.5


def test_a_scheduler_that_the_pipeline_cannot_use_is_an_error() -> None:
    class Fussy:
        device = CPU

        def __call__(self, callback_on_step_end: Any, **_: Any) -> None:
            raise ValueError("The scheduler does\nnot support sigmas.")

    message = (
        r"^sampler\.scheduler=DDIMScheduler cannot be used with Fussy: "
        r"The scheduler does not support sigmas\.; choose another one$"
    )

    with pytest.raises(ConfigError, match=message):
        call_pipeline(Fussy(), SAMPLES, Sampling(steps=1, scheduler="DDIMScheduler"), lambda *_: {})

    with pytest.raises(
        ValueError, match="does\nnot support"
    ):  # of the model's own scheduler nobody chose anything
        call_pipeline(Fussy(), SAMPLES, Sampling(steps=1), lambda *_: {})


def test_a_scheduler_without_an_argument_that_the_pipeline_gives_is_an_error() -> None:
    class Shifting:
        device = CPU

        def __call__(self, callback_on_step_end: Any, **_: Any) -> None:
            EulerDiscreteScheduler().set_timesteps(4, mu=1.0)  # type: ignore[call-arg]

    message = r"^sampler\.scheduler=EulerDiscreteScheduler cannot be used with Shifting: .*'mu'"
    asked = Sampling(steps=1, scheduler="EulerDiscreteScheduler")

    with pytest.raises(ConfigError, match=message):
        call_pipeline(Shifting(), SAMPLES, asked, lambda *_: {})

    with pytest.raises(TypeError, match="'mu'"):  # nobody chose it
        call_pipeline(Shifting(), SAMPLES, Sampling(steps=1), lambda *_: {})


def test_a_type_error_that_only_names_a_scheduler_stays_what_it_is() -> None:
    class Mistaken:
        device = CPU

        def __call__(self, callback_on_step_end: Any, **_: Any) -> None:
            raise TypeError("'SchedulerState' object is not iterable")

    asked = Sampling(steps=1, scheduler="EulerDiscreteScheduler")

    with pytest.raises(TypeError, match="SchedulerState"):
        call_pipeline(Mistaken(), SAMPLES, asked, lambda *_: {})


@pytest.mark.parametrize("folder", [PIPELINES_FOLDER, SCHEDULERS_FOLDER])
def test_a_type_error_of_diffusers_that_names_a_scheduler_is_about_it(folder: Path) -> None:
    source = compile("raise TypeError('the scheduler takes no such thing')", str(folder / "a.py"), "exec")

    with pytest.raises(TypeError) as raised:
        exec(source)

    assert is_about_scheduler(raised.value)


def test_arguments_that_a_pipeline_does_not_have_are_found(clock: list[float]) -> None:
    assert find_unknown_arguments(Pipe(clock), Sampling(extra={"prompt": 1, "generator": 2})) == []

    fussy = SimpleNamespace()

    assert find_unknown_arguments(fussy, Sampling(extra={"frames": 3})) == ["frames"]
