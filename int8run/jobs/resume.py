"""`resume=true`: find the folder of the sweep that goes on.

Called by the launcher of `jobs.hydra_plugins` before `jobs.plan` looks for finished jobs in that folder.
Imports nothing heavy: a sweep whose settings are wrong ends before torch is loaded.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.config.compose import get_plain_config
from int8run.errors import FileError
from int8run.jobs.manifest import MANIFEST_FILE, SweepManifest, is_dated_folder, read_manifest
from int8run.tracking.run_record import find_records, hash_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep writes to.

    Args:
        path: absolute.
        goes_on: whether a sweep that is there is resumed; False: a folder for a new one.
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
