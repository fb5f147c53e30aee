"""LoRAs from settings to images: schedules, modes, text encoders, few-step presets, and what is remembered
between jobs.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import save_file
from support.helpers import randn
from support.run_job import make_spec, run_job, save_lora
from support.tiny_pipeline import random_pipeline, save_random_pipeline
from torch import Tensor

import int8run
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.generate.prompts import PromptSet
from int8run.lora import few_step
from int8run.lora.config import Adapter, LoraSettings
from int8run.models.sampling import Sampling
from int8run.models.schedulers import set_scheduler
from int8run.outlier.convrot import ConvRot
from int8run.pipeline import process_cache
from int8run.pipeline.built_model import BuiltModel
from int8run.ptq import layer_costs as costs
from int8run.tasks import run_generation
from int8run.tasks.run import RunResult, run

pytestmark = pytest.mark.usefixtures("one_thread")

FEW_STEP = Path(int8run.__file__).parent / "assets" / "lora" / "few_step.safetensors"
SWITCH = ((0, 1), (0.5, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small(model: Path) -> list[str]:
    """Words of a small run of the random pipeline."""
    words = [
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=4",
        "prompts.prompts=[a]",
        "tracker=none",
        "backend=reference",
    ]
    return [f"model.location={model}", *words, "progress=false", "metrics.layers=false"]


@pytest.fixture(scope="module")
def plain(small: list[str]) -> RunSpec:
    """The same as a RunSpec, which the tests change a field of."""
    return make_spec(small)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither between tests nor in the user's table of measured times."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    process_cache.clear()
    yield
    process_cache.clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """LoRAs on INT8 layers only, on all layers, and on the text encoders."""
    folder, pipe = tmp_path_factory.mktemp("loras"), random_pipeline()
    every = save_lora(folder / "every.safetensors", pipe.transformer, only="")
    return {
        "style": str(save_lora(folder / "style.safetensors", pipe.transformer)),
        "every": str(every),
        "clip": str(
            save_lora(
                folder / "clip.safetensors", pipe.text_encoder, only="self_attn", prefix="text_encoder."
            )
        ),
        "t5": str(
            save_lora(
                folder / "t5.safetensors", pipe.text_encoder_2, only="SelfAttention", prefix="text_encoder_2."
            )
        ),
    }


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., RunResult]:
    """Runs a spec with some fields changed; files go into a folder that nobody looks at."""

    def draw(spec: RunSpec, **changes: Any) -> RunResult:
        (tmp_path / "out").mkdir(exist_ok=True)
        return run(replace(spec, **changes), Job({}, {"model": "random"}, [], tmp_path / "out"))

    return draw


def stack(path: str, strength: Any = 1.0, mode: str = "dynamic", **adapter: Any) -> LoraSettings:
    return LoraSettings([Adapter("a", path, strength, **adapter)], mode=mode)


def latents(result: RunResult) -> dict[str, list[Tensor]]:
    """After each step, by model."""
    return {"int8": result.candidate.trajectories, "float": result.baseline.trajectories}


def same(one: RunResult, two: RunResult) -> bool:
    """Whether both models made the same bits in every step."""
    int8_equal = map(torch.equal, latents(one)["int8"], latents(two)["int8"])
    float_equal = map(torch.equal, latents(one)["float"], latents(two)["float"])
    return all(int8_equal) and all(float_equal)


def built() -> BuiltModel:
    """What the last run was made with."""
    (found,) = process_cache._last_build.values()
    return found


# -- schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_both_models_follow_a_schedule(
    plain: RunSpec, files: dict[str, str], draw: Callable, steps: int
) -> None:
    spec = replace(plain, sampler=replace(plain.sampler, steps=steps), prompts=PromptSet(["a", "b"]))
    on = latents(draw(spec, lora=stack(files["style"], 1.0)))
    off = latents(draw(spec, lora=stack(files["style"], 0.0)))

    switched = draw(spec, lora=stack(files["style"], SWITCH))
    again = draw(spec, lora=stack(files["style"], SWITCH))

    first = math.ceil(steps / 2)  # steps that begin before the half
    for model, found in latents(switched).items():
        for image, with_lora, without in zip(found, on[model], off[model], strict=True):
            assert torch.equal(image[:first], with_lora[:first]), model
            assert not torch.equal(image[0], without[0]), model
            for step in range(first, steps):
                assert not torch.equal(image[step], with_lora[step]), (model, step)
                assert not torch.equal(image[step], without[step]), (model, step)

    branches = [layer.branch.strengths for layer in built().loras.dynamic_layers]

    assert len(branches) == 16
    assert all(strengths.eq(1).all() for strengths in branches), (
        "what is measured after it, and the next job, have the first strength"
    )
    assert switched.metrics["quality/latent_rel_err"] < 0.02
    assert switched.metrics["speed/images_per_s"] > 0
    assert again.metrics["build/load_s"] == 0
    assert same(again, switched), "strengths begin again at the first"


def test_schedules_that_change_nothing_are_plain_strengths(
    plain: RunSpec, files: dict[str, str], draw: Callable
) -> None:
    for strength, schedules in ((0.0, [[[0, 0], [0.5, 0]]]), (1.0, [[[0, 1], [0.5, 1]], [[0, 1], [1, 0]]])):
        fixed = draw(plain, lora=stack(files["style"], strength))
        for schedule in schedules:
            assert same(draw(plain, lora=stack(files["style"], schedule)), fixed), schedule

    assert built().loras.layers_by_mode == {"dynamic": 16}


def test_a_schedule_comes_from_the_command_line(
    small: list[str], plain: RunSpec, files: dict[str, str], draw: Callable, tmp_path: Path
) -> None:
    words = [
        f"lora.adapters=[{{name: a, path: {files['style']}, strength: [[0,1],[0.5,0]]}}]",
        "lora.strength=0.5",
    ]
    found = run_job([*small, *words], tmp_path / "run")
    expected = draw(plain, lora=replace(stack(files["style"], SWITCH), strength=0.5))

    assert same(found, expected)
    assert found.metrics["lora/layers_dynamic"] == 16


def test_a_lora_that_begins_later_starts_at_its_step(
    plain: RunSpec, files: dict[str, str], draw: Callable
) -> None:
    off = draw(plain, lora=stack(files["style"], 0.0))
    late = draw(plain, lora=stack(files["style"], [[0, 0], [0.75, 1]]))
    for name, (found,) in latents(late).items():
        (without,) = latents(off)[name]
        assert torch.equal(found[:3], without[:3]) and not torch.equal(found[3], without[3]), name


# -- modes ---------------------------------------------------------------------------------------------------


LAYERS_BY_MODE = {
    "dynamic": {"dynamic": 34},
    "bake": {},
    "stochastic": {"stochastic": 34},
    "auto": {"bake": 22, "dynamic": 12},
}


def count_layers_by_mode(metrics: dict[str, float]) -> dict[str, float]:
    prefix = "lora/layers_"
    return {name.removeprefix(prefix): count for name, count in metrics.items() if name.startswith(prefix)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Ranks and rows for which the cost of a branch is asked; branches of square layers are dear."""
    sizes: set[tuple[int, int]] = set()

    def get_ratio(self: object, layer: Any, rank: int, rows: int) -> float:
        sizes.add((rank, rows))
        return 2.1 if layer.in_features == layer.out_features else 1.9

    monkeypatch.setattr(costs.BranchCosts, "get_ratio", get_ratio)
    return sizes


