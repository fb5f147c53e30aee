"""`task=report`: one page for runs that are there, in folders or in the tracker; and the upload of those that the tracker missed."""

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from int8run.errors import ConfigError, FileError, TrackingError
from int8run.jobs.execute import upload_record
from int8run.jobs.manifest import read_manifest
from int8run.jobs.resume import find_sweeps
from int8run.report.console import print_lines
from int8run.report.html_page import write_report
from int8run.tracking.base import Tracker
from int8run.tracking.run_record import FINISHED, RUNNING, Record, find_records

log = logging.getLogger(__name__)
SWEEPS_FOLDER = "multirun"  # hydra.sweep.dir begins with it


def report_runs(tracker: Tracker, path: str | None, sweep: str | None, sync: str | None) -> None:
    """Upload, fetch and compare.

    Args:
        path: folder of the runs; None: `sync`, or a folder named after `sweep`, or the newest sweep.
        sweep: its runs are fetched from the tracker.
        sync: runs in this folder that the tracker lacks are uploaded.

    Raises:
        FileError: when there is no run.
        TrackingError: when the tracker does not answer although it is needed.
    """
    if sync is not None:
        sync_runs(tracker, Path(sync).expanduser())
    folder = Path(path or sync or sweep or find_newest_sweep()).expanduser()
    if sweep is not None:
        fetch_runs(tracker, sweep, folder)
    records = find_runs(folder)
    page = folder / "report.html"
    title = format_title(records, folder)
    write_report(records, page, title)
    print_lines(escape(title), f"report:   {escape(str(page.absolute()))}")


def find_runs(folder: Path) -> list[Record]:
    """The runs in a folder.

    Raises:
        FileError: when there is none.
    """
    if not folder.is_dir():
        raise FileError(
            f"{folder} is no folder (looked for {folder.absolute()}); task.path= and sync= name one that runs were written to"
        )
    records = find_records(folder)
    if not records:
        raise FileError(f"{folder.absolute()} holds no run of int8run: none of its folders has a status.json")
    return records


def find_newest_sweep() -> str:
    """The folder of the sweep that began last and came to a run.

    Raises:
        ConfigError: when there is none here.
    """
    for folder, _ in sorted(find_sweeps(Path(SWEEPS_FOLDER)), key=lambda pair: pair[1].created, reverse=True):
        if find_records(folder):
            return str(folder)
    raise ConfigError(
        f"there is no sweep in {Path(SWEEPS_FOLDER).absolute()}; task.path=FOLDER names the runs to compare"
    )


def sync_runs(tracker: Tracker, folder: Path) -> None:
    """Upload every run that has ended and that the tracker lacks.

    Raises:
        TrackingError: when a run could not be uploaded.
    """
    tracker.prepare()
    records = sorted((r for r in find_runs(folder) if r.status["task"] == "run"), key=lambda r: r.started)
    missing = [r for r in records if r.state != RUNNING and not is_in_tracker(tracker, r)]
    warn_other_stores(tracker, missing)
    uploaded = [upload_record(tracker, record) for record in missing]
    for sweep in dict.fromkeys(r.sweep for r in uploaded if r.sweep and r.uploaded):
        link = tracker.share_sweep(sweep, [r for r in records if r.sweep == sweep])
        print_lines(*(escape(f"runs:     {line}") for line in (link,) if line))
    failed = [r for r in uploaded if not r.uploaded]
    print_lines(
        f"{len(uploaded) - len(failed)} of {len(records)} runs uploaded, {len(records) - len(missing)} were there already"
    )
    if failed:
        raise TrackingError(
            f"{len(failed)} of {len(missing)} runs could not be uploaded; the same command tries again"
        )


def warn_other_stores(tracker: Tracker, records: Sequence[Record]) -> None:
    """Say which runs were meant for another store: whoever leaves out `tracker.uri=` may not want them here."""
    here = tracker.get_location()
    for store in dict.fromkeys(
        r.tracking["store"] for r in records if r.tracking and r.tracking["store"] != here.get("store")
    ):
        count = sum(r.tracking.get("store") == store for r in records)
        log.warning(
            "%d runs were meant for %s and go to %s; tracker.uri= chooses", count, store, here.get("store")
        )


def is_in_tracker(tracker: Tracker, record: Record) -> bool:
    """Whether this tracker, and not another one, has everything."""
    return record.uploaded and {**record.tracking, **tracker.get_location()} == dict(record.tracking)


def fetch_runs(tracker: Tracker, sweep: str, folder: Path) -> None:
    """Bring the runs of a sweep back, each into a folder of its own.

    Raises:
        ConfigError: when the tracker knows no such sweep.
    """
    runs = tracker.find_sweep_runs(sweep)
    if not runs:
        place = tracker.get_view_hint()
        known = (
            f"the tracker has no run with this tag; its page shows the tags, {place}"
            if place
            else "tracker=none keeps no runs"
        )
        raise ConfigError(f"task.sweep={sweep}: {known}")
    for run_id in runs:
        tracker.download_run(run_id, folder / run_id)


def format_title(records: Sequence[Record], folder: Path) -> str:
    """The sweep that all runs belong to, else the folder; and how many of its jobs are there."""
    sweeps = {record.sweep for record in records}
    known = read_manifest(folder)
    if known is not None and sweeps == {known.id}:
        done = sum(record.state == FINISHED for record in records)
        rest = (
            f", {done} of {known.jobs} jobs; its command with resume=true runs the rest"
            if done < known.jobs
            else ""
        )
        return f"sweep {known.id}{rest}"
    name = next(iter(sweeps))
    return f"{f'sweep {name}' if len(sweeps) == 1 and name else folder.name or 'runs'}, {len(records)} runs"
