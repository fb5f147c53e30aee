"""The end of a sweep: what no tracker has is uploaded, one page and one dashboard compare the jobs, one table names them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from int8run.errors import TrackingError, disk_full, not_writable
from int8run.jobs.execute import sync_command, upload
from int8run.jobs.manifest import Sweep
from int8run.report.console import say, sweep_table, warnings_of
from int8run.report.html_page import write_report
from int8run.tracking.base import Tracker
from int8run.tracking.run_record import Record

log = logging.getLogger(__name__)
REPORT = "report.html"


def finish(folder: Path, sweep: Sweep, records: Sequence[Record], trackers: Mapping[int, Tracker]) -> None:
    """Make one page and one dashboard of a sweep's jobs, and say where they are.

    Args:
        trackers: of the tracked jobs, by number.
    """
    records = [
        upload(trackers[r.number], r) if r.number in trackers and not r.uploaded else r for r in records
    ]
    page = folder / REPORT
    for line in warnings_of(records):
        log.warning("%s", line)
    say(sweep_table(records, sweep.varying))
    try:
        write_report(records, page, f"sweep {sweep.id}")
    except OSError as error:
        log.error("%s", disk_full(error) or not_writable(error) or error)
    else:
        say(f"report:   {escape(str(page))}")
    for tracker in dict.fromkeys(trackers.values()):
        theirs = [r for r in records if trackers.get(r.number) == tracker and r.uploaded]
        if theirs:
            say(*(f"runs:     {escape(line)}" for line in share(tracker, sweep, theirs, page)))


def share(tracker: Tracker, sweep: Sweep, records: Sequence[Record], page: Path) -> list[str]:
    """Keep the page with the first run and write the dashboard; where to look."""
    try:
        if page.is_file():
            tracker.attach(str(records[0].run_id), page)
        link = tracker.share(sweep.id, records)
    except TrackingError as error:
        log.warning(
            "%s; the sweep has no dashboard; this makes it: %s", error, sync_command(records[0], page.parent)
        )
        return []
    return [line for line in (link,) if line]
