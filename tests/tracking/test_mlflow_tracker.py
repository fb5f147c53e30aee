"""The MLflow tracker against SQLite, and the tracker that keeps nothing."""

import json
import multiprocessing
import os
import re
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from PIL import Image
from support.cli_process import command_in
from support.tiers import slow_except
from tracking.records import list_runs, make_client, make_record, read_contents, with_run_id

from int8run.errors import ConfigError, TrackingError
from int8run.tracking import mlflow_tracker, retry
from int8run.tracking.base import NoTracker
from int8run.tracking.mlflow_tracker import MlflowTracker
from int8run.tracking.mlflow_view_tag import decode_view
from int8run.tracking.process_identity import describe_process
from int8run.tracking.run_record import FAILED, FINISHED, KILLED, KILLED_MESSAGE, RUNNING, read_record


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose database the tracker created. That takes seconds, so the other tests copy this one."""
    path = tmp_path_factory.mktemp("store")
    folder = path / "new, with an odd näme"
    MlflowTracker(folder=str(folder), experiment="another/one").prepare()
    return folder


def copy_store(source: Path, target: Path) -> None:
    """Copy a database; not the file alone: what was written last may still be beside it."""
    with sqlite3.connect(source / "mlflow.db") as old, sqlite3.connect(target / "mlflow.db") as new:
        old.backup(new)


@pytest.fixture
def tracker(tmp_path: Path, new_store: Path) -> MlflowTracker:
    """A tracker with such a copy."""
    copy_store(new_store, tmp_path)
    return MlflowTracker(folder=str(tmp_path))


def test_a_new_store_takes_several_writers_and_keeps_files_beside_it(new_store: Path) -> None:
    assert sqlite3.connect(new_store / "mlflow.db").execute("pragma journal_mode").fetchone() == ("wal",)

    experiment = mlflow.MlflowClient(f"sqlite:///{new_store / 'mlflow.db'}").get_experiment_by_name(
        "another/one"
    )

    assert experiment.artifact_location == (new_store / "mlartifacts" / "another_one").as_uri()
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_run_that_starts_has_the_settings_of_its_job(tracker: MlflowTracker, tmp_path: Path) -> None:
    tracker.start_run(make_record(tmp_path / "job", state=RUNNING, files=False, ended=None))

    (run,) = list_runs(tracker)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "strength=0")
    assert run.info.start_time == 1790000000250
    assert run.data.params == {"model": "tiny", "prompts": "tiny", "lora.strength": "0"}


def test_a_run_that_starts_has_the_tags_of_its_job(tracker: MlflowTracker, tmp_path: Path) -> None:
    tracker.start_run(make_record(tmp_path / "job", state=RUNNING, files=False, ended=None))

    (run,) = list_runs(tracker)
    process = describe_process()
    expected = {
        "sweep": "sweep-a",
        "number": "0",
        "host": process["host"],
        "pid": str(process["pid"]),
        "task": "run",
        "config_hash": "0" * 16,
        "mlflow.source.name": "int8run",
        "mlflow.source.type": "LOCAL",
    }
    assert {name: run.data.tags[name] for name in expected} == expected


@pytest.fixture
def uploaded_id(tracker: MlflowTracker, tmp_path: Path) -> str:
    """A job that was started, ended and uploaded: the id of its run."""
    run_id = tracker.start_run(make_record(tmp_path / "job", state=RUNNING, files=False, ended=None))
    ended = with_run_id(make_record(tmp_path / "job"), tracker.get_location(), run_id)
    assert tracker.upload_record(ended) == run_id
    return run_id


def test_an_upload_ends_the_run_with_its_metrics(tracker: MlflowTracker, uploaded_id: str) -> None:
    (run,) = list_runs(tracker)

    assert (run.info.status, run.info.end_time) == ("FINISHED", 1790000005500)
    assert run.data.metrics["speed/step_ms_p50"] == 2.5 and run.data.metrics["quality/psnr_db"] > 1e300
    assert run.data.tags["mlflow.source.git.commit"] == "8664a31abcde" and "error" not in run.data.tags


def test_an_upload_has_series_and_the_load_of_the_machine(tracker: MlflowTracker, uploaded_id: str) -> None:
    client = make_client(tracker)

    errors = client.get_metric_history(uploaded_id, "series/latent_rel_err")
    load = client.get_metric_history(uploaded_id, "system/cpu_percent")

    assert [metric.value for metric in errors] == [0.0, 0.5, 0.25]
    assert [(metric.value, metric.timestamp) for metric in load] == [
        (50.0, 1790000001500),
        (75.0, 1790000002500),
    ]


def test_an_upload_has_the_images_files_and_prompts(tracker: MlflowTracker, uploaded_id: str) -> None:
    contents = read_contents(tracker, uploaded_id)

    assert contents["images"] == [
        (f"images/sample~{key}", suffix)
        for key in ("000_fox_s0", "001_red-apple_s0")
        for suffix in (".png", ".webp")
    ]
    assert contents["files"] == [
        "config.yaml",
        "environment.json",
        "grid.png",
        "images",
        "int8run.log",
        "layers.csv",
        "layers.json",
        "metrics.json",
        "samples",
        "samples/000_fox_s0.png",
        "samples/000_fox_s0_float.png",
        "samples/001_red-apple_s0.png",
        "samples/001_red-apple_s0_float.png",
        "status.json",
        "system.csv",
    ]
    ((name, digest, tags),) = contents["inputs"]  # type: ignore[misc]
    assert (name, len(digest), tags) == ("tiny", 16, [("mlflow.data.context", "prompts")])


TABLE = {
    "name": ["a.b", "c"],
    "in_features": [8, 16],
    "quantized": [True, False],
    "why_not": [None, "small"],
    "weight_sqnr_db": [41.5, None],
}


def test_images_and_tables_look_like_those_of_mlflows_own_functions(
    tracker: MlflowTracker, tmp_path: Path
) -> None:
    run_id = tracker.upload_record(make_record(tmp_path / "job"))
    client = make_client(tracker)
    own = client.create_run(list_runs(tracker)[0].info.experiment_id).info.run_id
    client.log_table(own, TABLE, "layers.json")
    client.log_image(own, Image.new("RGB", (4, 4)), key="sample/x", step=0)
    for tag in ("mlflow.loggedArtifacts", "mlflow.loggedImages"):
        assert client.get_run(run_id).data.tags[tag] == client.get_run(own).data.tags[tag]

    assert {file.path.count("+") for file in client.list_artifacts(run_id, "images")} == {
        file.path.count("+") for file in client.list_artifacts(own, "images")
    }

    kept, theirs = (
        json.loads(Path(client.download_artifacts(i, "layers.json", str(tmp_path))).read_text())
        for i in (run_id, own)
    )

    assert (
        kept
        == {"columns": list(TABLE), "data": [list(row) for row in zip(*TABLE.values(), strict=True)]}
        == theirs
    )


def test_more_params_and_values_than_one_call_takes_are_logged(
    tracker: MlflowTracker, tmp_path: Path
) -> None:
    make_record(tmp_path / "job")
    (tmp_path / "job" / "metrics.json").write_text(json.dumps({"series": {"series/long": list(range(2100))}}))
    record = make_record(
        tmp_path / "job", files=False, params={f"p{i}": "v" * 600 for i in range(250)} | {"odd[name]": ""}
    )
    run_id = tracker.upload_record(record)
    run = make_client(tracker).get_run(run_id)

    assert (
        len(run.data.params) == 251
        and len(make_client(tracker).get_metric_history(run_id, "series/long")) == 2100
    )
    assert (
        run.data.params["p7"].startswith("v" * 460)
        and "… (600 characters" in run.data.params["p7"]
        and run.data.params["odd_name_"] == ""
    )


def test_a_repeated_upload_changes_nothing(tracker: MlflowTracker, tmp_path: Path) -> None:
    record = make_record(tmp_path / "job")
    run_id = tracker.upload_record(record)
    before = read_contents(tracker, run_id)

    assert tracker.upload_record(record) == run_id, "without an id of its own it is known by its identity"
    assert tracker.upload_record(with_run_id(record, tracker.get_location(), run_id)) == run_id
    assert read_contents(tracker, run_id) == before and len(list_runs(tracker)) == 1
    # MLflow takes no second value of a setting, and a version of ours that writes it otherwise must not stop
    # an upload
    assert (
        tracker.upload_record(make_record(tmp_path / "job", params={"model": "tiny.", "more": "1"})) == run_id
    )
    assert make_client(tracker).get_run(run_id).data.params["model"] == "tiny"


class Stopped(MlflowException):
    """The server is gone."""


def interrupt_calls(monkeypatch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Let the client's calls fail from number `call` on; the names of the calls."""
    calls: list[str] = []

    def counted(name: str, original):  # type: ignore[no-untyped-def]
        def function(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(name)
            if len(calls) > call:
                raise Stopped("Connection refused")
            return original(self, *args, **kwargs)

        return function

    client = mlflow.MlflowClient
    for name in [
        "create_run",
        "get_run",
        "log_batch",
        "log_artifact",
        "log_image",
        "log_inputs",
        "set_tag",
        "delete_tag",
        "set_terminated",
    ]:
        monkeypatch.setattr(client, name, counted(name, getattr(client, name)))
    return calls


@pytest.mark.parametrize("last", ["+compressed.webp", ".png"], ids=["after the large copy", "before it"])
def test_an_interrupted_image_is_completed(tracker: MlflowTracker, tmp_path: Path, last: str) -> None:
    record = make_record(tmp_path / "job")
    run_id = tracker.upload_record(record)
    wanted = read_contents(tracker, run_id)
    client = make_client(tracker)
    folder = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "images"
    small = {path.name for path in folder.glob("*+compressed.webp")}
    for path in folder.glob("sample~001*"):
        if path.name.endswith("+compressed.webp") or last == ".png":
            path.unlink()
    client.delete_tag(run_id, "mlflow.loggedImages")

    assert read_contents(tracker, run_id) != wanted

    tracker.upload_record(record)

    assert read_contents(tracker, run_id) == wanted

    if last == "+compressed.webp":
        assert {path.name for path in folder.glob("*+compressed.webp")} == small


def test_an_upload_interrupted_anywhere_is_completed_without_duplicates(
    tracker: MlflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tracker.upload_record(make_record(tmp_path / "whole"))
    wanted = read_contents(tracker, whole)
    with monkeypatch.context() as patch:
        calls = interrupt_calls(patch, 1000)
        tracker.upload_record(make_record(tmp_path / "counted", started=1.0))

    assert {"create_run", "log_image", "log_inputs", "set_terminated"} <= set(calls)

    for stop in range(0, len(calls), 4):
        record = make_record(tmp_path / str(stop), started=2.0 + stop)
        with (
            monkeypatch.context() as patch,
            pytest.raises(TrackingError, match="cannot be used: Connection refused"),
        ):
            interrupt_calls(patch, stop)
            tracker.upload_record(record)
        run_id = tracker.upload_record(record)
        assert read_contents(tracker, run_id) == wanted, calls[stop]

    assert len(list_runs(tracker)) == 2 + len(range(0, len(calls), 4))


def test_a_job_that_failed_early_has_its_settings_and_its_error(
    tracker: MlflowTracker, tmp_path: Path
) -> None:
    tracker.upload_record(
        make_record(tmp_path / "job", state=FAILED, files=False, error="broken on purpose " + "x" * 6000)
    )
    (run,) = list_runs(tracker)

    assert run.info.status == "FAILED" and run.data.params["model"] == "tiny"
    assert run.data.tags["error"].startswith("broken on purpose xx") and len(run.data.tags["error"]) == 5000
    assert {a.path for a in make_client(tracker).list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "status.json",
        "int8run.log",
    }
    assert mlflow.active_run() is None, "a run left open would break the next job"


def test_a_job_that_was_killed_ends_with_its_last_file(tracker: MlflowTracker, tmp_path: Path) -> None:
    record = make_record(tmp_path / "job", state=KILLED, ended=None, error=None)
    for path in record.folder.iterdir():
        os.utime(path, (1790000003, 1790000003))
    tracker.upload_record(record)
    (run,) = list_runs(tracker)

    assert (run.info.status, run.info.end_time, run.data.tags["error"]) == ("KILLED", 1790000003000, "KILLED")


def test_a_job_that_still_runs_stays_open(tracker: MlflowTracker, tmp_path: Path) -> None:
    tracker.upload_record(make_record(tmp_path / "job", state=RUNNING, ended=None))

    assert [(run.info.status, run.info.end_time) for run in list_runs(tracker)] == [("RUNNING", None)]


def test_a_record_of_another_store_gets_a_new_run(tracker: MlflowTracker, tmp_path: Path) -> None:
    record = make_record(tmp_path / "job")
    elsewhere = with_run_id(record, {"store": "http://elsewhere:5000", "experiment": "int8run"}, "0" * 32)
    lost = with_run_id(record, tracker.get_location(), "0" * 32)  # the database was made anew since
    first = tracker.upload_record(elsewhere)

    assert tracker.upload_record(lost) == first and first != "0" * 32

    make_client(tracker).delete_run(first)

    assert tracker.upload_record(with_run_id(record, tracker.get_location(), first)) != first


def describe_dead_process() -> dict[str, object]:
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return {**describe_process(), "pid": child.pid}


def test_runs_whose_process_is_gone_are_closed_by_the_next_command(
    tracker: MlflowTracker, tmp_path: Path
) -> None:
    me = describe_process()
    cases = {
        "gone": describe_dead_process(),
        "number of another process": {**me, "process_since_boot": "of-another-boot 5.00"},
        "alive": me,
        "elsewhere": {**describe_dead_process(), "host": "another-machine"},
    }
    ids = {
        name: tracker.start_run(make_record(tmp_path / name, RUNNING_NUMBER[name], RUNNING, False, **who))
        for name, who in cases.items()
    }
    tracker.prepare()
    client = make_client(tracker)
    runs = {name: client.get_run(run_id) for name, run_id in ids.items()}

    assert {name: run.info.status for name, run in runs.items()} == {
        "gone": "KILLED",
        "number of another process": "KILLED",
        "alive": "RUNNING",
        "elsewhere": "RUNNING",
    }
    assert (
        runs["gone"].data.tags["error"] == KILLED_MESSAGE
        and runs["gone"].info.end_time > runs["gone"].info.start_time
    )

    # it finished, and only its upload was cut off
    record = make_record(tmp_path / "gone", RUNNING_NUMBER["gone"])

    assert tracker.upload_record(with_run_id(record, tracker.get_location(), ids["gone"])) == ids["gone"]

    run = client.get_run(ids["gone"])

    assert run.info.status == "FINISHED" and "error" not in run.data.tags


RUNNING_NUMBER = {"gone": 0, "number of another process": 1, "alive": 2, "elsewhere": 3}


def test_a_sweeps_runs_are_found(tracker: MlflowTracker, tmp_path: Path) -> None:
    started = [
        tracker.start_run(make_record(tmp_path / str(n), n, RUNNING, sweep=sweep))
        for n, sweep in enumerate(["a", "a", "b", None])
    ]

    assert tracker.find_sweep_runs("a") == started[:2] and tracker.find_running("a") == {
        started[0]: 0,
        started[1]: 1,
    }

    tracker.end_run(started[1], KILLED, "its worker died")

    assert tracker.find_running("a") == {started[0]: 0}

    tracker.upload_record(
        with_run_id(make_record(tmp_path / "0", 0, sweep="a"), tracker.get_location(), started[0])
    )
    tracker.end_run(started[0], KILLED, "too late")
    runs = {run.info.run_id: run for run in list_runs(tracker)}

    assert [runs[i].info.status for i in started] == ["FINISHED", "KILLED", "RUNNING", "RUNNING"]
    assert (
        runs[started[1]].data.tags["error"] == "its worker died" and "error" not in runs[started[0]].data.tags
    )
    assert "sweep" not in runs[started[3]].data.tags
    assert tracker.find_running("absent") == {} and tracker.find_sweep_runs("absent") == []


def test_finished_jobs_are_known_by_their_settings(tracker: MlflowTracker, tmp_path: Path) -> None:
    states = {0: FINISHED, 1: FAILED, 2: KILLED, 3: RUNNING}
    ids = {
        n: tracker.upload_record(make_record(tmp_path / str(n), n, state, error="x"))
        for n, state in states.items()
    }
    hashes = [f"{n:016x}" for n in range(5)]

    assert tracker.find_finished(hashes) == {hashes[0]: ids[0]}

    newer = tracker.upload_record(make_record(tmp_path / "newer", 0, started=1790000001.0))

    assert tracker.find_finished(hashes) == {hashes[0]: newer} and tracker.find_finished([]) == {}


def test_an_uploaded_run_can_be_downloaded(tracker: MlflowTracker, tmp_path: Path) -> None:
    record = make_record(tmp_path / "job")
    (record.folder / "inputs").mkdir()
    (record.folder / "inputs" / "walk.mp4").write_bytes(b"a video that a sample began with")
    run_id = tracker.upload_record(record)
    tracker.attach_file(run_id, record.folder / "grid.png")
    tracker.download_run(run_id, tmp_path / "back")
    back = read_record(tmp_path / "back")

    def names(folder):
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}

    assert names(back.folder) == names(record.folder)

    for name in names(record.folder) - {"images", "inputs", "status.json"}:
        assert (back.folder / name).read_bytes() == (record.folder / name).read_bytes(), name

    assert back.run_id == run_id and back.uploaded and back.state == FINISHED and back.images == record.images
    assert tracker.upload_record(back) == run_id


def test_a_shared_sweep_has_a_dashboard_and_a_link(tracker: MlflowTracker, tmp_path: Path) -> None:
    records = [make_record(tmp_path / str(n), n) for n in range(2)]
    line = tracker.share_sweep("sweep-a", records)
    experiment = make_client(tracker).get_experiment_by_name("int8run")

    assert "mlflow.sharedViewState.sweep-a" in experiment.tags
    assert line == (
        f"mlflow server --backend-store-uri {tracker.store}\n"
        f"          then open http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}"
        "/runs?workflowType=machine_learning&viewStateShareKey=sweep-a&compareRunsMode=CHART"
    )


@pytest.mark.parametrize("sweep", ["lr=1,x=[2]-a3f9", "it's", 'a"b', "both ' and \"", "狐/x", "100%"])
def test_a_sweep_with_any_name_is_found_and_shared(
    tracker: MlflowTracker, tmp_path: Path, sweep: str
) -> None:
    records = [make_record(tmp_path / str(n), n, sweep=sweep) for n in range(2)]
    run_ids = [tracker.start_run(record) for record in records]

    line = tracker.share_sweep(sweep, records)

    assert tracker.find_sweep_runs(sweep) == run_ids and set(tracker.find_running(sweep)) == set(run_ids)
    assert line is not None and re.search(r"viewStateShareKey=[A-Za-z0-9_.-]+&compareRunsMode=CHART$", line)
    (tag,) = [tag for name, tag in read_tags(tracker).items() if name.startswith("mlflow.sharedViewState.")]
    condition = decode_view(tag)["searchFilter"]
    client = make_client(tracker)
    experiment_id = client.get_experiment_by_name(tracker.experiment).experiment_id
    assert len(client.search_runs([experiment_id], condition)) == 2, "the page finds its runs"


def read_tags(tracker: MlflowTracker) -> dict[str, str]:
    """The tags of its experiment."""
    return make_client(tracker).get_experiment_by_name(tracker.experiment).tags


def test_two_trackers_in_one_process_write_to_their_own_stores(new_store: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        copy_store(new_store, tmp_path / name)
        MlflowTracker(folder=str(tmp_path / name)).upload_record(
            make_record(tmp_path / f"job {name}", name=name)
        )

    assert [
        list_runs(MlflowTracker(folder=str(tmp_path / name)))[0].info.run_name for name in ("a", "b")
    ] == [
        "a",
        "b",
    ]


def test_a_run_leaves_no_setting_behind(
    tracker: MlflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mlflow exports its address for child processes; conf/tracker/mlflow.yaml reads it, and the next job of a
    # sweep would too
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///of-the-user.db")
    tracker.upload_record(make_record(tmp_path / "job"))

    assert (
        os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///of-the-user.db"
        and not (tmp_path / "of-the-user.db").exists()
    )


def test_a_deleted_experiment_is_an_error_that_does_not_end_a_run(
    tracker: MlflowTracker, tmp_path: Path
) -> None:
    tracker.prepare()
    client = make_client(tracker)
    client.delete_experiment(client.get_experiment_by_name("int8run").experiment_id)
    said = r"the MLflow experiment 'int8run' is deleted; .*tracker\.experiment="

    with pytest.raises(ConfigError, match=said):
        tracker.prepare()

    with pytest.raises(TrackingError, match=said):
        tracker.start_run(make_record(tmp_path / "job"))


@pytest.mark.parametrize(
    ("uri", "said"),
    {
        "folder": (
            "./mlruns",
            r"tracker\.uri=\./mlruns is a folder, and MLflow no longer keeps runs in folders; use sqlite:///",
        ),
        "file store": ("file:./mlruns", r"tracker\.uri=file:\./mlruns is a folder"),
        "unknown": (
            "ftp://x",
            r"tracker\.uri=ftp://x cannot be used: .*unsupported URI 'ftp://x'.*; tracker=none runs without",
        ),
        "no driver": (
            "postgresql+nobody://me:secret@h/x",
            r"tracker\.uri=postgresql\+nobody://h/x cannot be used: ",
        ),
        "no database": (
            "sqlite:///TMP/notes.txt",
            r"notes\.txt cannot be used: file is not a database; tracker=none",
        ),
        "in memory": (
            "sqlite://",
            r"tracker\.uri=sqlite:// keeps its runs in memory, .*use sqlite:////path/mlflow\.db",
        ),
        "a secret": ("postgres://me:secret@h/x", r"^((?!secret).)*$"),
        "no slashes": ("http//127.0.0.1:5000", r"tracker\.uri=http//127\.0\.0\.1:5000 is a folder, and"),
        "no folder": ("sqlite:////proc/nobody/mlflow.db", r"cannot be used: .*'/proc/nobody'; tracker=none"),
        "a folder": ("sqlite:///TMP", r"is a folder, a pipe or a device; name a file, which may be new$"),
        "a pipe": ("sqlite:///TMP/pipe", r"is a folder, a pipe or a device; name a file, which may be new$"),
        "no place": ("sqlite:////proc/mlflow.db", r"cannot be used: .*'/proc/mlflow.db.lock'; tracker=none"),
    }.values(),
)
def test_an_address_that_can_never_work_is_an_error(tmp_path: Path, uri: str, said: str) -> None:
    (tmp_path / "notes.txt").write_text("no database " * 100)
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ConfigError, match=said):
        MlflowTracker(uri=uri.replace("TMP", str(tmp_path))).prepare()


@pytest.mark.slow
def test_a_database_that_another_program_keeps_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "BUSY_TIMEOUT_S", 0.01)
    tracker = MlflowTracker(folder=str(tmp_path))
    tracker.prepare()

    with closing(sqlite3.connect(str(tracker.database))) as other:
        other.execute("begin immediate")
        with pytest.raises(TrackingError, match=r"mlflow\.db does not answer: database is locked$"):
            tracker.prepare()
    tracker.prepare()


def test_a_database_that_may_not_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's answer is put in its place: root, who runs many tests, may write everywhere."""

    def refuse(*args: object, **options: object) -> object:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(mlflow_tracker.sqlite3, "connect", refuse)
    with pytest.raises(ConfigError, match=r"cannot be used: attempt to write a readonly database; tracker="):
        MlflowTracker(folder=str(tmp_path)).prepare()


@pytest.mark.parametrize("uri", [None, "sqlite:///a\udcff.db"])
def test_a_database_whose_name_is_no_utf8_is_refused(uri):
    tracker = MlflowTracker(uri=uri, folder="a\udcff")
    with pytest.raises(ConfigError, match=r"has a name that is not UTF-8.*tracker\.folder=FOLDER"):
        tracker.check_address()


@pytest.mark.parametrize("name", ["a%20b", "a?b"])
def test_a_folder_that_mlflow_would_misread_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"has % or \? in its path.*tracker\.folder=FOLDER"):
        MlflowTracker(folder=str(tmp_path / name)).prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_an_error_after_a_short_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(retry, "PING_PAUSES_S", (0.0, 0.01))
    tracker = MlflowTracker(uri="http://me:secret@127.0.0.1:9")  # the discard port: nothing listens there
    record = make_record(tmp_path / "job")
    for call in (
        tracker.prepare,
        lambda: tracker.start_run(record),
        lambda: tracker.upload_record(record),
        lambda: tracker.find_sweep_runs("a"),
    ):
        with pytest.raises(
            TrackingError, match=r"^tracker\.uri=http://127\.0\.0\.1:9 does not answer: connection refused$"
        ):
            call()

    assert sum(retry.PING_PAUSES_S) + retry.PING_TIMEOUT_S <= 10


