"""The identity of a sweep: sweep.json in its folder.

The parent writes it before the first job starts; every job reads it, and so do `resume=true` and
`task=report`.
"""

import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from int8run.errors import FileError
from int8run.tracking.setting_names import find_varying_keys, replace_unusual, split_override

MANIFEST_FILE = "sweep.json"
MAX_NAME_LENGTH = 100  # of a folder's name in the id of its sweep
# hydra's default, `multirun/2026-11-21/22-30-00`; `22-30-00-2` is the second of that second
DATED_FOLDER = re.compile(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d(-\d+)?")


@dataclass(frozen=True)
class SweepManifest:
    """What the jobs of one sweep share.

    Args:
        id: tag of the sweep's runs in the tracker; no other sweep has it.
        varying: keys that are not the same in all jobs.
        jobs: number of jobs.
        jobs_at_once: how many jobs may share a machine.
        created: Unix time in seconds.
    """

    id: str
    varying: Sequence[str] = ()
    jobs: int = 0
    jobs_at_once: int = 1
    created: float = 0.0


def read_manifest(folder: Path) -> SweepManifest | None:
    """Read the manifest of a sweep's folder; None when the folder has none.

    Raises:
        FileError: when the file is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        return SweepManifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error}") from error


def write_manifest(folder: Path, manifest: SweepManifest) -> None:
    """Write sweep.json, whole or not at all: a job may read it at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{MANIFEST_FILE}.{os.getpid()}.new"
    new.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    os.replace(new, folder / MANIFEST_FILE)


def make_sweep_id(folder: Path) -> str:
    """Return the end of the folder's path and random characters: `2026-11-21_22-30-00-a3f9`.

    Only characters that every tracker takes in a name and in a filter: `lr=1,x=[2]` becomes `lr-1-x-2`.
    """
    name = f"{folder.parent.name}_{folder.name}" if is_dated_folder(folder) else folder.name
    plain_name = replace_unusual(name).strip("-")[:MAX_NAME_LENGTH].strip("-")
    return f"{plain_name or 'sweep'}-{secrets.token_hex(2)}"


def is_dated_folder(folder: Path) -> bool:
    """Whether a folder has one of the default names: `multirun/2026-11-21/22-30-00`."""
    return DATED_FOLDER.fullmatch(f"{folder.parent.name}/{folder.name}") is not None


def find_varying_overrides(jobs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Find the keys whose values differ between jobs.

    Args:
        jobs: the overrides of each job.

    Returns:
        The keys, in the order of the command line.
    """
    values_by_key = []  # of each job
    for overrides in jobs:
        values_by_key.append(dict(split_override(override) for override in overrides))
    return tuple(find_varying_keys(values_by_key))
