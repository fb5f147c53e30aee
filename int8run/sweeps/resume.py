"""`resume=true`: where the sweep is that goes on."""

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from int8run.errors import ConfigError
from int8run.precheck import plain_config
from int8run.record import config_hash, find_records
from int8run.sweeps.sweep import SWEEP, Sweep, dated, read_sweep

log = logging.getLogger(__name__)


def resumed(configs: Sequence[Any], multirun: bool) -> list[str]:
    """The words to add to a command line with `resume=true`, so that hydra goes on in the folder of the sweep that was stopped.

    Args:
        configs: of all jobs, composed, hydra's part included.
        multirun: the command line says so; a config can say it, too.

    Raises:
        ConfigError: for a single run.
    """
    if not configs[0].get("resume"):
        return []
    mode = configs[0].hydra.mode
    if not multirun and (mode is None or mode.name != "MULTIRUN"):
        raise ConfigError("resume=true goes on with a sweep, and this is a single run; add -m, or leave resume out")
    if any(word.startswith("hydra.sweep.dir=") for word in configs[0].hydra.overrides.hydra):
        return []
    hashes = {config_hash(plain_config(config)) for config in configs}
    new = Path(str(configs[0].hydra.sweep.dir)).absolute()
    root = new.parents[1] if dated(new) else new.parent
    folder = sweep_to_resume(root, hashes)
    if folder is None:
        log.warning("resume=true: no sweep in %s has one of these jobs; those that the tracker knows as finished are left out", root)
        return []
    return [f"hydra.sweep.dir={folder}"]


def sweep_to_resume(root: Path, hashes: Collection[str]) -> Path | None:
    """The folder of the newest sweep below `root` that has one of the jobs with these config hashes."""
    found = sorted(sweeps_below(root), key=lambda pair: pair[1].created, reverse=True)
    return next((folder for folder, _ in found if any(r.config_hash in hashes for r in find_records(folder))), None)


def sweeps_below(root: Path) -> Iterator[tuple[Path, Sweep]]:
    """Every sweep in a folder and below it."""
    for path in sorted(root.rglob(SWEEP)):
        sweep = read_sweep(path.parent)
        if sweep is not None:
            yield path.parent, sweep
