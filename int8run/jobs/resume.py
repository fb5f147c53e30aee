"""`resume=true`: find the folder of the sweep or the search that goes on.

Called by the launcher of `jobs.hydra_plugins` before `jobs.plan` looks for finished jobs in that folder, and
by `cli` for a search.
Imports nothing heavy: a sweep whose settings are wrong ends before torch is loaded.
"""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.config.compose import get_plain_config
from int8run.errors import FileError
from int8run.jobs.folders import RUN_SETTING
from int8run.jobs.manifest import MANIFEST_FILE, SweepManifest, is_dated_folder, read_manifest
from int8run.tracking.run_record import find_records, hash_config
from int8run.tracking.setting_names import split_override

log = logging.getLogger(__name__)
SEARCH_FILE = "search.json"  # of a search, in its folder
# what may change while a search goes on: what is asked of its trials, and how they are shown and kept
GOAL_SETTINGS = frozenset({"quality_db", "task.minimise", "task.n_trials", "task.batch", "task.confirm"})
KEPT_ELSEWHERE = frozenset({"resume", "progress", "tracker", "cache"})


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep or a search writes to.

    Args:
        path: absolute.
        goes_on: whether the one that is there is resumed; False: a folder for a new one.
    """

    path: Path
    goes_on: bool


def find_sweep_folder(configs: Sequence[Any]) -> SweepFolder:
    """Find the folder that a sweep writes to.

    Args:
        configs: of all jobs, composed, hydra's part included.

    Returns:
        A new folder; with `resume=true` that of the sweep that goes on, or the one that the user names.
    """
    first = configs[0]
    new = Path(str(first.hydra.sweep.dir)).absolute()
    hydra_overrides = first.hydra.overrides.hydra
    is_named_by_user = any(override.startswith("hydra.sweep.dir=") for override in hydra_overrides)
    if not first.get("resume"):
        return SweepFolder(new, goes_on=False)
    if is_named_by_user:
        return SweepFolder(new, goes_on=(new / MANIFEST_FILE).exists())
    root = new.parents[1] if is_dated_folder(new) else new.parent
    hashes = {hash_config(get_plain_config(config)) for config in configs}
    earlier = find_sweep_to_resume(root, hashes)
    if earlier is not None:
        return SweepFolder(earlier, goes_on=True)
    log.warning(
        "resume=true: no sweep in %s has one of these jobs; "
        "only jobs that the tracker knows as finished are left out",
        root,
    )
    # another sweep of this second may be there already: it is not the one that was looked for
    return SweepFolder(new, goes_on=False)


def find_sweep_to_resume(root: Path, hashes: Collection[str]) -> Path | None:
    """Find the newest sweep below `root` that has one of the jobs with these config hashes."""
    sweeps = sorted(find_sweeps(root), key=lambda pair: pair[1].created, reverse=True)
    for folder, _ in sweeps:
        if any(record.config_hash in hashes for record in find_records(folder)):
            return folder
    return None


def find_sweeps(root: Path) -> Iterator[tuple[Path, SweepManifest]]:
    """Find every sweep in a folder and below it; one whose file is damaged is left out, with a warning."""
    for path in sorted(root.rglob(MANIFEST_FILE)):
        try:
            manifest = read_manifest(path.parent)
        except FileError as error:
            log.warning("%s; it is left out", error)
            continue
        if manifest is not None:
            yield path.parent, manifest


# -- a search ----------------------------------------------------------------------------------------


def find_search_folder(config: Any, new: Path) -> SweepFolder:
    """Find the folder that a search writes to.

    Args:
        config: composed, hydra's part included.
        new: of a search that begins.

    Returns:
        A new folder; with `resume=true` that of the newest search of the same command, or the one that the
            user names.
    """
    if not config.get("resume"):
        return SweepFolder(new, goes_on=False)
    is_named_by_user = any(word.startswith(f"{RUN_SETTING}=") for word in config.hydra.overrides.hydra)
    if is_named_by_user:
        return SweepFolder(new, goes_on=(new / SEARCH_FILE).exists())
    root = new.parents[1] if is_dated_folder(new) else new.parent
    command = list_lasting_overrides(list(config.hydra.overrides.task))
    files = sorted(root.rglob(SEARCH_FILE), key=lambda path: path.stat().st_mtime, reverse=True)
    for file in files:
        if read_command(file) == command:
            return SweepFolder(file.parent, goes_on=True)
    log.warning("resume=true: no search in %s has these settings; a new one begins", root)
    return SweepFolder(new, goes_on=False)


def list_lasting_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides that a search may not change when it goes on, in one order."""
    lasting = []
    for override in overrides:
        key = split_override(override)[0]
        if key not in GOAL_SETTINGS and key.partition(".")[0] not in KEPT_ELSEWHERE:
            lasting.append(override)
    return sorted(lasting)


def read_command(file: Path) -> list[str] | None:
    """The lasting overrides of a search; None, with a warning, where its file is damaged."""
    try:
        command: list[str] = json.loads(file.read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged and is left out: %s", file, error)
        return None
    return command