def test_all_modes_generate_the_images_of_the_merged_float_model(
    plain: RunSpec, files: dict[str, str], draw: Callable, asked: set[tuple[int, int]]
) -> None:
    without = draw(plain)
    found = {mode: draw(plain, lora=stack(files["every"], 1.0, mode)) for mode in LAYERS_BY_MODE}
    process_cache.clear()

    (plain_latents,) = latents(without)["float"]
    (merged_latents,) = latents(found["dynamic"])["float"]

    assert (merged_latents[-1] - plain_latents[-1]).norm() > 0.3 * plain_latents[-1].norm()

    for mode, result in found.items():
        assert torch.equal(latents(result)["float"][0], merged_latents), mode
        assert result.metrics["quality/latent_rel_err"] < 0.04, mode
        # all Linears have a change: INT8 ones by the mode, the 14 float ones by the merge
        assert result.metrics["lora/modules_matched"] == 48
        assert count_layers_by_mode(result.metrics) == LAYERS_BY_MODE[mode]

    last_latents = {tuple(latents(result)["int8"][0][-1].flatten().tolist()) for result in found.values()}
    ranks = {rank for rank, _ in asked}
    rows = {rows for _, rows in asked}

    assert len(last_latents) == 4, "four ways to round"
    assert ranks == {4}
    assert len(rows) > 1, "each layer with the rows that it sees"


