"""Multiruns through the real command, in this process."""

import csv
import json
from pathlib import Path

import mlflow
import pytest
from support.cli_process import command_in
from support.helpers import without_vnni
from support.run_job import save_lora
from support.tiny_pipeline import random_pipeline, save_random_pipeline

from int8run.pipeline import process_cache

SMALL = ["sampler.height=16", "sampler.width=16", "sampler.steps=2", "prompts.prompts=[a]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.location={save_random_pipeline(tmp_path_factory.mktemp('model'))}"


def runs_in(folder: Path) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return client.search_runs(
        [client.get_experiment_by_name("int8run").experiment_id], order_by=["attributes.start_time"]
    )


def layers_in(folder: Path) -> list[list[dict[str, str]]]:
    """`layers.csv` of each job, in order."""
    return [
        list(csv.DictReader(path.read_text().splitlines()))
        for path in sorted((folder / "multirun").rglob("layers.csv"))
    ]


def test_strengths_of_the_shipped_stack_build_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process_cache.clear()
    with command_in(tmp_path, monkeypatch, capsys) as int8run:
        outcome = int8run(
            "-m",
            "lora=stack_a",
            "lora.adapters.0.strength=0,0.5,1,2",
            "sampler.steps=2",
            "prompts.prompts=[fox]",
        )
    assert outcome.code == 0, outcome.err
    logged = runs_in(tmp_path)
    assert [r.data.params["lora.adapters.0.strength"] for r in logged] == ["0", "0.5", "1", "2"]
    assert [r.data.metrics["build/load_s"] > 0 for r in logged] == [True, False, False, False]
    assert len({r.data.tags["sweep"] for r in logged}) == 1
    assert len(list((tmp_path / "multirun").rglob("grid.png"))) == 4


def test_a_sweep_builds_once_for_each_way_to_quantize_and_not_for_a_strength(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process_cache.clear()
    file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer)
    lora = f"lora.adapters=[{{_target_: int8run.lora.config.Adapter, name: style, path: {file}}}]"
    with command_in(tmp_path, monkeypatch, capsys) as int8run:
        outcome = int8run(
            "-m",
            "outlier=none,convrot",
            "lora.strength=0,1",
            "backend=reference",
            model,
            *SMALL,
            "tracker=none",
            lora,
        )
    assert outcome.code == 0, outcome.err
    measured = [
        json.loads(path.read_text())["metrics"]
        for path in sorted((tmp_path / "multirun").rglob("metrics.json"))
    ]
    assert [m["build/load_s"] > 0 for m in measured] == [True, False, True, False]
    methods = [{row["outlier"].split()[0] for row in rows if row["outlier"]} for rows in layers_in(tmp_path)]
    assert methods == [{"none"}, {"none"}, {"convrot"}, {"convrot"}]


@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
def test_backends_in_one_sweep_keep_to_their_own(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with command_in(tmp_path, monkeypatch, capsys) as int8run:
        outcome = int8run("-m", "backend=reference,onednn,torch_int_mm", model, *SMALL, "tracker=none")
    assert outcome.code == 0, outcome.err
    used = [{row["backend_used"] for row in rows} - {""} for rows in layers_in(tmp_path)]
    asked = [{row["backend_asked"] for row in rows} - {""} for rows in layers_in(tmp_path)]
    assert used == asked == [{"reference"}, {"onednn"}, {"torch_int_mm"}]


def test_one_failing_job_does_not_stop_the_others(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with command_in(tmp_path, monkeypatch, capsys) as int8run:
        outcome = int8run(
            "-m", f"model.location={tmp_path / 'missing'},{model.removeprefix('model.location=')}", *SMALL
        )
    assert outcome.code == 3 and "is not a diffusers folder" in outcome.err
    assert len(list((tmp_path / "multirun").rglob("grid.png"))) == 1
    logged = runs_in(tmp_path)
    assert [r.info.status for r in logged] == ["FAILED", "FINISHED"]
    assert "is not a diffusers folder" in logged[0].data.tags["error"]
