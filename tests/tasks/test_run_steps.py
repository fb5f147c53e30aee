"""Runs whose first or last steps are float (`int8.steps`), on random pipelines of diffusers' real classes."""

import json
import logging
from pathlib import Path

import pytest
import torch
from families.instances_b import wan22
from PIL import Image
from support.run_job import run_job, save_lora
from support.small_model import build_small_model
from support.tiny_pipeline import save_random_pipeline

from int8run.pipeline import process_cache
from int8run.tasks.inspect_file import inspect_file
from int8run.tasks.run import RunResult

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST = "int8.steps=[[0.0,float],[0.5,int8]]"
LAST = "int8.steps=[[0.0,int8],[0.5,float]]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def small(model: str) -> list[str]:
    process_cache.clear()
    return [
        f"model.location={model}",
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=4",
        "prompts.prompts=[a,b]",
        "tracker=none",
        "backend=reference",
        "int8.small_batch_fallback=never",
        "cache.limit_gb=0",
    ]


def list_equal_steps(result: RunResult) -> list[bool]:
    """Whether the latents after each step of the first image are those of the float model."""
    assert result.baseline is not None
    ours, exact = result.candidate.trajectories[0], result.baseline.trajectories[0]
    return [torch.equal(step, exact_step) for step, exact_step in zip(ours, exact, strict=True)]


def test_float_steps_are_those_of_the_float_model(small: list[str], tmp_path: Path) -> None:
    plain = run_job(small, tmp_path / "plain")
    result = run_job([*small, FIRST], tmp_path / "first")

    assert list_equal_steps(plain) == [False] * 4
    assert list_equal_steps(result) == [True, True, False, False]
    assert result.candidate.step_denoisers == [["float", "float", "int8", "int8"]] * 2
    assert (result.metrics["steps/float"], result.metrics["steps/int8"]) == (2, 2)
    assert result.metrics["quality/latent_rel_err"] < plain.metrics["quality/latent_rel_err"]
    assert "steps/float" not in plain.metrics and not plain.candidate.step_denoisers


def test_a_sweep_over_steps_uses_one_model(small: list[str], tmp_path: Path) -> None:
    first = run_job([*small, FIRST], tmp_path / "first")
    last = run_job([*small, LAST], tmp_path / "last")

    assert last.metrics["build/quantize_s"] == 0 < first.metrics["build/quantize_s"]
    assert last.candidate.step_denoisers == [["int8", "int8", "float", "float"]] * 2
    assert list_equal_steps(last) == [False] * 4


def test_a_precision_that_computes_no_step_is_named(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = run_job([*small, "int8.steps=[[0.0,int8],[0.8,float]]"], tmp_path)

    assert result.candidate.step_denoisers == [["int8"] * 4] * 2
    assert "int8.steps asks for float, and none of the 4 steps begins in its part" in caplog.text


def test_the_float_denoiser_counts_in_the_memory(small: list[str], tmp_path: Path) -> None:
    words = [*small, "metrics.baseline=none"]
    plain = run_job(words, tmp_path / "plain").metrics
    process_cache.clear()
    metrics = run_job([*words, FIRST], tmp_path / "steps").metrics

    assert metrics["memory/denoiser_ratio"] < 1 < plain["memory/denoiser_ratio"]
    layers_alone = metrics["memory/denoiser_bytes"] - metrics["float/denoiser_bytes"]
    assert 0 < layers_alone < plain["memory/denoiser_bytes"], "what both have counts once"


def test_an_image_says_who_computed_its_steps(small: list[str], tmp_path: Path) -> None:
    run_job([*small, FIRST], tmp_path)

    for file in (tmp_path / "images").iterdir():
        facts = json.loads(Image.open(file).info["int8run"])
        if "float" in file.stem:
            assert "steps_by_precision" not in facts
        else:
            assert facts["steps_by_precision"] == "2 float, 2 int8"
            assert "Steps by precision: " in Image.open(file).info["parameters"]
            int8_image = file
    inspect_file(int8_image)
    rows = dict(inspect_file(str(int8_image)).rows)
    assert rows["int8.steps"] == "[[0.0, 'float'], [0.5, 'int8']]"
    assert rows["steps by precision"] == "2 float, 2 int8"


def test_loras_that_change_from_step_to_step_reach_both_denoisers(small: list[str], tmp_path: Path) -> None:
    denoiser = build_small_model(Path(small[0].partition("=")[2]), "int8.enable=false").denoisers["float"]
    lora = save_lora(tmp_path / "a.safetensors", denoiser)
    words = [*small, f"lora.adapters=[{{path: '{lora}', strength: [[0,1],[0.25,0.5]]}}]"]

    result = run_job([*words, FIRST], tmp_path / "out")

    assert list_equal_steps(result) == [True, True, False, False]


def test_both_experts_of_a_pipeline_take_their_part(tmp_path: Path) -> None:
    process_cache.clear()
    pipe = wan22()
    pipe.save_pretrained(tmp_path / "model")
    words = [
        f"model.location={tmp_path / 'model'}",
        *("sampler.height=16", "sampler.width=16", "sampler.steps=4", "++sampler.extra.num_frames=5"),
        *("prompts.prompts=[a]", "tracker=none", "backend=reference", "cache.limit_gb=0"),
    ]

    result = run_job([*words, FIRST], tmp_path / "out")

    equal = list_equal_steps(result)
    assert equal[:2] == [True, True] and not any(equal[2:])


def test_a_quality_budget_is_met_with_the_float_steps(small: list[str], tmp_path: Path) -> None:
    words = [*small, "model_type.mixed_precision=auto", "quality_db=20", "int8.attention=float"]
    plain = run_job(words, tmp_path / "plain").metrics
    shared = run_job([*words, FIRST], tmp_path / "shared").metrics

    assert shared["budget/without_db"] > plain["budget/without_db"]


def test_a_saved_file_does_not_have_the_steps(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_job([*small, FIRST, f"save={tmp_path / 'x.safetensors'}"], tmp_path / "out")

    assert "int8.steps is not in" in caplog.text