@pytest.mark.slow
def test_strength_0_is_the_model_itself_in_every_mode(
    plain: RunSpec, files: dict[str, str], draw: Callable
) -> None:
    without = draw(plain)
    for mode in ("dynamic", "stochastic"):
        on, off = (draw(plain, lora=stack(files["every"], strength, mode)) for strength in (1.0, 0.0))
        assert off.metrics["build/load_s"] == 0 and same(off, without) and not same(on, without), mode

    assert same(draw(plain, lora=stack(files["every"], 0.0, "bake")), without)


# -- text encoders -------------------------------------------------------------------------------------------


def embeddings() -> tuple[Tensor, Tensor]:
    """What the denoiser is told of prompt `a`, by T5 and by CLIP."""
    text, pooled, _ = built().pipe.encode_prompt(prompt=["a"], prompt_2=None)
    return text.clone(), pooled.clone()


def both(files: dict[str, str], strength: float, **adapter: Any) -> LoraSettings:
    """A stack of a LoRA on CLIP and one on T5."""
    return LoraSettings(
        [Adapter(name, files[name], strength, **adapter) for name in ("clip", "t5")], mode="dynamic"
    )


def test_a_text_encoders_lora_moves_what_the_prompt_says_and_back(
    plain: RunSpec, files: dict[str, str], draw: Callable
) -> None:
    without = draw(plain)
    t5, clip = embeddings()
    on = draw(plain, lora=both(files, 3.0))
    strong_t5, strong_clip = embeddings()

    assert not torch.equal(strong_t5, t5)
    assert not torch.equal(strong_clip, clip)
    assert not same(on, without)
    assert on.metrics["lora/modules_matched"] == 8
    assert "lora/layers_dynamic" not in on.metrics

    off = draw(plain, lora=both(files, 0.0))

    assert off.metrics["build/load_s"] == 0
    assert all(map(torch.equal, embeddings(), (t5, clip)))
    assert same(off, without)

    again = draw(plain, lora=both(files, 3.0))

    assert same(again, on)
    assert all(map(torch.equal, embeddings(), (strong_t5, strong_clip)))


def test_text_strength_moves_the_text_part_alone(
    plain: RunSpec, files: dict[str, str], draw: Callable
) -> None:
    without = draw(plain)
    t5, clip = embeddings()
    quiet = draw(plain, lora=both(files, 3.0, text_strength=0.0))

    assert same(quiet, without)
    assert all(map(torch.equal, embeddings(), (t5, clip)))

    loud = draw(plain, lora=both(files, 0.0, text_strength=3.0))

    assert not same(loud, without)
    assert same(draw(plain, lora=both(files, 3.0)), loud), "without a strength of its own it is the LoRA's"


