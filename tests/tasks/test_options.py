"""What each task says that it ignores: it does not read that, and all of it is a setting."""

import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import write_file
from support.cli_process import Command
from support.run_job import make_spec

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import Int8RunError
from int8run.layers.plan import Int8Settings
from int8run.tasks.options import Audit, Bench, Inspect, Quantize, Report, Run
from int8run.tasks.search_options import Search

TASKS = (Run, Inspect, Audit, Bench, Quantize, Report, Search)


@pytest.mark.parametrize("task", TASKS)
def test_what_a_task_ignores_are_settings(task: type) -> None:
    groups = {setting.name for setting in fields(RunSpec)}
    parts = {f"int8.{setting.name}" for setting in fields(Int8Settings)}
    assert task.ignores <= groups | parts


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=inspect", "task.path={file}"],
        ["task=report", "task.path={folder}"],
        ["task=quantize", "save={folder}/int8.safetensors", "progress=false"],
        ["task=bench", "task.rows=4", "task.rounds=1", "progress=false", "backend=reference"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_task_does_not_read_what_it_ignores(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_file({"blocks.0.attn.weight": torch.ones(8, 8)}, tmp_path / "a.safetensors")
    spec = make_spec([word.format(file=file, folder=tmp_path) for word in overrides])
    task = spec.task
    read: set[str] = set()

    def note(self: RunSpec, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(RunSpec, "__getattribute__", note)

    # there is no run to report; what that task needs it has read by then
    with contextlib.suppress(Int8RunError):
        task.execute(spec, Job({}, {}, [], tmp_path))

    assert read
    # whether the float model is needed depends on these, and the benchmark then says that it is not
    derived = {"metrics", "outlier", "rounding", "quality_db"} if overrides[0] == "task=bench" else set()
    assert not read & (task.ignores - derived)


def test_what_cannot_run_here_is_refused_before_there_is_a_folder(command: Command) -> None:
    outcome = command("offload=model", "metrics.baseline=none", "device=cpu", "hydra.run.dir=out")

    assert outcome.code == 4
    assert outcome.message.startswith("offload=model moves parts of the model")
    assert not (command.folder / "out").exists()


def test_a_mode_that_a_named_pipeline_has_not_is_refused_before_the_hub_is_asked(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*words: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("int8run.models.model_folders.check_repository", ask)

    outcome = command("model=fibo", "model.mode=inpaint", "device=cpu")

    assert outcome.code == 2
    assert outcome.message.startswith(
        "model.mode=inpaint does not exist for a checkpoint of BriaFiboPipeline"
    )
