"""Jobs that a task starts while it runs, in batches: those of one sweep, on the launcher of the command.

`task=search` decides after each batch what the next one is, so its jobs are no command line with commas. Each
is a run of the ordinary kind all the same: composed from overrides, in a folder of its own, with a record,
and in the tracker under the tag of their sweep.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from int8run.config.compose import create_run_spec, get_plain_config
from int8run.config.config_safety import check_targets
from int8run.config.run_spec import RunSpec
from int8run.jobs.base import Pool
from int8run.jobs.execute import execute_job, prepare_tracker
from int8run.jobs.finalize import share_dashboard, upload_if_missing, write_page
from int8run.jobs.job import make_job, quiet_console
from int8run.jobs.manifest import SweepManifest, make_sweep_id, read_manifest, write_manifest
from int8run.jobs.plan import check_not_running, plan_jobs
from int8run.jobs.sweep import SweepRun
from int8run.report.console import print_lines
from int8run.tracking.run_record import FINISHED, Record, hash_config, try_read_record

log = logging.getLogger(__name__)


def run_batch_job(config: Any) -> float | None:
    """Run one job of a batch. Launchers call this in other processes, too.

    Args:
        config: composed.
    """
    hydra_config = HydraConfig.get()
    job = make_job(config, hydra_config, Path(hydra_config.runtime.output_dir))
    quiet_console()
    return execute_job(create_run_spec(config), job)


class JobBatches:
    """Composes jobs beside the one that runs, and runs them.

    Args:
        folder: absolute; gets the jobs' folders and sweep.json. That of an earlier start keeps its identity.
        varying: keys in which the jobs differ.
    """

    def __init__(self, folder: Path, varying: Sequence[str]):
        self.folder = folder
        # of the job that runs: where options come from, the overrides of hydra's own settings, its log
        self.parent: Any = HydraConfig.instance().cfg
        self.loader = make_loader(self.parent.hydra.runtime.config_sources)
        earlier = read_manifest(folder)
        self.manifest = earlier or SweepManifest(
            id=make_sweep_id(folder.parent), varying=tuple(varying), created=time.time()
        )
        self.records: dict[int, Record] = {}

    def compose(self, overrides: Sequence[str], number: int = 0) -> DictConfig:
        """Compose the config of a job.

        Args:
            overrides: all of them, not only what differs.
            number: of the job; the name of its folder.
        """
        config: DictConfig = self.loader.load_sweep_config(self.parent, list(overrides))
        with read_write(config), open_dict(config):
            config.hydra.mode = RunMode.MULTIRUN
            config.hydra.sweep.dir = str(self.folder)
            config.hydra.sweep.subdir = str(number)
            config.hydra.job.num = number
            config.hydra.job.id = str(number)
        # the address may come from this process's environment, which other machines do not have
        OmegaConf.resolve(config.tracker)
        return config

    def create_spec(self, overrides: Sequence[str]) -> RunSpec:
        """Compose and check a job without running it.

        Raises:
            ConfigError: it cannot work.
        """
        config = self.compose(overrides)
        check_targets(config)
        spec: RunSpec = create_run_spec(config)
        return spec

    @property
    def jobs_at_once(self) -> int:
        """How many jobs the launcher of the command runs at once on one machine."""
        return self.make_pool(self.parent).jobs_at_once

    def make_context(self) -> HydraContext:
        """What hydra needs to run a job."""
        return HydraContext(config_loader=self.loader, callbacks=Callbacks(self.parent))

    def make_pool(self, config: Any) -> Pool:
        """The pool of `hydra/launcher=`.

        Args:
            config: hydra's part of it says which.
        """
        launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=self.make_context(), task_function=run_batch_job, config=config
        )
        pool: Pool = launcher.pool
        return pool

    def run(self, jobs: Mapping[int, Sequence[str]]) -> dict[int, Record]:
        """Run jobs, each into the folder of its number; one that is finished there is not run again.

        A run with other settings, such as the confirmation of an earlier start, makes room for it.

        Args:
            jobs: number -> all overrides.

        Returns:
            The record of each: finished, failed or killed.

        Raises:
            ConfigError: a job still runs in its folder, started by another process.
        """
        found: dict[int, Record] = {}
        for number, overrides in jobs.items():
            record = try_read_record(self.folder / str(number))
            if record is None:
                continue
            check_not_running(record)
            if record.state == FINISHED and record.config_hash == self.hash_job(overrides, number):
                found[number] = record
        missing = {number: overrides for number, overrides in jobs.items() if number not in found}
        if missing:
            found |= self.run_missing(missing)
        self.records |= found
        return {number: found[number] for number in jobs}

    def hash_job(self, overrides: Sequence[str], number: int) -> str:
        """The hash that the record of a job with these overrides has."""
        return hash_config(get_plain_config(self.compose(overrides, number)))

    def run_missing(self, jobs: Mapping[int, Sequence[str]]) -> dict[int, Record]:
        """Run jobs whose folders have no finished run; see `run`."""
        configs = [self.compose(overrides, number) for number, overrides in jobs.items()]
        specs = [create_run_spec(config) for config in configs]
        write_manifest(self.folder, self.manifest)
        planned = plan_jobs(self.folder, configs, specs, resume=False)
        for tracker in {p.spec.tracker for p in planned if p.spec.task.tracked}:
            prepare_tracker(tracker)
        sweep = SweepRun(self.folder, self.manifest, planned, finished={})
        try:
            sweep.run_jobs(self.make_pool(configs[0]), self.make_context(), run_batch_job)
        finally:
            self.restore_log()
        # the largest of all batches: a batch of one job shares the machine with nobody
        most = max(self.manifest.jobs_at_once, sweep.manifest.jobs_at_once)
        self.manifest = replace(sweep.manifest, jobs_at_once=most)
        return dict(sweep.records)

    def restore_log(self) -> None:
        """Log to the file of the job that runs again: a job of a batch in this process had its own."""
        hydra_config = HydraConfig.instance()
        hydra_config.cfg = self.parent
        configure_log(self.parent.hydra.job_logging, self.parent.hydra.verbose)

    def finish(self, tracker: Any, page: Path) -> None:
        """Write the page that compares all jobs, upload what is missing, and make the tracker's dashboard.

        Args:
            tracker: of the jobs.
            page: the HTML file.
        """
        records = [upload_if_missing(record, tracker) for record in self.records.values()]
        if not records:
            return
        write_page(records, page, self.manifest)
        uploaded = [record for record in records if record.uploaded]
        if uploaded:
            view_hint = share_dashboard(tracker, self.manifest, uploaded, page)
            if view_hint:
                print_lines(f"runs:     {view_hint}")


def make_loader(sources: Sequence[Any]) -> ConfigLoaderImpl:
    """A loader of hydra that looks where the command's own does, `--config-dir` included.

    Args:
        sources: of `hydra.runtime.config_sources`.
    """
    search_path = ConfigSearchPathImpl()
    for source in sources:
        search_path.append(provider=source.provider, path=f"{source.schema}://{source.path}")
    return ConfigLoaderImpl(config_search_path=search_path)