def test_prompts_are_encoded_once_for_all_jobs_of_a_build(
    plain: RunSpec, files: dict[str, str], draw: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = FluxPipeline.encode_prompt

    def counted(self: FluxPipeline, prompt: str | list[str], *args: Any, **kwargs: Any) -> Any:
        encoded.extend([prompt] if isinstance(prompt, str) else prompt)
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(FluxPipeline, "encode_prompt", counted)
    spec = replace(plain, prompts=PromptSet(["a", "b", "a b"]))
    first = draw(spec, lora=both(files, 0.0))

    # once when the model is looked at; then the warm-up and both models share one encoding
    assert encoded == ["a", "a", "b", "a b"]

    encoded.clear()
    other = draw(spec, lora=both(files, 0.0), seed=7)

    assert encoded == []
    assert not same(other, first)

    draw(spec, lora=both(files, 1.0))

    assert encoded == ["a", "b", "a b"], "the text encoders have changed"

    encoded.clear()
    draw(spec, lora=both(files, 1.0), seed=7)

    assert encoded == []


# -- what the float model drew -------------------------------------------------------------------------------


WARM_UP_AND_IMAGES = [["float", "int8"]] * 2  # models that generate, call by call


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the models that generate images, call by call."""
    calls: list[list[str]] = []
    generate = run_generation.generate

    def counted(pipe: Any, component: str, denoisers: dict[str, Any], *args: Any, **options: Any) -> Any:
        calls.append(sorted(denoisers))
        return generate(pipe, component, denoisers, *args, **options)

    monkeypatch.setattr(run_generation, "generate", counted)
    return calls


@pytest.fixture
def styled(plain: RunSpec, files: dict[str, str]) -> RunSpec:
    """Two steps with a LoRA."""
    return replace(plain, lora=stack(files["style"]), sampler=replace(plain.sampler, steps=2))


def assert_speed_is_compared_anew(second: dict[str, float], first: dict[str, float]) -> None:
    """Metrics of a run whose float images are those of an earlier one."""
    ratio = second["float/step_ms_p50"] / second["speed/step_ms_p50"]

    assert second["speed/images_per_s"] > 0
    assert "float/images_per_s" not in second, "that is a number of another moment"
    assert second["float/step_ms_p50"] != first["float/step_ms_p50"]
    assert second["speed/ratio_vs_float"] == pytest.approx(ratio)
    assert second["speed/ratio_vs_float"] > 0
    assert math.isfinite(second["quality/latent_rel_err"])


def test_float_images_are_generated_once_for_equal_settings(
    styled: RunSpec, generated: list[list[str]], draw: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    first = draw(styled)

    assert generated == WARM_UP_AND_IMAGES

    others: list[dict[str, Any]] = [
        {"outlier": ConvRot(16)},
        {"lora": replace(styled.lora, mode="stochastic")},
        {},
    ]
    for changes in others:
        generated.clear()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            second = draw(styled, **changes)

        assert generated == WARM_UP_AND_IMAGES, changes
        assert second.baseline is first.baseline, changes
        assert "the float images are those of an earlier job with the same settings" in caplog.text
        assert_speed_is_compared_anew(second.metrics, first.metrics)


def test_float_images_are_generated_again_for_other_settings(
    styled: RunSpec, files: dict[str, str], generated: list[list[str]], draw: Callable
) -> None:
    first = draw(styled)
    others: list[dict[str, Any]] = [
        {"lora": stack(files["style"], 0.5)},
        {"sampler": replace(styled.sampler, steps=3)},
        {"prompts": PromptSet(["b"])},
        {"seed": 1},
    ]
    for changes in others:
        generated.clear()
        other = draw(styled, **changes)

        assert other.baseline is not first.baseline, changes
        assert generated == WARM_UP_AND_IMAGES, changes

    assert same(draw(styled), first), "what was remembered first is still there"


LORA_CHANGES: list[dict[str, Any]] = [
    {"strength": 0.5},
    {"strength": SWITCH},
    {"text_strength": 0.5},
    {"components": ["denoiser"]},
    {"path": "other.safetensors"},
]


def test_everything_that_the_float_model_sees_is_in_its_key(plain: RunSpec) -> None:
    spec = replace(plain, lora=LoraSettings([Adapter("a", "a.safetensors", 1.0)]))
    adapter = spec.lora.adapters[0]
    others: list[dict[str, Any]] = [
        {"lora": replace(spec.lora, adapters=[replace(adapter, **change)])} for change in LORA_CHANGES
    ]
    others += [{"lora": LoraSettings()}, {"lora": replace(spec.lora, strength=0.5)}]
    others += [
        {"sampler": replace(spec.sampler, **c)}
        for c in ({"steps": 5}, {"guidance": 1.0}, {"scheduler": "X"}, {"extra": {"a": 1}})
    ]
    others += [
        {"model": replace(spec.model, dtype="bfloat16")},
        {"compile": "full"},
        {"attention": "flash"},
        {"device": "cpu"},
    ]
    keys = [replace(spec, **change).float_key for change in others]

    assert len({spec.float_key, *keys}) == len(others) + 1

    alike: list[dict[str, Any]] = [
        {"outlier": ConvRot(16)},
        {"seed": 3},
        {"lora": replace(spec.lora, mode="bake")},
        {"save": "a.safetensors"},
    ]

    assert {replace(spec, **change).float_key for change in alike} == {spec.float_key}


def test_a_build_is_another_for_other_files_modes_and_parts_but_not_for_strengths(plain: RunSpec) -> None:
    spec = replace(plain, lora=LoraSettings([Adapter("a", "a.safetensors", 1.0)]))
    adapter = spec.lora.adapters[0]

    def changed(**c):
        return replace(spec, lora=replace(spec.lora, adapters=[replace(adapter, **c)])).build_key

    assert {changed(strength=0.5), changed(text_strength=0.1), replace(spec, seed=4).build_key} == {
        spec.build_key
    }

    modes = {
        replace(spec, lora=replace(spec.lora, mode=mode)).build_key
        for mode in ("auto", "dynamic", "bake", "stochastic")
    }
    others = {
        changed(path="b"),
        changed(components=["denoiser"]),
        changed(strength=SWITCH),
        changed(enabled=False),
        *modes,
    }

    assert len(others) == 8

    baked, random = (replace(spec, lora=replace(spec.lora, mode=mode)) for mode in ("bake", "stochastic"))

    assert replace(baked, lora=replace(baked.lora, strength=0.5)).build_key != baked.build_key
    assert replace(random, seed=4).build_key != random.build_key, "of the random rounding"


# -- few-step LoRAs and schedulers ---------------------------------------------------------------------------


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset for the tiny model whose numbers do not depend on what the shipped LoRA was trained for."""
    row = {
        "steps": 4,
        "steps_range": [2, 8],
        "guidance": None,
        "scheduler": "FlowMatchLCMScheduler",
        "strength": 0.75,
        "source": "community",
    }
    table = {
        **few_step.load_table(),
        "presets": {"made_up": {"words": [["made_up"]], "bases": {"tiny": row}}},
    }
    monkeypatch.setattr(few_step, "load_table", lambda: table)
    return "made_up"


def test_a_preset_brings_scheduler_steps_and_strength(
    plain: RunSpec, files: dict[str, str], draw: Callable, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = replace(
        plain, sampler=replace(plain.sampler, steps=None), lora=stack(files["style"], None, few_step=preset)
    )
    result = draw(spec)

    assert type(built().pipe.scheduler).__name__ == "FlowMatchLCMScheduler"
    assert spec.lora.strengths == [0.75]
    assert [len(t) for t in (*result.candidate.trajectories, *result.baseline.trajectories)] == [4, 4]
    assert "made for" not in caplog.text and result.metrics["quality/latent_rel_err"] < 0.05, (
        "both met the noise that LCM adds"
    )

    # what is asked for wins, and is told
    longer = draw(spec, sampler=replace(spec.sampler, steps=10))

    assert len(longer.candidate.trajectories[0]) == 10
    assert "LoRA 'a': sampler.steps is 10; made_up on tiny is made for 4 (2 to 8)" in caplog.messages

    own = draw(spec, sampler=replace(spec.sampler, scheduler="FlowMatchEulerDiscreteScheduler"))

    assert type(built().pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert len(own.candidate.trajectories[0]) == 4

    message = (
        "LoRA 'a': the scheduler is FlowMatchEulerDiscreteScheduler; "
        "made_up on tiny is made for FlowMatchLCMScheduler"
    )

    assert message in caplog.messages
    assert not same(own, result)


def test_a_scheduler_does_not_stay_for_the_next_job(plain: RunSpec, draw: Callable) -> None:
    first = draw(plain)
    other = draw(plain, sampler=replace(plain.sampler, scheduler="FlowMatchLCMScheduler"))
    shifted = draw(plain, sampler=replace(plain.sampler, scheduler_settings={"shift": 3.0}))

    assert other.metrics["build/load_s"] == shifted.metrics["build/load_s"] == 0, "no reason to build anew"
    assert not same(other, first)
    assert not same(shifted, first)
    assert built().pipe.scheduler.config.shift == 3.0

    process_cache._generated.clear()
    again = draw(plain)

    assert again.metrics["build/load_s"] == 0
    assert same(again, first)
    assert type(built().pipe.scheduler) is FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (
            Sampling(scheduler="FlowMatchEulerDiscretScheduler"),
            (
                r"^sampler\.scheduler=FlowMatchEulerDiscretScheduler is not .*; "
                r"did you mean 'FlowMatchEulerDiscreteScheduler'\? choose from "
            ),
        ),
        (
            Sampling(scheduler="FluxPipeline"),
            r"^sampler\.scheduler=FluxPipeline .*choose from .*LCMScheduler",
        ),
        (
            Sampling(scheduler="SchedulerMixin"),
            r"^sampler\.scheduler=SchedulerMixin .*choose from .*LCMScheduler",
        ),
        (
            Sampling(scheduler="LCMScheduler", scheduler_settings={"shiftt": 3}),
            (
                r"^sampler\.scheduler_settings\.shiftt is not a setting "
                r"of LCMScheduler; choose from .*timestep_scaling"
            ),
        ),
        (
            Sampling(scheduler_settings={"bhift": 3}),
            (
                r"^sampler\.scheduler_settings\.bhift is not a setting of "
                r"FlowMatchEulerDiscreteScheduler; choose from .*shift"
            ),
        ),
        (
            Sampling(scheduler_settings={"shift": "much"}),
            r"^sampler\.scheduler=FlowMatchEulerDiscreteScheduler does not take these settings: ",
        ),
    ],
    ids=["misspelt", "a pipeline", "a base class", "setting", "setting of the model's own", "value"],
)
def test_schedulers_that_cannot_be(sampling: Sampling, message: str) -> None:
    pipe = random_pipeline()
    original = pipe.scheduler

    with pytest.raises(ConfigError, match=message):
        set_scheduler(pipe, original, sampling)
    assert pipe.scheduler is original


def test_what_is_offered_can_be_had_or_says_why_not() -> None:
    pipe = random_pipeline()
    original = pipe.scheduler

    with pytest.raises(ConfigError) as error:
        set_scheduler(pipe, original, Sampling(scheduler="x"))

    made, refused = [], []
    for name in str(error.value).partition("choose from ")[2].split(", "):
        try:
            set_scheduler(pipe, original, Sampling(scheduler=name))
            made.append(type(pipe.scheduler).__name__)
        except ConfigError as why:
            refused.append(name)
            assert str(why).startswith(f"sampler.scheduler={name} does not take these settings: ")

    assert made == ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"] and refused == [], (
        "those that FLUX can be asked for"
    )


