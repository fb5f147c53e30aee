"""What a tracker is, and the one that keeps nothing."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL.Image import Image


class TrackedRun(Protocol):
    """One open run."""

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Final values by name."""
        ...

    def log_series(self, name: str, values: Sequence[float]) -> None:
        """One value per step."""
        ...

    def log_image(self, key: str, image: Image) -> None:
        """A picture; equal keys line up across runs."""
        ...

    def log_file(self, path: Path) -> None:
        """Keep a file with the run."""
        ...


class Tracker(Protocol):
    """A frozen dataclass with the tracker's settings."""

    def start(self, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> AbstractContextManager[TrackedRun]:
        """Open a run; it ends as finished, or as failed when an error passes."""
        ...

    def where(self) -> str | None:
        """How to look at what was logged, in one line."""
        ...


class UntrackedRun:
    """Takes everything and keeps nothing."""

    def log_metrics(self, metrics: Mapping[str, float]) -> None: ...

    def log_series(self, name: str, values: Sequence[float]) -> None: ...

    def log_image(self, key: str, image: Image) -> None: ...

    def log_file(self, path: Path) -> None: ...


@dataclass(frozen=True)
class NoTracker:
    """`tracker=none`: the output folder is all there is."""

    def start(self, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> AbstractContextManager[TrackedRun]:
        """A run that keeps nothing."""
        return nullcontext(UntrackedRun())

    def where(self) -> str | None:
        """Nowhere."""
        return None
