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
from int8run.tracking.run_record import key_and_value

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Sweep:
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


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep of a folder; None when it is none.

    Raises:
        FileError: when its file is damaged.
    """
    path = folder / SWEEP
    if not path.is_file():
        return None
    try:
        return Sweep(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error}") from error


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write sweep.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{SWEEP}.{os.getpid()}.new"
    new.write_text(json.dumps(asdict(sweep), indent=2) + "\n")
    os.replace(new, folder / SWEEP)


def new_id(folder: Path) -> str:
    """The end of the folder's path and four random characters: `2026-11-21_22-30-00-a3f9`."""
    name = f"{folder.parent.name}_{folder.name}" if dated(folder) else folder.name
    return f"{name}-{secrets.token_hex(2)}"


def dated(folder: Path) -> bool:
    """Whether a folder is one of the default names: `multirun/2026-11-21/22-30-00`."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", f"{folder.parent.name}/{folder.name}") is not None


def varying_keys(jobs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Keys whose words differ between jobs, in the order of the command line."""
    words = [dict(map(key_and_value, job)) for job in jobs]
    keys = dict.fromkeys(key for job in words for key in job)
    return tuple(key for key in keys if len({job.get(key) for job in words}) > 1)


def now() -> float:
    """Unix time in seconds."""
    return time.time()
