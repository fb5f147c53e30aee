"""Layers that stay float because INT8 does not pay: what they compute, where they come from, what is said.

Times are faked, so nothing depends on the machine.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.run_job import run_job, save_lora
from support.tiny_pipeline import random_pipeline, save_random_pipeline

from int8run.backends import float_comparison
from int8run.backends.base import Backend, LayerTimes, Shape
from int8run.backends.float import Float
from int8run.backends.layer_timer import LayerTimer
from int8run.pipeline import process_cache
from int8run.tasks import run_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    """On every Linear of the denoiser."""
    path = tmp_path_factory.mktemp("loras") / "every.safetensors"
    return str(save_lora(path, random_pipeline().transformer, only=""))


@pytest.fixture
def small(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    process_cache.clear()
    return [
        f"model.location={model}",
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=2",
        "prompts.prompts=[a]",
        "tracker=none",
        f"backend.table={tmp_path / 'choices.json'}",
    ]


@pytest.fixture
def faster_when_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float takes half of INT8's time in square layers, and four times as long in others."""

    def measure(
        timer: LayerTimer, backends: Mapping[str, Backend], shape: Shape, groups: object = None
    ) -> LayerTimes:
        _, in_features, out_features = shape
        float_seconds = 0.5 if in_features == out_features else 4.0
        seconds = {}
        for name, backend in backends.items():
            seconds[name] = float_seconds if isinstance(backend, Float) else 1.0
        return LayerTimes(seconds, {}, is_steady=True)

    monkeypatch.setattr(LayerTimer, "measure", measure)


def read_layers(out: Path) -> list[dict[str, str]]:
    with (out / "layers.csv").open() as file:
        return list(csv.DictReader(file))


def read_image(out: Path) -> bytes:
    """The only image of a run that has no other model beside it."""
    (file,) = (out / "images").iterdir()
    return Image.open(file).tobytes()


def test_the_float_backend_is_the_float_model_through_the_same_code(small: list[str], tmp_path: Path) -> None:
    words = [word for word in small if not word.startswith("backend.table")]
    metrics = run_job([*words, "backend=float", f"save={tmp_path / 'saved.safetensors'}"], tmp_path).metrics
    saved = load_file(tmp_path / "saved.safetensors")

    assert metrics["quality/latent_rel_err"] == 0
    assert metrics["memory/denoiser_ratio"] == 1
    assert metrics["quant/layers_int8"] == 0
    chosen = [row for row in read_layers(tmp_path) if row["why_not"] == "backend=float"]
    assert len(chosen) == metrics["quant/layers_float_by_choice"] > 0
    # what is saved is for other machines as well
    num_weights = sum(int(row["in_features"]) * int(row["out_features"]) for row in chosen)
    assert sum(t.numel() for t in saved.values() if t.dtype == torch.int8) == num_weights


@pytest.mark.usefixtures("faster_when_square")
def test_a_layer_that_is_faster_in_float_stays_float(small: list[str], tmp_path: Path) -> None:
    metrics = run_job([*small, f"save={tmp_path / 'saved.safetensors'}"], tmp_path / "out").metrics
    everything = run_job(
        [*small, "int8.only_if_faster=false", f"save={tmp_path / 'whole.safetensors'}"], tmp_path / "whole"
    ).metrics

    rows = read_layers(tmp_path / "out")
    by_choice = [row for row in rows if row["why_not"].startswith("float is 2.00 times as fast as ")]
    assert len(by_choice) == metrics["quant/layers_float_by_choice"] > 0
    assert all(row["in_features"] == row["out_features"] for row in by_choice)
    assert {row["speedup_vs_float"] for row in by_choice} == {"0.5"}
    int8 = [row for row in rows if row["quantized"] == "true"]
    assert {row["speedup_vs_float"] for row in int8} == {"4"} and len(int8) == metrics["quant/layers_int8"]
    assert everything["quant/layers_int8"] == len(int8) + len(by_choice)
    assert everything["quant/layers_float_by_choice"] == 0
    assert metrics["memory/denoiser_bytes"] > everything["memory/denoiser_bytes"]
    assert metrics["quality/psnr_db"] > everything["quality/psnr_db"]
    saved, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("saved", "whole"))
    assert saved.keys() == whole.keys() and all(saved[name].equal(whole[name]) for name in saved)


@pytest.mark.parametrize("mode", ["dynamic", "bake"])
def test_float_layers_that_are_read_late_get_the_loras(
    small: list[str], tmp_path: Path, lora: str, mode: str
) -> None:
    """Without a float baseline their weights are not in memory while the LoRAs are put on the model."""
    words = [word for word in small if not word.startswith("backend.table")]
    words += ["metrics.baseline=none", f"+lora.adapters=[{{path: {lora}}}]", "lora.strength=0.7"]
    run_job([*words, "backend=float", f"lora.mode={mode}"], tmp_path / "late")
    run_job([*words, "int8.enable=false", f"lora.mode={mode}"], tmp_path / "float")
    run_job([*words, "backend=float", f"lora.mode={mode}", "lora.strength=0.1"], tmp_path / "weak")

    assert read_image(tmp_path / "late") == read_image(tmp_path / "float") != read_image(tmp_path / "weak")


def test_a_quantized_file_gives_float_layers_of_its_own_numbers(
    small: list[str], tmp_path: Path, model: Path
) -> None:
    file = tmp_path / "saved.safetensors"
    words = [word for word in small if not word.startswith(("backend.table", "model.location"))]
    run_job([*words, f"model.location={model}", "backend=float", f"save={file}"], tmp_path / "made")
    words += [f"model.location={file}", f"++model.base={model}", "metrics.baseline=none"]
    metrics = run_job([*words, "backend=float"], tmp_path / "late").metrics
    run_job([*words, "int8.enable=false"], tmp_path / "float")

    assert metrics["quant/layers_float_by_choice"] > 0
    assert read_image(tmp_path / "late") == read_image(tmp_path / "float")


def test_a_fastest_float_dtype_that_was_not_found_is_not_looked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each job of a sweep would copy the model anew."""
    tried = []
    monkeypatch.setattr(run_metrics, "find_best_float", lambda *args, **options: tried.append(args))
    monkeypatch.setattr(run_metrics, "find_largest_layer", lambda built: (1, 2, 3))
    spec: Any = SimpleNamespace(
        compile="none",
        offload="none",
        backend=SimpleNamespace(table=str(tmp_path / "table.json")),
        model=SimpleNamespace(dtype="float32"),
    )
    built: Any = SimpleNamespace(
        denoisers={"float": None, "int8": None},
        device=torch.device("cpu"),
        best_float=None,
        is_best_float_tried=False,
    )

    for _ in range(2):
        assert run_metrics.compare_with_best_float(spec, built, [], 2.0) == {}
    assert len(tried) == 1