def test_a_scheduler_that_the_pipeline_does_not_take_is_named(plain: RunSpec, draw: Callable) -> None:
    message = (
        r"^sampler\.scheduler=LCMScheduler cannot be used with "
        r"FluxPipeline: .*custom sigmas.*; choose another one$"
    )

    with pytest.raises(ConfigError, match=message):
        draw(plain, sampler=replace(plain.sampler, scheduler="LCMScheduler"))


def test_noise_levels_of_a_preset_are_for_its_own_number_of_steps(plain: RunSpec) -> None:
    lora = LoraSettings([Adapter("fast", "dmd2.safetensors", few_step="dmd2")])
    spec = replace(plain, model=replace(plain.model, lora_base="sdxl"), lora=lora, sampler=Sampling())
    levels = {"timesteps": [999, 749, 499, 249]}
    own = spec.model.sampling.extra

    assert spec.sampling.steps == 4
    assert spec.sampling.extra == {**own, **levels}
    assert replace(spec, sampler=Sampling(steps=4)).sampling.extra == {**own, **levels}
    assert replace(spec, sampler=Sampling(steps=28)).sampling.extra == own

    given = {"timesteps": [999, 499]}

    assert replace(spec, sampler=Sampling(steps=2, extra=given)).sampling.extra == {**own, **given}


