"""What a tracker is, and the one that keeps nothing.

A job is logged from its output folder, so a store that is away loses nothing: the same folder can be uploaded
later.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from int8run.tracking.run_record import Record


class Tracker(Protocol):
    """A frozen dataclass with the tracker's settings.

    All methods but `get_location` and `get_view_hint` may raise TrackingError: the store does not answer.
    """

    def prepare(self) -> None:
        """Create what is missing in the store, and close the runs of this machine whose process is gone.

        Called once per command, before any job.

        Raises:
            ConfigError: a store that these settings cannot use.
        """
        ...

    def start_run(self, record: Record) -> str | None:
        """Open a run for a job that starts.

        Returns:
            Its id.
        """
        ...

    def upload_record(self, record: Record) -> str | None:
        """Log everything that the record's folder holds; the run ends as the record did.

        What was logged already is not logged again.

        Returns:
            The run's id: the record's own, or that of a new run.
        """
        ...

    def find_finished(self, hashes: Iterable[str]) -> dict[str, str]:
        """Find out which jobs are done.

        Args:
            hashes: of the configs of the jobs.

        Returns:
            By hash the id of the newest run with that config that finished.
        """
        ...

    def find_running(self, sweep: str) -> dict[str, int]:
        """The open runs of a sweep: number of the job by id of the run."""
        ...

    def end_run(self, run_id: str, state: str, error: str) -> None:
        """End a run whose worker can no longer do it. A run that has ended stays as it is."""
        ...

    def find_sweep_runs(self, sweep: str) -> list[str]:
        """Ids of a sweep's runs, in the order in which they started."""
        ...

    def download_run(self, run_id: str, folder: Path) -> None:
        """Bring the files of a run back, as its output folder had them; `read_record` reads it."""
        ...

    def share_sweep(self, sweep: str, records: Sequence[Record]) -> str | None:
        """Keep a dashboard of a sweep.

        Returns:
            Its link.
        """
        ...

    def attach_file(self, run_id: str, path: Path) -> None:
        """Keep one more file with a run."""
        ...

    def get_location(self) -> dict[str, str]:
        """What a record keeps of where its run is: address of the store, name of the experiment."""
        ...

    def get_view_hint(self) -> str | None:
        """How to look at what was logged, in one line."""
        ...


@dataclass(frozen=True)
class NoTracker:
    """`tracker=none`: the output folder is all that is kept."""

    def prepare(self) -> None:
        """Nothing to prepare."""

    def start_run(self, record: Record) -> str | None:
        """No run."""
        return None

    def upload_record(self, record: Record) -> str | None:
        """No run."""
        return None

    def find_finished(self, hashes: Iterable[str]) -> dict[str, str]:
        """None is known."""
        return {}

    def find_running(self, sweep: str) -> dict[str, int]:
        """None is known."""
        return {}

    def end_run(self, run_id: str, state: str, error: str) -> None:
        """No run to end."""

    def find_sweep_runs(self, sweep: str) -> list[str]:
        """None is known."""
        return []

    def download_run(self, run_id: str, folder: Path) -> None:
        """No run to download."""

    def share_sweep(self, sweep: str, records: Sequence[Record]) -> str | None:
        """No dashboard."""
        return None

    def attach_file(self, run_id: str, path: Path) -> None:
        """No run to keep a file with."""

    def get_location(self) -> dict[str, str]:
        """Nowhere."""
        return {}

    def get_view_hint(self) -> str | None:
        """Nowhere."""
        return None
