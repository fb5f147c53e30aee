"""`task=report`: which runs are compared, what is uploaded and fetched first, what is said when there is
nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import pytest
from report.run_folders import make_metrics, write_run
from support.cli_process import Command

from int8run.errors import ConfigError
from int8run.jobs.manifest import SweepManifest, write_manifest
from int8run.tasks.options import Report
from int8run.tasks.report import sync_runs
from int8run.tracking import retry
from int8run.tracking.base import NoTracker
from int8run.tracking.run_record import (
    FINISHED,
    Record,
    end_record,
    find_records,
    read_record,
    start_record,
    update_record,
)

SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=1",
    "prompts.prompts=[a]",
    "metrics.layers=false",
    "backend=reference",
    "cache.limit_gb=0",
]
IDENTITY = {
    "task": "run",
    "name": "n",
    "overrides": [],
    "params": {},
    "choices": {},
    "config_hash": "c",
    "build_key": "b",
    "objective": "q",
}


def uploaded(command: Command) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{command.folder / 'mlflow.db'}")
    return client.search_runs([client.get_experiment_by_name("int8run").experiment_id])


@pytest.mark.slow
def test_runs_that_no_tracker_has_are_uploaded_once_and_fetched_again(command: Command, model: str) -> None:
    assert command("-m", "seed=0,1", model, *SMALL, "tracker=none").code == 0

    first = command("task=report", "sync=multirun")

    assert first.code == 0
    assert "2 of 2 runs uploaded, 0 were there already" in first.out
    assert "runs: " in first.out

    again = command("task=report", "sync=multirun")

    assert again.code == 0
    assert "0 of 2 runs uploaded, 2 were there already" in again.out

    runs = uploaded(command)

    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert "sweep" in (command.folder / "multirun" / "report.html").read_text()

    sweep = runs[0].data.tags["sweep"]
    fetched = command("task=report", f"task.sweep={sweep}", "task.path=here")

    assert fetched.code == 0
    assert f"sweep {sweep}, 2 runs" in fetched.out
    assert (command.folder / "here" / "report.html").is_file()

    theirs = {r.config_hash: r for r in find_records(command.folder / "multirun")}
    for record in find_records(command.folder / "here"):
        assert record.metrics == theirs[record.config_hash].metrics
        ours = theirs[record.config_hash].folder / record.images[0]["float"]
        assert (record.folder / record.images[0]["float"]).read_bytes() == ours.read_bytes()


@dataclass(frozen=True)
class RecordingTracker(NoTracker):
    """Takes every run, and notes of which sweeps it was asked for a dashboard."""

    shared: list[tuple[str, int]] = field(default_factory=list)

    def get_location(self) -> dict[str, str]:
        return {"store": "here", "experiment": "e"}

    def upload_record(self, record: Record) -> str:
        return f"id of {record.number}"

    def share_sweep(self, sweep: str, records: Sequence[Record]) -> str:
        self.shared.append((sweep, len(records)))
        return f"dashboard of {sweep}"


def test_a_dashboard_that_is_missing_is_made_where_all_runs_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = {"store": "here", "experiment": "e", "run_id": "1", "uploaded": True}
    for number in range(3):
        sweep = "lr=1,x=[2]" if number < 2 else "other"
        record = start_record(tmp_path / str(number), {**IDENTITY, "number": number, "sweep": sweep})
        end_record(record, FINISHED)
        if number != 1:
            update_record(read_record(record.folder), tracking=tracking)
    start_record(tmp_path / "3", {**IDENTITY, "number": 3, "sweep": "other"})
    tracker = RecordingTracker()

    sync_runs(tracker, tmp_path)

    assert sorted(tracker.shared) == [("lr=1,x=[2]", 2), ("other", 1)]
    out = capsys.readouterr().out
    assert "dashboard of lr=1,x=[2]" in out
    assert "1 of 4 runs uploaded, 2 were there already, 1 still running" in out


def test_a_tracker_that_is_away_is_an_error_for_who_asks_for_it(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PING_PAUSES_S", (0.0, 0.01))

    assert command(model, *SMALL, "tracker=none").code == 0

    outcome = command(
        "task=report", "sync=outputs", "tracker.uri=http://127.0.0.1:9"
    )  # the discard port: nothing listens there

    assert outcome.code == 1
    assert outcome.message.startswith("tracker.uri=http://127.0.0.1:9 does not answer")

    (record,) = find_records(command.folder / "outputs")

    assert not record.uploaded


def test_runs_that_were_meant_for_another_tracker_are_said(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PING_PAUSES_S", (0.0, 0.01))
    away = command(model, *SMALL, "tracker.uri=http://me:secret@127.0.0.1:9")
    words = " ".join(away.out.split())

    assert away.code == 0
    assert "upload it later: int8run task=report sync=" in words
    assert "tracker.uri=http://127.0.0.1:9" in words

    here = command("task=report", "sync=outputs")

    assert here.code == 0
    assert "1 run was meant for http://127.0.0.1:9; the upload goes to sqlite:///" in " ".join(
        here.out.split()
    )
    assert len(uploaded(command)) == 1


def test_a_sweep_that_lacks_jobs_says_so(command: Command) -> None:
    write_manifest(command.folder / "multirun" / "a", SweepManifest("a-1234", created=1.0, jobs=3))
    end_record(
        start_record(command.folder / "multirun" / "a" / "0", {**IDENTITY, "sweep": "a-1234"}), "FINISHED"
    )
    outcome = command("task=report")
    said = "sweep a-1234, 1 of 3 jobs; its command with resume=true runs the rest"

    assert outcome.code == 0
    assert said in outcome.out
    assert said in (command.folder / "multirun" / "a" / "report.html").read_text()


def test_the_newest_sweep_that_ran_is_reported(command: Command) -> None:
    for name, created, jobs in (("old", 1.0, 1), ("new", 2.0, 1), ("empty", 3.0, 0)):
        write_manifest(command.folder / "multirun" / name, SweepManifest(name, created=created))
        if jobs:
            start_record(command.folder / "multirun" / name / "0", {**IDENTITY, "sweep": name})
    outcome = command("task=report")

    assert outcome.code == 0
    assert (command.folder / "multirun" / "new" / "report.html").is_file()
    assert not (command.folder / "multirun" / "old" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, r"there is no sweep in .*/multirun; task\.path=FOLDER names the runs to compare"),
        (
            ["task.path=nowhere"],
            3,
            (
                r"nowhere is not a folder \(looked for .*/nowhere\); "
                r"task\.path= and sync= name one that runs were written to"
            ),
        ),
        (["sync=nowhere"], 3, r"nowhere is not a folder"),
        (["task.path=/"], 3, r"/ is the whole file system; name the folder that runs were written to"),
        (["task.path=."], 3, r".* holds no run of int8run: none of its folders has a status\.json"),
        (
            ["task.sweep=unknown"],
            2,
            r"task\.sweep=unknown: the tracker has no run with this tag; its page shows the tags, ",
        ),
        (["task.sweep=x", "tracker=none"], 2, r"task\.sweep=x: tracker=none keeps no runs"),
    ],
)
def test_what_cannot_be_reported_is_named(command: Command, words: list[str], code: int, said: str) -> None:
    outcome = command("task=report", *words)

    assert outcome.code == code and re.match(said, outcome.message), outcome.message
    assert [name for name in command.made() if not name.startswith("ml")] == []


@pytest.mark.slow
def test_tables_and_the_atlas_by_the_command(command: Command) -> None:
    folder = command.folder / "runs"
    write_run(folder, 0, ["outlier=none"], {"rounding": "absmax"}, metrics=make_metrics())

    table = command("task=report", "task.path=runs", "task.format=csv")
    atlas = command("task=report", "task.atlas=[runs]", "task.path=here")
    no_votes = command("task=report", "task.path=runs", "task.votes=[missing.json]")

    assert table.code == 0 and (folder / "report.csv").read_text().startswith("run,")
    assert atlas.code == 0 and "1 result" in atlas.out
    assert "EPYC" in (command.folder / "here" / "atlas.html").read_text()
    assert no_votes.code == 2
    assert no_votes.message.startswith("task.votes: the runs have no two images to compare")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "pdf"}, "task.format is 'pdf'; choose from csv, html, latex, markdown"),
        ({"votes": "a.json"}, r"task.votes is 'a.json'; give a list of texts, such as \[votes.json\]"),
        ({"votes": ["a.json"], "format": "csv"}, "task.format=csv has no place for task.votes"),
        ({"atlas": [1]}, r"task.atlas is \[1\]; give a list of texts"),
        ({"atlas": ["a"], "sweep": "s"}, "task.atlas shows results of several people"),
    ],
)
def test_settings_of_a_report_that_do_not_go_together(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Report(**settings)
