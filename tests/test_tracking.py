"""The MLflow tracker against SQLite, and the tracker that keeps nothing."""

import sqlite3
from pathlib import Path

import mlflow
import pytest
from PIL import Image

from int8run.errors import ConfigError
from int8run.tracking.base import NoTracker
from int8run.tracking.mlflow_tracker import MlflowTracker


def only_run(folder: Path) -> mlflow.entities.Run:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("int8run").experiment_id])
    return run


def test_a_run_holds_what_was_logged(tmp_path: Path) -> None:
    tracker = MlflowTracker(folder=str(tmp_path))
    (tmp_path / "layers.csv").write_text("name\n")
    with tracker.start("a=1", {"model": "tiny"}, {"sweep": "none"}):
        tracker.log_metrics({"quality/psnr_db": float("inf"), "speed/step_ms_p50": 2.5})
        tracker.log_series("series/step_ms", [3.0, 2.0])
        tracker.log_image("sample/000_fox_s0", Image.new("RGB", (4, 4), "red"), step=0)
        tracker.log_file(tmp_path / "layers.csv")
    run = only_run(tmp_path)
    assert (run.info.status, run.info.run_name, run.data.params["model"], run.data.tags["sweep"]) == ("FINISHED", "a=1", "tiny", "none")
    assert run.data.metrics["speed/step_ms_p50"] == 2.5 and run.data.metrics["quality/psnr_db"] > 1e300
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [m.value for m in client.get_metric_history(run.info.run_id, "series/step_ms")] == [3.0, 2.0]
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"layers.csv", "images"}
    assert sqlite3.connect(tmp_path / "mlflow.db").execute("pragma journal_mode").fetchone() == ("wal",)


def test_an_error_marks_the_run_failed_and_keeps_what_it_had(tmp_path: Path) -> None:
    tracker = MlflowTracker(folder=str(tmp_path))
    with pytest.raises(ConfigError, match="broken"), tracker.start("x", {}, {}):
        tracker.log_metrics({"build/load_s": 1.0})
        raise ConfigError("broken on purpose")
    run = only_run(tmp_path)
    assert (run.info.status, run.data.tags["error"], run.data.metrics["build/load_s"]) == ("FAILED", "broken on purpose", 1.0)
    assert mlflow.active_run() is None, "a run left open would break the next job"


def test_two_trackers_in_one_process_write_to_their_own_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with MlflowTracker(folder=str(tmp_path / name)).start(name, {}, {}):
            pass
    assert [only_run(tmp_path / name).info.run_name for name in ("a", "b")] == ["a", "b"]


def test_a_deleted_experiment_is_named(tmp_path: Path) -> None:
    tracker = MlflowTracker(folder=str(tmp_path))
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
    [("http://host:5000", "runs: http://host:5000"), ("sqlite:////a/b.db", "runs: mlflow server --backend-store-uri sqlite:////a/b.db")],
)
def test_where_to_look(uri: str, line: str) -> None:
    assert MlflowTracker(uri=uri).where() == line


def test_no_tracker_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = NoTracker()
    with tracker.start("x", {}, {}):
        tracker.log_metrics({"a": 1.0})
        tracker.log_series("s", [1.0])
        tracker.log_image("k", Image.new("RGB", (1, 1)), 0)
        tracker.log_file(tmp_path / "absent")
    assert tracker.where() is None and list(tmp_path.iterdir()) == []
