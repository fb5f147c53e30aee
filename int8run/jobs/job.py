"""From a composed config and hydra's part of it to a `Job`, which says where the settings came from."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.logging import RichHandler

from int8run.config.compose import get_plain_config
from int8run.config.job import Job
from int8run.jobs.manifest import SweepManifest, read_manifest
from int8run.report.console import ConsoleHandler


def make_job(config: Any, hydra_config: Any, output_dir: Path) -> Job:
    """Describe one job.

    Args:
        config: the composed config.
        hydra_config: hydra's part of it.
        output_dir: folder that the job writes to.
    """
    options = {}
    for group, option in hydra_config.runtime.choices.items():
        is_hydras_own = "/" in group or "@" in group  # hydra/launcher, hydra/job_logging@...
        if not is_hydras_own:
            options[group] = option
    job = Job(
        settings=get_plain_config(config),
        choices=options,
        overrides=list(hydra_config.overrides.task),
        output_dir=output_dir,
    )
    manifest = read_sweep_manifest(hydra_config)
    if manifest is None:
        return job
    return replace(
        job,
        sweep=manifest.id,
        number=int(hydra_config.job.num),
        varying=manifest.varying,
        jobs_at_once=manifest.jobs_at_once,
    )


def read_sweep_manifest(hydra_config: Any) -> SweepManifest | None:
    """Read the manifest of the sweep that a job belongs to; None for a single run.

    A sweep that another program started through hydra has no sweep.json; its folder's name identifies it.
    """
    is_sweep = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    if not is_sweep:
        return None
    folder = Path(str(hydra_config.sweep.dir))
    return read_manifest(folder) or SweepManifest(folder.name)


def quiet_console() -> None:
    """Let a sweep's job log to its file alone.

    The parent prints how each job ended, and at the end each warning once.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ConsoleHandler | RichHandler):
            handler.setLevel(logging.CRITICAL)
