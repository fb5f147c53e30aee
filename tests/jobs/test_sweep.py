"""Multiruns through the real command, in this process."""

import csv
import json
from pathlib import Path

import mlflow
import pytest
from support.cli_process import Command
from support.helpers import without_vnni
from support.run_job import save_lora
from support.tiny_pipeline import random_pipeline

import int8run.generate.generate as generate_module
from int8run.jobs.sweep import count_images
from int8run.pipeline import process_cache

SMALL = ["sampler.height=16", "sampler.width=16", "sampler.steps=2", "prompts.prompts=[a]"]


def read_tracked_runs(folder: Path) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("int8run")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of each job, in order."""
    paths = sorted((folder / "multirun").rglob("metrics.json"))
    return [json.loads(path.read_text())["metrics"] for path in paths]


def read_layer_values(folder: Path, column: str) -> list[set[str]]:
    """The first words in a column of `layers.csv` of each job, in order; empty cells are left out."""
    values = []
    for path in sorted((folder / "multirun").rglob("layers.csv")):
        rows = csv.DictReader(path.read_text().splitlines())
        values.append({row[column].split()[0] for row in rows if row[column]})
    return values


@pytest.mark.slow
def test_strengths_of_the_shipped_stack_build_once(command: Command) -> None:
    process_cache.clear()

    outcome = command(
        "-m",
        "lora=stack_a",
        "lora.adapters.0.strength=0,0.5,1,2",
        "sampler.steps=2",
        "prompts.prompts=[fox]",
    )

    assert outcome.code == 0, outcome.err
    runs = read_tracked_runs(command.folder)
    assert [run.data.params["lora.adapters.0.strength"] for run in runs] == ["0", "0.5", "1", "2"]
    assert [run.data.metrics["build/load_s"] > 0 for run in runs] == [True, False, False, False]
    assert len({run.data.tags["sweep"] for run in runs}) == 1
    assert len(list((command.folder / "multirun").rglob("grid.png"))) == 4


@pytest.mark.slow
def test_a_sweep_builds_once_for_each_way_to_quantize_and_not_for_a_strength(
    command: Command, model: str
) -> None:
    process_cache.clear()
    file = save_lora(command.folder / "style.safetensors", random_pipeline().transformer)
    adapter = f"{{_target_: int8run.lora.config.Adapter, name: style, path: {file}}}"

    outcome = command(
        "-m",
        "outlier=none,convrot",
        "lora.strength=0,1",
        "backend=reference",
        model,
        *SMALL,
        "tracker=none",
        f"lora.adapters=[{adapter}]",
    )

    assert outcome.code == 0, outcome.err
    is_built = [metrics["build/load_s"] > 0 for metrics in read_metrics(command.folder)]
    assert is_built == [True, False, True, False]
    methods = read_layer_values(command.folder, "outlier")
    assert methods == [{"none"}, {"none"}, {"convrot"}, {"convrot"}]


@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
def test_each_job_of_a_sweep_uses_the_backend_that_it_asks_for(command: Command, model: str) -> None:
    outcome = command("-m", "backend=reference,onednn,torch_int_mm", model, *SMALL, "tracker=none")

    assert outcome.code == 0, outcome.err
    used = read_layer_values(command.folder, "backend_used")
    asked = read_layer_values(command.folder, "backend_asked")
    assert used == asked == [{"reference"}, {"onednn"}, {"torch_int_mm"}]


def test_a_sweep_that_is_stopped_says_what_is_kept(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_call, calls = generate_module.call_pipeline, []

    def call(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 6:  # job 0: warm-up and two images; job 1: warm-up, one image, and Ctrl-C
            raise KeyboardInterrupt
        return real_call(*arguments)

    monkeypatch.setattr(generate_module, "call_pipeline", call)
    words = ["prompts.seeds_per_prompt=2", "metrics.baseline=none", "metrics.layers=false", "tracker=none"]

    outcome = command("-m", "seed=0,10", model, *SMALL, *words, "backend=reference", "hydra.sweep.dir=here")

    assert outcome.code == 130
    said = " ".join((outcome.out + outcome.err).split())
    folder = command.folder / "here"
    kept = f"interrupted: 1 of 2 jobs are finished, in {folder}; image files kept of the others: 1"
    assert kept in said
    assert [path.name for path in (folder / "1" / "images").iterdir()] == ["000_a_s10.png"]


def test_an_image_whose_write_was_cut_off_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "000_a_s0.png").touch()
    (folder / ".001_a_s1.png.new").touch()

    assert count_images(tmp_path) == 1


def test_one_failing_job_does_not_stop_the_others(command: Command, model: str) -> None:
    location = model.removeprefix("model.location=")

    outcome = command("-m", f"model.location={command.folder / 'missing'},{location}", *SMALL)

    assert outcome.code == 3
    assert "is not a diffusers folder" in outcome.err
    assert len(list((command.folder / "multirun").rglob("grid.png"))) == 1
    failed, finished = read_tracked_runs(command.folder)
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert "is not a diffusers folder" in failed.data.tags["error"]
