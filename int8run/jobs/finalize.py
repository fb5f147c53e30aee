"""The end of a sweep: the last uploads, one table, one page and one dashboard that compare the jobs.

Called by `jobs.sweep` once all jobs have ended.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from int8run.errors import TrackingError
from int8run.jobs.execute import build_sync_command, explain_file_error, upload_record
from int8run.jobs.manifest import SweepManifest
from int8run.report.console import print_lines
from int8run.report.difference_table import describe_tables
from int8run.report.html_page import write_report
from int8run.report.runs import name_runs, select_measured
from int8run.report.sweep_table import build_sweep_table, count_warnings
from int8run.report.verdict import Recommendation, recommend
from int8run.tracking.base import Tracker
from int8run.tracking.run_record import Record

log = logging.getLogger(__name__)
REPORT_FILE = "report.html"


def finalize_sweep(
    folder: Path, manifest: SweepManifest, records: Sequence[Record], trackers: Mapping[int, Tracker]
) -> None:
    """Make one page and one dashboard of a sweep's jobs, and print where they are.

    Args:
        folder: of the sweep.
        manifest: its identity.
        records: of all jobs.
        trackers: of the tracked jobs, by number.
    """
    records = [upload_if_missing(record, trackers.get(record.number)) for record in records]
    for line in count_warnings(records):
        log.warning("%s", line)
    print_lines(build_sweep_table(records, manifest.varying))
    # once for the terminal and the page: all pairs of settings are compared for it
    found = recommend_setting(records)
    if found is not None:
        print_lines(*describe_tables(found.differences), found.verdict)
    page = folder / REPORT_FILE
    write_page(records, page, manifest, found)
    for tracker in dict.fromkeys(trackers.values()):
        uploaded = [r for r in records if r.uploaded and trackers.get(r.number) == tracker]
        if not uploaded:
            continue
        view_hint = share_dashboard(tracker, manifest, uploaded, page)
        if view_hint:
            print_lines(f"runs:     {view_hint}")


def recommend_setting(records: Sequence[Record]) -> Recommendation | None:
    """Which differences between the jobs are real, and what follows; None of fewer than two."""
    runs = name_runs(records)
    if len(select_measured(runs)) < 2:
        return None
    return recommend(runs)


def write_page(
    records: Sequence[Record], page: Path, manifest: SweepManifest, found: Recommendation | None = None
) -> None:
    """Write the page that compares the jobs, and print where it is; where it cannot be written, log why.

    Args:
        records: of all jobs.
        page: the file.
        manifest: identity of the sweep.
        found: what the jobs recommend, where that is known.
    """
    try:
        write_report(records, page, f"sweep {manifest.id}", recommendation=found)
    except OSError as error:
        log.error("%s", explain_file_error(error))
    else:
        print_lines(f"report:   {page}")


def upload_if_missing(record: Record, tracker: Tracker | None) -> Record:
    """Upload a record that its tracker does not have, such as that of a job whose worker was killed."""
    if tracker is None or record.uploaded:
        return record
    return upload_record(tracker, record)


def share_dashboard(
    tracker: Tracker, manifest: SweepManifest, records: Sequence[Record], page: Path
) -> str | None:
    """Let a tracker attach the page to the first run and write a dashboard of the sweep.

    Args:
        tracker: has all of `records`.
        manifest: identity of the sweep.
        records: of its jobs; at least one.
        page: the report.

    Returns:
        Where to look at it, if the tracker has a place for that.
    """
    try:
        if page.is_file():
            tracker.attach_file(str(records[0].run_id), page)
        return tracker.share_sweep(manifest.id, records)
    except TrackingError as error:
        log.warning(
            "%s; the sweep has no dashboard; to make it later: %s",
            error,
            build_sync_command(records[0], page.parent),
        )
        return None
