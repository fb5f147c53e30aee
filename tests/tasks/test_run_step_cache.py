"""Runs with a step cache: what is skipped is counted, and the loss is split into parts."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from support.run_job import make_spec, run_job, save_lora
from support.tiny_pipeline import save_random_pipeline

from int8run.pipeline import process_cache
from int8run.tasks.inspect_image import inspect_image
from int8run.tasks.run import RunResult

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=6",
    "prompts.prompts=[a,b]",
    "tracker=none",
    "backend=reference",
    "int8.only_if_faster=false",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"))


def run_small(model: Path, out: Path, *words: str) -> RunResult:
    process_cache.clear()
    about = [f"model.location={model}", f"model.base={model}"]
    return run_job([*about, *SMALL, *words], out)


def test_a_cache_that_never_finds_anything_unchanged_changes_nothing(model: Path, tmp_path: Path) -> None:
    plain = run_small(model, tmp_path / "plain")

    cached = run_small(model, tmp_path / "cached", "cache_steps=first_block", "cache_steps.threshold=0")

    assert cached.metrics["cache/steps_skipped"] == 0
    assert cached.metrics["cache/steps_computed"] == 12
    assert cached.metrics["cache/macs_skipped_share"] == 0
    assert cached.metrics["cache/psnr_to_int8_db"] == float("inf")
    for own, other in zip(cached.candidate.trajectories, plain.candidate.trajectories, strict=True):
        assert torch.equal(own, other)


def test_skipped_steps_are_counted_and_the_loss_is_split(model: Path, tmp_path: Path) -> None:
    words = ["cache_steps=first_block", "cache_steps.threshold=1", "cache_steps.models=both"]

    metrics = run_small(model, tmp_path, *words).metrics

    assert metrics["cache/steps_skipped"] + metrics["cache/steps_computed"] == 12
    assert metrics["cache/steps_skipped"] > 0
    assert metrics["speed/steps_skipped_share"] == metrics["cache/steps_skipped"] / 12
    assert 0 < metrics["cache/macs_skipped_share"] < 1
    parts = ("cache/int8_psnr_db", "cache/psnr_to_int8_db", "cache/float_psnr_db", "quality/psnr_db")
    assert all(0 < metrics[part] < 200 for part in parts)
    for ratio in ("cache/int8_ratio", "cache/ratio_vs_int8", "cache/float_ratio"):
        assert metrics[ratio] > 0
    stored = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert stored["cache/steps_skipped"] == metrics["cache/steps_skipped"]


def test_int8_attention_runs_inside_a_cache(model: Path, tmp_path: Path) -> None:
    words = ["cache_steps=first_block", "int8.attention=int8"]

    idle = run_small(model, tmp_path / "idle", *words, "cache_steps.threshold=0").metrics
    busy = run_small(model, tmp_path / "busy", *words, "cache_steps.threshold=1").metrics

    assert idle["quant/attention_int8"] > 0
    assert idle["cache/psnr_to_int8_db"] == float("inf"), "the hooks alone change nothing"
    assert busy["cache/steps_skipped"] > 0


def test_a_schedule_of_strengths_runs_with_a_cache(model: Path, tmp_path: Path) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(model / "transformer")
    lora = save_lora(tmp_path / "style.safetensors", transformer)
    words = [
        "lora=file",
        f"lora.adapters.0.path={lora}",
        "lora.adapters.0.strength=[[0,0],[0.5,1]]",
        "cache_steps=first_block",
    ]

    idle = run_small(model, tmp_path / "idle", *words, "cache_steps.threshold=0").metrics
    busy = run_small(model, tmp_path / "busy", *words, "cache_steps.threshold=0.9").metrics

    assert idle["cache/psnr_to_int8_db"] == float("inf")
    assert 0 < busy["cache/steps_skipped"] < 12


def test_a_float_model_that_ran_before_is_what_both_parts_are_compared_with(
    model: Path, tmp_path: Path
) -> None:
    words = ["cache_steps=first_block", "cache_steps.threshold=1", "metrics.baseline=cached"]

    metrics = run_small(model, tmp_path, *words).metrics

    assert 0 < metrics["cache/int8_psnr_db"] < 200
    assert 0 < metrics["cache/psnr_to_int8_db"] < 200


def test_a_cache_that_skips_nothing_and_one_of_few_steps_say_so(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["cache_steps=first_block", "cache_steps.threshold=0", "sampler.steps=3"]

    run_small(model, tmp_path, *words)

    assert "cache_steps=first_block skipped none of 6 steps" in caplog.text
    assert "cache_steps=first_block and 3 steps: with so few hardly any can be skipped" in caplog.text


def test_measured_ratios_are_logged_for_the_next_run(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    metrics = run_small(model, tmp_path, "cache_steps=magcache", "cache_steps.threshold=10").metrics

    logged = re.search(r"measured: (cache_steps.ratios=\[[\d., ]+\])", caplog.text)
    assert logged is not None
    given = logged[1].replace(" ", "")
    again = run_small(model, tmp_path, "cache_steps=magcache", "cache_steps.threshold=10", given).metrics
    assert again["cache/steps_skipped"] == metrics["cache/steps_skipped"] > 0


@pytest.mark.slow
def test_compiled_blocks_have_the_cache_around_them(model: Path, tmp_path: Path) -> None:
    words = ["cache_steps=first_block", "compile=blocks", "metrics.layers=false"]

    idle = run_small(model, tmp_path / "idle", *words, "cache_steps.threshold=0").metrics
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    busy = run_small(model, tmp_path / "busy", *words, "cache_steps.threshold=1").metrics

    assert idle["cache/psnr_to_int8_db"] == float("inf")
    assert busy["cache/steps_skipped"] > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_a_split_the_int8_model_runs_once(model: Path, tmp_path: Path) -> None:
    words = ["cache_steps=first_block", "cache_steps.split=false"]

    metrics = run_small(model, tmp_path, *words).metrics

    assert "cache/steps_skipped" in metrics
    assert "cache/psnr_to_int8_db" not in metrics


def test_an_image_says_its_cache_and_the_command_repeats_it(tmp_path: Path) -> None:
    words = ["sampler.steps=4", "prompts.prompts=[a]", "tracker=none", "backend=reference"]
    cache = ["cache_steps=first_block", "cache_steps.threshold=0.3"]
    process_cache.clear()

    run_job([*words, *cache], tmp_path)

    image = next(path for path in (tmp_path / "images").glob("*.png") if "float" not in path.name)
    command = dict(inspect_image(image).commands)["to repeat it"]
    assert " cache_steps=first_block cache_steps.threshold=0.3" in command
    assert "Step cache: first_block threshold=0.3" in Image.open(image).info["parameters"]
    repeated = make_spec(["cache_steps=first_block", "cache_steps.threshold=0.3"]).cache_steps
    assert repeated == make_spec(cache).cache_steps
