"""`task=report`: compare runs in folders or in the tracker, and upload those that the tracker missed."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from int8run.errors import ConfigError, FileError, TrackingError
from int8run.jobs.execute import upload_record
from int8run.jobs.manifest import read_manifest
from int8run.jobs.resume import find_sweeps
from int8run.report.atlas import write_atlas
from int8run.report.console import print_lines
from int8run.report.export_table import render_table
from int8run.report.html_page import write_report
from int8run.report.runs import name_runs
from int8run.report.shared_results import collect_results
from int8run.report.templates import write_text_file
from int8run.tracking.base import Tracker
from int8run.tracking.run_record import FINISHED, RUNNING, Record, find_records
from int8run.utils.paths import expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
FILE_NAMES = {"html": "report.html", "markdown": "report.md", "latex": "report.tex", "csv": "report.csv"}
SWEEPS_FOLDER = "multirun"  # hydra.sweep.dir begins with it


@dataclass(frozen=True)
class ReportOutput:
    """What a report becomes.

    Args:
        format: a key of FILE_NAMES.
        votes: files of votes of the page's blind comparison; they are counted on it.
    """

    format: str = "html"
    votes: Sequence[str] = ()


HTML_PAGE = ReportOutput()


def report_runs(
    tracker: Tracker,
    path: str | None,
    sweep: str | None,
    sync: str | None,
    output: ReportOutput = HTML_PAGE,
) -> None:
    """Upload, download and compare.

    Args:
        tracker: uploads to, and downloads from, its store.
        path: folder of the runs; None: `sync`, or a folder named after `sweep`, or the newest sweep.
        sweep: tag of a sweep; its runs are downloaded from the tracker.
        sync: runs in this folder that the tracker lacks are uploaded.
        output: what is written, into that folder.

    Raises:
        FileError: when there is no run.
        TrackingError: when the tracker does not answer although it is needed.
    """
    if sync is not None:
        sync_runs(tracker, expand_path(sync))
    folder = expand_path(path or sync or sweep or find_newest_sweep())
    if sweep is not None:
        download_sweep(tracker, sweep, folder)
    records = find_runs(folder)
    file = folder / FILE_NAMES[output.format]
    title = format_title(records, folder)
    if output.format == "html":
        tallies = write_report(records, file, title, [expand_path(votes) for votes in output.votes])
        print_lines(title, *[f"votes:    {tally.describe()}" for tally in tallies])
    else:
        write_text_file(file, render_table(name_runs(records), title, output.format))
        print_lines(title)
    print_lines(f"report:   {file.absolute()}")


def write_result_atlas(paths: Sequence[str], folder: str | None, table_format: str) -> None:
    """Merge results of any number of people and machines into one page or table.

    Args:
        paths: metrics.json files, or folders with some in them.
        folder: where it is written; None: the working folder.
        table_format: a key of FILE_NAMES.

    Raises:
        FileError: a path is not there, or no result can be shown.
    """
    collection = collect_results([expand_path(path) for path in paths])
    suffix = Path(FILE_NAMES[table_format]).suffix
    file = expand_path(folder or ".") / f"atlas{suffix}"
    write_atlas(collection, file, table_format)
    line = count_noun(len(collection.results), "result")
    if collection.left_out:
        line += f"; left out, and listed above: {len(collection.left_out)}"
    print_lines(line, f"atlas:    {file.absolute()}")


def find_runs(folder: Path) -> list[Record]:
    """Find the runs in a folder, at any depth.

    Raises:
        FileError: when there is none.
    """
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not a folder (looked for {folder.absolute()}); "
            "task.path= and sync= name one that runs were written to"
        )
    if folder.resolve().parent == folder.resolve():
        raise FileError(f"{folder} is the whole file system; name the folder that runs were written to")
    records = find_records(folder)
    if not records:
        raise FileError(f"{folder.absolute()} holds no run of int8run: none of its folders has a status.json")
    return records


def find_newest_sweep() -> str:
    """Find the folder of the sweep that began last and has a run.

    Raises:
        ConfigError: when there is none in the working folder.
    """
    sweeps = sorted(find_sweeps(Path(SWEEPS_FOLDER)), key=lambda pair: pair[1].created, reverse=True)
    for folder, _ in sweeps:
        if find_records(folder):
            return str(folder)
    raise ConfigError(
        f"there is no sweep in {Path(SWEEPS_FOLDER).absolute()}; task.path=FOLDER names the runs to compare"
    )


def sync_runs(tracker: Tracker, folder: Path) -> None:
    """Upload every run in a folder that has ended and that the tracker lacks; make the dashboards of sweeps.

    Raises:
        TrackingError: when a run could not be uploaded.
    """
    tracker.prepare()
    records = [record for record in find_runs(folder) if record.status["task"] == "run"]
    records.sort(key=lambda record: record.started)
    present = [record for record in records if is_in_tracker(tracker, record)]
    running = [record for record in records if record.state == RUNNING]
    known = {record.folder for record in (*present, *running)}
    missing = [record for record in records if record.folder not in known]
    warn_other_stores(tracker, missing)
    results = [upload_record(tracker, record) for record in missing]
    uploaded = [record for record in results if record.uploaded]
    # also of sweeps whose runs were all there: the tracker may have gone away just before their dashboard
    share_dashboards(tracker, [*present, *uploaded])
    num_runs = count_noun(len(records), "run")
    line = f"{len(uploaded)} of {num_runs} uploaded, {len(present)} were there already"
    if running:
        line += f", {len(running)} still running"
    print_lines(line)
    failed = len(missing) - len(uploaded)
    if failed:
        raise TrackingError(
            f"{failed} of {count_noun(len(missing), 'run')} could not be uploaded; "
            "the same command tries again"
        )


def share_dashboards(tracker: Tracker, records: Sequence[Record]) -> None:
    """Make a dashboard of each sweep, in place of an earlier one, and print where they are.

    Args:
        tracker: has all of `records`.
        records: of any sweeps.
    """
    records_by_sweep: dict[str, list[Record]] = {}
    for record in records:
        if record.sweep is not None:
            records_by_sweep.setdefault(record.sweep, []).append(record)
    for sweep, members in records_by_sweep.items():
        view_hint = tracker.share_sweep(sweep, members)
        if view_hint:
            print_lines(f"runs:     {view_hint}")


def warn_other_stores(tracker: Tracker, records: Sequence[Record]) -> None:
    """Warn of runs that were meant for another store, where `tracker.uri=` was left out by mistake."""
    store = tracker.get_location().get("store")
    others = Counter(record.tracking["store"] for record in records if record.tracking)
    for other, count in others.items():
        if other != store:
            runs = count_noun(count, "run", "were")
            log.warning("%s meant for %s; the upload goes to %s; tracker.uri= chooses", runs, other, store)


def is_in_tracker(tracker: Tracker, record: Record) -> bool:
    """Whether this tracker, and not another one, has all of a run."""
    if not record.uploaded:
        return False
    return all(record.tracking.get(key) == value for key, value in tracker.get_location().items())


def download_sweep(tracker: Tracker, sweep: str, folder: Path) -> None:
    """Download the runs of a sweep, each into a folder of its own.

    Args:
        tracker: to download from.
        sweep: its tag.
        folder: gets a folder for each run.

    Raises:
        ConfigError: when the tracker knows no such sweep.
    """
    run_ids = tracker.find_sweep_runs(sweep)
    if not run_ids:
        view_hint = tracker.get_view_hint()
        reason = "tracker=none keeps no runs"
        if view_hint:
            reason = f"the tracker has no run with this tag; its page shows the tags, {view_hint}"
        raise ConfigError(f"task.sweep={sweep}: {reason}")
    for run_id in run_ids:
        tracker.download_run(run_id, folder / run_id)


def format_title(records: Sequence[Record], folder: Path) -> str:
    """Name the sweep that all runs belong to, else the folder; and how many runs or jobs there are."""
    sweeps = {record.sweep for record in records}
    manifest = read_manifest(folder)
    if manifest is not None and sweeps == {manifest.id}:
        finished = sum(record.state == FINISHED for record in records)
        if finished >= manifest.jobs:
            return f"sweep {manifest.id}"
        return (
            f"sweep {manifest.id}, {finished} of {count_noun(manifest.jobs, 'job')}; "
            "its command with resume=true runs the rest"
        )
    name = folder.name or "runs"
    if len(sweeps) == 1:
        (sweep,) = sweeps
        if sweep:
            name = f"sweep {sweep}"
    return f"{name}, {count_noun(len(records), 'run')}"