def test_a_server_that_accepts_connections_and_never_answers_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "PING_TIMEOUT_S", 0.1)

    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        pytest.raises(TrackingError, match=r"does not answer: no answer in 0\.1 s$"),
    ):
        MlflowTracker(uri=f"http://127.0.0.1:{mute.getsockname()[1]}").prepare()


def test_a_call_to_a_locked_database_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_PAUSES_S", (0.0, 0.0))
    left = [2]

    def locked() -> str:
        if left[0]:
            left[0] -= 1
            raise MlflowException("(sqlite3.OperationalError) database is locked", TEMPORARILY_UNAVAILABLE)
        return "done"

    assert retry.with_retries(locked) == "done"

    left[0] = 3

    with (
        pytest.raises(TrackingError, match=r"^tracker\.uri=sqlite:///x does not answer: database is locked$"),
        retry.translate_errors("sqlite:///x", checks_settings=True),
    ):
        retry.with_retries(locked)


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("sqlite:////a/b.db", "mlflow server --backend-store-uri sqlite:////a/b.db"),
        ("sqlite:///b.db", f"mlflow server --backend-store-uri sqlite:///{Path('b.db').absolute()}"),
        (None, f"mlflow server --backend-store-uri sqlite:///{Path('mlflow.db').absolute()}"),
    ],
)
def test_the_view_hint_is_an_address_or_a_command(uri: str | None, line: str) -> None:
    assert MlflowTracker(uri=uri).get_view_hint() == line


