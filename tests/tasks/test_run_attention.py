"""Runs with INT8 attention, on a random FluxPipeline of diffusers' real classes."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from families.instances_b import wan22
from PIL import Image
from support.run_job import make_spec, run_job
from support.tiny_pipeline import save_random_pipeline
from torch import nn

from int8run.checkpoints.header import read_header
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.errors import ConfigError
from int8run.layers.int8_attention import Int8Attention
from int8run.pipeline import process_cache
from int8run.ptq import mixed_precision
from int8run.tasks.inspect_file import inspect_file

pytestmark = pytest.mark.usefixtures("one_thread")


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
        "sampler.steps=2",
        "prompts.prompts=[a]",
        "tracker=none",
        "backend=reference",
    ]


def read_attentions(out: Path) -> list[dict[str, str]]:
    with (out / "layers.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "attention"]


def read_images(out: Path) -> dict[str, bytes]:
    """The float model's images under `float`, the INT8 model's under `int8`."""
    files = (out / "images").iterdir()
    return {"float" if "float" in file.stem else "int8": Image.open(file).tobytes() for file in files}


def test_attention_becomes_int8_beside_an_unchanged_float_model(small: list[str], tmp_path: Path) -> None:
    plain = run_job([*small, "cache.limit_gb=0"], tmp_path / "float").metrics
    process_cache.clear()
    metrics = run_job([*small, "cache.limit_gb=0", "int8.attention=int8"], tmp_path / "int8").metrics

    rows = read_attentions(tmp_path / "int8")
    assert rows and {row["quantized"] for row in rows} == {"true"}
    assert {row["backend_used"] for row in rows} == {"reference"}
    assert all(float(row["output_sqnr_db"]) > 25 and float(row["macs_share"]) > 0 for row in rows)
    assert (metrics["quant/attention_int8"], metrics["quant/attention_float"]) == (len(rows), 0)
    assert metrics["quant/attention_sqnr_db_mean"] >= metrics["quant/attention_sqnr_db_min"] > 25
    assert metrics["quant/macs_int8_share"] > plain["quant/macs_int8_share"]
    assert metrics["quant/layers_int8"] == plain["quant/layers_int8"], "these are layers with weights"
    before, after = read_images(tmp_path / "float"), read_images(tmp_path / "int8")
    assert before["float"] == after["float"]
    assert before["int8"] != after["int8"]
    assert {row["why_not"] for row in read_attentions(tmp_path / "float")} == {"int8.attention=float"}
    assert not any("attention" in name for name in plain)


def test_without_a_float_model_the_int8_one_shows_how_exact_it_is(small: list[str], tmp_path: Path) -> None:
    words = [*small, "metrics.baseline=none", "cache.limit_gb=0", f"save={tmp_path / 'saved.safetensors'}"]
    metrics = run_job([*words, "int8.attention=int8"], tmp_path / "out").metrics

    assert metrics["quant/attention_int8"] == len(read_attentions(tmp_path / "out"))
    assert metrics["quant/attention_sqnr_db_min"] > 25
    _, metadata = read_header(tmp_path / "saved.safetensors")
    assert json.loads(metadata[PROVENANCE_KEY])["attention"] == "int8"


def test_a_file_says_that_its_model_had_int8_attention(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    saved = tmp_path / "saved.safetensors"
    words = [*small, "metrics.baseline=none", "metrics.layers=false", "cache.limit_gb=0"]
    run_job([*words, "int8.attention=int8", f"save={saved}"], tmp_path / "made")
    process_cache.clear()
    run_job([*words, "int8.attention=int8", f"int8.checkpoint={saved}"], tmp_path / "int8")
    assert "was made with" not in caplog.text
    process_cache.clear()
    run_job([*words, f"int8.checkpoint={saved}"], tmp_path / "float")

    said = [line for line in caplog.messages if "was made with int8.attention=int8" in line]
    assert said == [
        f"{saved} was made with int8.attention=int8; here attention stays float (int8.attention=float)"
    ]
    rows = dict(inspect_file(str(saved)).rows)
    assert rows["attention"].startswith("made with int8.attention=int8;")


def test_layers_of_the_cache_say_nothing_of_the_attention_that_they_were_made_with(
    small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache = ["cache.limit_gb=1", f"cache.folder={tmp_path / 'cache'}"]
    words = [*small, *cache, "metrics.baseline=none", "metrics.layers=false"]
    run_job([*words, "int8.attention=int8"], tmp_path / "int8")
    process_cache.clear()

    run_job(words, tmp_path / "float")

    assert "which an earlier run wrote" in caplog.text
    assert "was made with" not in caplog.text


def test_auto_takes_what_is_exact_enough(small: list[str], tmp_path: Path) -> None:
    words = [*small, "int8.attention=auto", "int8.only_if_faster=false", "int8.attention_min_sqnr_db=200"]
    metrics = run_job(words, tmp_path).metrics

    rows = read_attentions(tmp_path)
    assert metrics["quant/attention_float"] == len(rows) > 0
    assert all("int8.attention_min_sqnr_db asks for 200" in row["why_not"] for row in rows)
    assert all(float(row["output_sqnr_db"]) > 25 for row in rows), "what it would have had"


def test_no_int8_model_has_no_int8_attention(small: list[str]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"int8.attention=int8 contradict each other; for INT8 attention alone set backend=float$",
    ):
        make_spec([*small, "int8.enable=false", "int8.attention=int8"])


@pytest.mark.parametrize("setting", ["int8.attention=sage", "int8.attention_min_sqnr_db=-1"])
def test_a_setting_that_is_none_is_refused(small: list[str], setting: str) -> None:
    name, _, _ = setting.partition("=")
    with pytest.raises(ConfigError, match=name):
        make_spec([*small, setting])


def test_with_a_quality_budget_attention_takes_part_and_else_stays_float(small: list[str]) -> None:
    budget = ["model_type.mixed_precision=auto", "quality_db=40"]

    assert make_spec(small).int8.attention == "float"
    assert make_spec([*small, *budget]).int8.attention == "auto"
    assert make_spec([*small, *budget, "int8.attention=float"]).int8.attention == "float"


@pytest.mark.slow
def test_an_attention_that_a_budget_keeps_float_is_so_when_its_layers_are_cached(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = mixed_precision.measure_layer_sensitivities

    def blame_attention(denoiser: nn.Module, layers: Any, *args: Any, **options: Any) -> dict[str, float]:
        errors = measure(denoiser, layers, *args, **options)
        assert min(errors.values()) > 0
        is_attention = {name: isinstance(layer, Int8Attention) for name, layer in layers.items()}
        return {name: error * (1e9 if is_attention[name] else 1) for name, error in errors.items()}

    monkeypatch.setattr(mixed_precision, "measure_layer_sensitivities", blame_attention)
    cache = ["cache.limit_gb=1", f"cache.folder={tmp_path / 'cache'}"]
    budget = ["model_type.mixed_precision=auto", "calibration.prompts=[b]", "int8.attention=int8"]
    words = [*small, *cache, *budget]
    without_db = run_job([*words, "quality_db=0"], tmp_path / "all").metrics["budget/without_db"]
    words.append(f"quality_db={without_db + 0.5:.2f}")

    made = run_job(words, tmp_path / "made")
    process_cache.clear()
    read = run_job(words, tmp_path / "read")

    rows = read_attentions(tmp_path / "made")
    kept = [row["why_not"] for row in rows if row["quantized"] == "false"]
    assert kept and all("quality budget: alone it makes" in reason for reason in kept)
    assert made.metrics["budget/reached_db"] > without_db
    assert [row["why_not"] for row in read_attentions(tmp_path / "read")] == [row["why_not"] for row in rows]
    assert read_images(tmp_path / "made") == read_images(tmp_path / "read")
    assert read.metrics["budget/layers_kept"] == made.metrics["budget/layers_kept"]


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["none", "run"])
def test_both_of_two_denoisers_get_it(baseline: str, tmp_path: Path) -> None:
    wan22().save_pretrained(tmp_path / "model")
    process_cache.clear()
    words = [
        f"model.location={tmp_path / 'model'}",
        "model.dtype=float32",
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=2",
        "sampler.guidance=1",
        "+sampler.extra.num_frames=5",
        "prompts.prompts=[a]",
        "tracker=none",
        "backend=reference",
        "cache.limit_gb=0",
        f"metrics.baseline={baseline}",
    ]

    metrics = run_job([*words, "int8.attention=int8"], tmp_path / "out").metrics

    rows = read_attentions(tmp_path / "out")
    assert {row["name"].partition(".")[0] for row in rows} == {"transformer", "transformer_2"}
    assert metrics["quant/attention_int8"] == len(rows)
    assert all(float(row["output_sqnr_db"]) > 25 for row in rows)


@pytest.mark.slow
def test_it_goes_with_backend_float_and_compiled_blocks(small: list[str], tmp_path: Path) -> None:
    words = [word for word in small if not word.startswith("backend=")]
    metrics = run_job([*words, "backend=float", "compile=blocks", "int8.attention=int8"], tmp_path).metrics

    assert metrics["quant/layers_int8"] == 0
    assert metrics["quant/attention_int8"] == len(read_attentions(tmp_path))
    assert 20 < metrics["quality/psnr_db"] < 200, "attention alone has changed the image"


@pytest.mark.slow
def test_a_quality_is_searched_with_int8_attention_in_the_model(small: list[str], tmp_path: Path) -> None:
    words = [*small, "model_type.mixed_precision=auto", "quality_db=30", "calibration.prompts=[a]"]
    plain = run_job([*words, "int8.attention=float"], tmp_path / "float").metrics
    process_cache.clear()

    metrics = run_job([*words, "int8.attention=int8"], tmp_path / "int8").metrics

    assert metrics["quant/attention_int8"] == len(read_attentions(tmp_path / "int8"))
    assert metrics["budget/without_db"] != plain["budget/without_db"], "not what the cache has of the other"
    assert metrics["budget/reached_db"] >= 30
