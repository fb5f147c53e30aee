"""The tracker against a real MLflow server that goes away."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from support.servers import Door, MlflowServer
from tracking.records import list_runs, make_record, read_contents, with_run_id

from int8run.errors import TrackingError
from int8run.tracking import retry
from int8run.tracking.mlflow_tracker import MlflowTracker
from int8run.tracking.run_record import RUNNING, read_record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def door(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """The way to the server. Whoever finds it shut gives up quickly."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(retry, "PING_PAUSES_S", (0.0,))
    with Door(server.port) as way:
        yield way


def test_a_server_that_is_away_at_the_start_gets_everything_later(door: Door, tmp_path: Path) -> None:
    tracker = MlflowTracker(uri=door.address, experiment="away at the start")
    door.shut()
    running = make_record(tmp_path / "job", state=RUNNING, files=False)
    for call in (tracker.prepare, lambda: tracker.start_run(running)):
        with pytest.raises(
            TrackingError, match=rf"^tracker\.uri={door.address} does not answer: connection refused$"
        ):
            call()
    door.open()
    run_id = tracker.upload_record(make_record(tmp_path / "job"))
    (run,) = list_runs(tracker)

    assert (run.info.run_id, run.info.status, run.info.artifact_uri.split(":")[0]) == (
        run_id,
        "FINISHED",
        "mlflow-artifacts",
    )

    tracker.download_run(run_id, tmp_path / "back")

    assert read_record(tmp_path / "back").images == read_record(tmp_path / "job").images
    assert tracker.share_sweep("sweep-a", [running]) == (
        f"{door.address}/#/experiments/{run.info.experiment_id}/runs"
        "?workflowType=machine_learning&viewStateShareKey=sweep-a&compareRunsMode=CHART"
    )


def test_a_server_that_goes_away_in_the_middle_gets_everything_once(door: Door, tmp_path: Path) -> None:
    tracker = MlflowTracker(uri=door.address, experiment="away in the middle")
    tracker.prepare()
    door.open()
    whole = tracker.upload_record(make_record(tmp_path / "whole"))
    requests, wanted = door.passed, read_contents(tracker, whole)
    cuts = range(4, requests, 9)
    for n, last in enumerate(cuts):
        record = make_record(tmp_path / str(n), started=5.0 + n)
        door.open()
        record = with_run_id(record, tracker.get_location(), tracker.start_run(record)) if n % 2 else record
        door.open(last)
        with pytest.raises(TrackingError, match=rf"^tracker\.uri={door.address} does not answer: "):
            tracker.upload_record(record)
        door.open()
        assert read_contents(tracker, tracker.upload_record(record)) == wanted, (
            f"{last} of {requests} requests"
        )

    assert len(list_runs(tracker)) == 1 + len(cuts)


def test_two_commands_that_create_one_experiment_both_use_it(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(uri=door.address, experiment="made by two")
    find = mlflow.MlflowClient.get_experiment_by_name
    answer = iter([None])  # the other one makes it after this one has looked

    def late(client: mlflow.MlflowClient, name: str) -> object:
        return next(answer, find(client, name))

    tracker.prepare()
    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", late)
    tracker.prepare()

    assert next(answer, "asked") == "asked"