def write_three_runs(folder: str, first: int) -> None:
    """One of several processes that start at once on a new store."""
    for n in range(first, first + 3):
        tracker = MlflowTracker(folder=folder)
        tracker.prepare()
        record = make_record(Path(folder) / f"job{n}", n)
        tracker.upload_record(with_run_id(record, tracker.get_location(), tracker.start_run(record)))


@pytest.mark.slow
@pytest.mark.parametrize("processes", slow_except([2], [2, 4]))
def test_several_processes_can_create_one_store(processes: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # mlflow is imported already
    workers = [
        context.Process(target=write_three_runs, args=(str(tmp_path / "new"), 3 * i))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)

    assert [worker.exitcode for worker in workers] == [0] * processes

    tracker = MlflowTracker(folder=str(tmp_path / "new"))
    runs = list_runs(tracker)

    assert sorted(int(run.data.tags["number"]) for run in runs) == list(range(3 * processes))

    first = read_contents(tracker, runs[0].info.run_id)
    for run in runs:
        found = read_contents(tracker, run.info.run_id)
        assert run.info.status == "FINISHED" and (found["images"], found["files"], found["inputs"]) == (
            first["images"],
            first["files"],
            first["inputs"],
        )
        assert len(run.data.metrics) == len(runs[0].data.metrics)


def test_no_tracker_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_record(tmp_path / "job")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tracker = NoTracker()
    tracker.prepare()
    tracker.end_run("x", KILLED, "y")
    tracker.download_run("x", tmp_path / "here" / "back")
    tracker.attach_file("x", tmp_path / "absent")

    assert (
        tracker.start_run(record) is None
        and tracker.upload_record(record) is None
        and tracker.share_sweep("a", [record]) is None
    )
    assert (
        tracker.find_finished(["0" * 16]) == {}
        and tracker.find_running("a") == {}
        and tracker.find_sweep_runs("a") == []
    )
    assert tracker.get_view_hint() is None and tracker.get_location() == {} and list(Path().iterdir()) == []


def test_failed_jobs_of_a_sweep_are_marked_in_their_own_folders(
    tmp_path: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        copy_store(new_store, tmp_path / name)
    with command_in(tmp_path, monkeypatch, capsys) as command:
        outcome = command("-m", "tracker.folder=a,b", "device=cuda", "seed=5")

    assert outcome.code == 4 and "device=cuda asks for a GPU" in outcome.message

    for name in ("a", "b"):
        (run,) = list_runs(MlflowTracker(folder=str(tmp_path / name)))
        assert run.info.status == "FAILED" and run.data.tags["error"].startswith(
            "device=cuda asks for a GPU, but torch "
        )
        assert (run.info.run_name, run.data.params["seed"]) == (f"folder={name}", "5")
        assert (
            json.loads(next(tmp_path.glob("multirun/*/*/sweep.json")).read_text())["id"]
            == run.data.tags["sweep"]
        )
