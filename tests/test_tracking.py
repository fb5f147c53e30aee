"""The MLflow tracker against SQLite, and the tracker that keeps nothing."""

import os
import sqlite3
from pathlib import Path

import mlflow
import pytest
import torch
from cli_process import command_in
from PIL import Image

from int8run.errors import ConfigError
from int8run.tracking.base import NoTracker
from int8run.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose database the tracker made from nothing. The tables take seconds, so the other tests copy this one."""
    path = tmp_path_factory.mktemp("store")
    MlflowTracker(folder=str(path), experiment="another").prepare()
    return path


@pytest.fixture
def folder(tmp_path: Path, new_store: Path) -> Path:
    """A folder with a copy of that database, and two such folders in it."""
    for place in (tmp_path, tmp_path / "a", tmp_path / "b"):
        place.mkdir(exist_ok=True)
        # not the file alone: what was written last may still be beside it
        with sqlite3.connect(new_store / "mlflow.db") as source, sqlite3.connect(place / "mlflow.db") as target:
            source.backup(target)
    return tmp_path


def only_run(folder: Path) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("int8run").experiment_id])
    return run


def test_a_store_is_made_for_several_writers_and_keeps_files_beside_it(new_store: Path) -> None:
    assert sqlite3.connect(new_store / "mlflow.db").execute("pragma journal_mode").fetchone() == ("wal",)
    experiment = mlflow.MlflowClient(f"sqlite:///{new_store / 'mlflow.db'}").get_experiment_by_name("another")
    assert experiment.artifact_location == (new_store / "mlartifacts" / "another").as_uri()
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_run_holds_what_was_logged(folder: Path) -> None:
    tracker = MlflowTracker(folder=str(folder))
    (folder / "layers.csv").write_text("name\n")
    with tracker.start("a=1", {"model": "tiny"}, {"sweep": "none"}) as run:
        run.log_metrics({"quality/psnr_db": float("inf"), "speed/step_ms_p50": 2.5})
        run.log_series("series/step_ms", [3.0, 2.0])
        run.log_image("sample/000_fox_s0", Image.new("RGB", (4, 4), "red"))
        run.log_file(folder / "layers.csv")
    run = only_run(folder)
    assert (run.info.status, run.info.run_name, run.data.params["model"], run.data.tags["sweep"]) == ("FINISHED", "a=1", "tiny", "none")
    assert run.data.metrics["speed/step_ms_p50"] == 2.5 and run.data.metrics["quality/psnr_db"] > 1e300
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    assert [m.value for m in client.get_metric_history(run.info.run_id, "series/step_ms")] == [3.0, 2.0]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"layers.csv", "images"}


def test_an_error_marks_the_run_failed_and_keeps_what_it_had(folder: Path) -> None:
    tracker = MlflowTracker(folder=str(folder))
    with pytest.raises(ConfigError, match="broken"), tracker.start("x", {}, {}) as run:
        run.log_metrics({"build/load_s": 1.0})
        raise ConfigError("broken on purpose")
    run = only_run(folder)
    assert (run.info.status, run.data.tags["error"], run.data.metrics["build/load_s"]) == ("FAILED", "broken on purpose", 1.0)
    assert mlflow.active_run() is None, "a run left open would break the next job"


def test_two_trackers_in_one_process_write_to_their_own_places(folder: Path) -> None:
    for name in ("a", "b"):
        with MlflowTracker(folder=str(folder / name)).start(name, {}, {}):
            pass
    assert [only_run(folder / name).info.run_name for name in ("a", "b")] == ["a", "b"]


def test_a_run_leaves_no_setting_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # mlflow exports its address for child processes; conf/tracker/mlflow.yaml reads it, and the next job of a sweep would too
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///of-the-user.db")
    with MlflowTracker(folder=str(folder)).start("x", {}, {}):
        pass
    assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///of-the-user.db"


def test_failed_jobs_of_a_sweep_are_marked_in_their_own_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with command_in(folder, monkeypatch, capsys) as command:
        outcome = command("-m", "tracker.folder=a,b", "device=cuda", "seed=5")
    assert outcome.code == 4 and "device=cuda asks for a GPU" in outcome.message
    for name in ("a", "b"):
        run = only_run(folder / name)
        assert run.info.status == "FAILED" and run.data.tags["error"].startswith("device=cuda asks for a GPU, but torch ")
        assert (run.info.run_name, run.data.params["seed"]) == (f"tracker.folder={name} device=cuda seed=5", "5")
        assert folder / run.data.tags["sweep"] == next((folder / "multirun").glob("*/*")), "the jobs of a sweep are found by this tag"


def test_a_deleted_experiment_is_named(folder: Path) -> None:
    tracker = MlflowTracker(folder=str(folder))
    tracker.prepare()
    client = mlflow.MlflowClient(tracker.store)
    client.delete_experiment(client.get_experiment_by_name("int8run").experiment_id)
    with (
        pytest.raises(ConfigError, match=r"the MLflow experiment 'int8run' is deleted; .*tracker\.experiment="),
        tracker.start("x", {}, {}),
    ):
        pass


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MlflowTracker(uri="http://127.0.0.1:9")  # the discard port: nothing listens there
    with (
        pytest.raises(ConfigError, match=r"tracker\.uri=http://127\.0\.0\.1:9 does not answer: .*; tracker=none"),
        tracker.start("x", {}, {}),
    ):
        pass


@pytest.mark.parametrize(
    ("uri", "line"),
    [("http://host:5000", "http://host:5000"), ("sqlite:////a/b.db", "mlflow server --backend-store-uri sqlite:////a/b.db")],
)
def test_where_to_look(uri: str, line: str) -> None:
    assert MlflowTracker(uri=uri).where() == line


def test_no_tracker_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = NoTracker()
    with tracker.start("x", {}, {}) as run:
        run.log_metrics({"a": 1.0})
        run.log_series("s", [1.0])
        run.log_image("k", Image.new("RGB", (1, 1)))
        run.log_file(tmp_path / "absent")
    assert tracker.where() is None and list(tmp_path.iterdir()) == []
