"""`resume=true`: where the sweep is that goes on."""

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from int8run.config.compose import plain_config
from int8run.errors import FileError
from int8run.jobs.manifest import MANIFEST_FILE, SweepManifest, is_dated_folder, read_manifest
from int8run.tracking.run_record import find_records, hash_config

log = logging.getLogger(__name__)


def find_sweep_folder(configs: Sequence[Any]) -> Path:
    """Where a sweep writes, absolute: with `resume=true` the folder of the sweep that was stopped, unless the user names one.

    Args:
        configs: of all jobs, composed, hydra's part included.
    """
    new = Path(str(configs[0].hydra.sweep.dir)).absolute()
    named = any(word.startswith("hydra.sweep.dir=") for word in configs[0].hydra.overrides.hydra)
    if not configs[0].get("resume") or named:
        return new
    root = new.parents[1] if is_dated_folder(new) else new.parent
    earlier = find_sweep_to_resume(root, {hash_config(plain_config(config)) for config in configs})
    if earlier is None:
        log.warning(
            "resume=true: no sweep in %s has one of these jobs; those that the tracker knows as finished are left out",
            root,
        )
    return earlier or new


def find_sweep_to_resume(root: Path, hashes: Collection[str]) -> Path | None:
    """The folder of the newest sweep below `root` that has one of the jobs with these config hashes."""
    found = sorted(find_sweeps(root), key=lambda pair: pair[1].created, reverse=True)
    return next(
        (folder for folder, _ in found if any(r.config_hash in hashes for r in find_records(folder))), None
    )


def find_sweeps(root: Path) -> Iterator[tuple[Path, SweepManifest]]:
    """Every sweep in a folder and below it; one whose file is damaged is left out, with a warning."""
    for path in sorted(root.rglob(MANIFEST_FILE)):
        try:
            sweep = read_manifest(path.parent)
        except FileError as error:
            log.warning("%s; it is left out", error)
            continue
        if sweep is not None:
            yield path.parent, sweep