def test_lora_lcm_is_made_for_the_shipped_model() -> None:
    spec, best = make_spec(["lora=lcm"]), few_step.get_preset("lcm", "tiny")

    assert (spec.sampling.steps, spec.sampling.guidance, spec.sampling.scheduler) == (
        best.steps,
        best.guidance,
        best.scheduler,
    )
    assert spec.sampling.height == 64
    assert spec.lora.strengths == [best.strength]
    assert spec.sampling.steps <= 4
    assert spec.lora.adapters[0].get_source("tiny") == ("few_step", None)

    asked = make_spec(["lora=lcm", "sampler.steps=28", "lora.adapters.0.strength=0.9"])

    assert asked.sampling.steps == 28
    assert asked.sampling.scheduler == best.scheduler
    assert asked.lora.strengths == [0.9]
    assert make_spec(["lora=lcm", "lora.adapters.0.enabled=false"]).sampling.steps == 16


@pytest.mark.skipif(
    not FEW_STEP.is_file(), reason="int8run/assets/lora/few_step.safetensors is not trained yet"
)
@pytest.mark.slow
def test_the_shipped_few_step_lora_generates_in_few_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [
        "prompts.prompts=[fox]",
        "tracker=none",
        "backend=reference",
        "metrics.layers=false",
        "progress=false",
    ]
    result = run_job([*words, "lora=lcm"], tmp_path)

    assert len(result.candidate.trajectories[0]) <= 4
    assert result.metrics["lora/modules_unmatched"] == 0
    assert "made for" not in caplog.text


