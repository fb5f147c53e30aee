"""From a composed config to what the record says of a job."""

from pathlib import Path
from typing import Any

from int8run.config.compose import plain_config
from int8run.config.job import Job
from int8run.jobs.manifest import SweepManifest, read_manifest


def make_job(config: Any, hydra: Any, output_dir: Path) -> Job:
    """The words that a job's settings came from.

    Args:
        config: the composed config.
        hydra: hydra's part of it.
    """
    in_sweep = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    sweep = (
        (read_manifest(Path(str(hydra.sweep.dir))) or SweepManifest(Path(str(hydra.sweep.dir)).name))
        if in_sweep
        else None
    )
    return Job(
        settings=plain_config(config),
        choices={
            group: option
            for group, option in hydra.runtime.choices.items()
            if "/" not in group and "@" not in group
        },
        overrides=list(hydra.overrides.task),
        output_dir=output_dir,
        sweep=sweep.id if sweep else None,
        number=int(hydra.job.num) if sweep else 0,
        varying=sweep.varying if sweep else (),
        jobs_at_once=sweep.jobs_at_once if sweep else 1,
    )
