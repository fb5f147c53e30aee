"""The end of a sweep: what no tracker has is uploaded, one page and one dashboard compare the jobs, one table names them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from int8run.errors import TrackingError, as_disk_full_error, as_not_writable_error
from int8run.jobs.execute import build_sync_command, upload_record
from int8run.jobs.manifest import SweepManifest
from int8run.report.console import build_sweep_table, count_warnings, print_lines
from int8run.report.html_page import write_report
from int8run.tracking.base import Tracker
from int8run.tracking.run_record import Record

log = logging.getLogger(__name__)
REPORT_FILE = "report.html"


def finalize_sweep(
    folder: Path, sweep: SweepManifest, records: Sequence[Record], trackers: Mapping[int, Tracker]
) -> None:
    """Make one page and one dashboard of a sweep's jobs, and say where they are.

    Args:
        trackers: of the tracked jobs, by number.
    """
    records = [
        upload_record(trackers[r.number], r) if r.number in trackers and not r.uploaded else r
        for r in records
    ]
    page = folder / REPORT_FILE
    for line in count_warnings(records):
        log.warning("%s", line)
    print_lines(build_sweep_table(records, sweep.varying))
    try:
        write_report(records, page, f"sweep {sweep.id}")
    except OSError as error:
        log.error("%s", as_disk_full_error(error) or as_not_writable_error(error) or error)
    else:
        print_lines(f"report:   {escape(str(page))}")
    for tracker in dict.fromkeys(trackers.values()):
        theirs = [r for r in records if trackers.get(r.number) == tracker and r.uploaded]
        if theirs:
            print_lines(
                *(f"runs:     {escape(line)}" for line in share_dashboard(tracker, sweep, theirs, page))
            )


def share_dashboard(
    tracker: Tracker, sweep: SweepManifest, records: Sequence[Record], page: Path
) -> list[str]:
    """Keep the page with the first run and write the dashboard; where to look."""
    try:
        if page.is_file():
            tracker.attach_file(str(records[0].run_id), page)
        link = tracker.share_sweep(sweep.id, records)
    except TrackingError as error:
        log.warning(
            "%s; the sweep has no dashboard; this makes it: %s",
            error,
            build_sync_command(records[0], page.parent),
        )
        return []
    return [line for line in (link,) if line]