def test_the_users_folder_may_be_in_the_home(plain: RunSpec, draw: Callable, tmp_path: Path) -> None:
    (tmp_path / "home" / "loras").mkdir(parents=True)
    save_lora(tmp_path / "home" / "loras" / "mine.safetensors", random_pipeline().transformer)
    result = draw(plain, lora=stack("mine"), lora_dir="~/loras", sampler=replace(plain.sampler, steps=1))

    assert result.metrics["lora/modules_matched"] == 16


@pytest.mark.parametrize("mode", ["dynamic", "bake", "stochastic"])
def test_a_saved_model_without_its_loras_is_said_to_be_so(
    plain: RunSpec,
    files: dict[str, str],
    draw: Callable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    draw(plain, lora=stack(files["style"], mode=mode), save=str(tmp_path / "m.safetensors"))
    said = (
        f"{tmp_path / 'm.safetensors'} will hold the model "
        f"without its LoRAs; lora.mode=bake writes them into it"
    )

    assert (said in caplog.messages) == (mode != "bake")


@pytest.mark.slow
def test_norms_over_several_layers_are_baked_into_a_streamed_model(
    model: Path, small: list[str], draw: Callable, tmp_path: Path
) -> None:
    """A file of the denoiser is streamed, and column norms over q, k and v need all three weights."""
    transformer = random_pipeline().transformer
    attention = transformer.transformer_blocks[0].attn
    weight = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]).detach()
    name = "transformer.transformer_blocks.0.attn.to_qkv"
    save_file(
        {
            f"{name}.lora_down.weight": randn(2, weight.shape[1], seed=1),
            f"{name}.lora_up.weight": randn(len(weight), 2, seed=2),
            f"{name}.dora_scale": 1.5 * weight.norm(dim=0, keepdim=True),
        },
        tmp_path / "dora.safetensors",
    )
    save_file(transformer.state_dict(), tmp_path / "denoiser.safetensors")
    lora = stack(str(tmp_path / "dora.safetensors"), mode="bake")
    streamed = make_spec(
        [
            *small,
            f"model.location={tmp_path / 'denoiser.safetensors'}",
            f"model.base={model}",
            "metrics.baseline=none",
        ]
    )
    whole = make_spec(small)

    made = draw(streamed, lora=lora).candidate.trajectories[0]

    assert torch.equal(made, draw(whole, lora=lora).candidate.trajectories[0])
    assert not torch.equal(made, draw(whole).candidate.trajectories[0])
