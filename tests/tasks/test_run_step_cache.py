"""Runs with a step cache: what is skipped is counted, and the loss is split into parts."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.run_job import make_spec, run_job
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
