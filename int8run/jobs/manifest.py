"""The identity of a sweep: sweep.json in its folder, read by every job and by whoever goes on with it."""

import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from int8run.errors import FileError
from int8run.tracking.run_record import split_override

MANIFEST_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepManifest:
    """What the jobs of one sweep share.

    Args:
        id: the tag of its runs; no other sweep has it.
        varying: keys that are not the same in all jobs.
        jobs: how many there are.
        jobs_at_once: how many jobs may share a machine.
        created: Unix time in seconds.
    """

    id: str
    varying: Sequence[str] = ()
    jobs: int = 0
    jobs_at_once: int = 1
    created: float = 0.0


def read_manifest(folder: Path) -> SweepManifest | None:
    """The sweep of a folder; None when it is none.

    Raises:
        FileError: when its file is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        return SweepManifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error}") from error


def write_manifest(folder: Path, sweep: SweepManifest) -> None:
    """Write sweep.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{MANIFEST_FILE}.{os.getpid()}.new"
    new.write_text(json.dumps(asdict(sweep), indent=2) + "\n")
    os.replace(new, folder / MANIFEST_FILE)


def make_sweep_id(folder: Path) -> str:
    """The end of the folder's path and four random characters: `2026-11-21_22-30-00-a3f9`."""
    name = f"{folder.parent.name}_{folder.name}" if is_dated_folder(folder) else folder.name
    return f"{name}-{secrets.token_hex(2)}"


def is_dated_folder(folder: Path) -> bool:
    """Whether a folder is one of the default names: `multirun/2026-11-21/22-30-00`."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", f"{folder.parent.name}/{folder.name}") is not None


def find_varying_keys(jobs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Keys whose words differ between jobs, in the order of the command line."""
    words = [dict(map(split_override, job)) for job in jobs]
    keys = dict.fromkeys(key for job in words for key in job)
    return tuple(key for key in keys if len({job.get(key) for job in words}) > 1)


def now() -> float:
    """Unix time in seconds."""
    return time.time()
