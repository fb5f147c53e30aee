"""Hydra's side of a sweep: a sweeper that splits the overrides into jobs, and a launcher for each pool.

`cli` registers both with hydra, which makes them from `hydra/sweeper=` and `hydra/launcher=`.
"""

import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from int8run.config.sweep_checks import check_files_of_jobs, check_jobs
from int8run.jobs.base import Pool
from int8run.jobs.folders import claim_sweep_folder, read_unresolved
from int8run.jobs.hydra_files import mask_config
from int8run.jobs.launchers.in_process import InProcess
from int8run.jobs.launchers.joblib_launcher import Processes
from int8run.jobs.launchers.ray_launcher import RayCluster
from int8run.jobs.launchers.slurm_launcher import Slurm
from int8run.jobs.resume import find_sweep_folder

log = logging.getLogger(__name__)
# hydra takes plugins from modules below `hydra_plugins` only
PLUGIN_MODULE = "hydra_plugins.int8run"
POOL_CLASSES = (InProcess, Processes, RayCluster, Slurm)


class SweepLauncher(Launcher):
    """Hands the jobs of a sweep to a pool of workers; the settings of the option are those of the pool.

    Subclasses set `pool_class`, see `register_plugins`.
    """

    pool_class: ClassVar[type[Any]]

    def __init__(self, **settings: Any):
        plain = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
        self.pool: Pool = self.pool_class(**plain)  # type: ignore[arg-type]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what hydra hands to a launcher."""
        self.context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and check every job, then run them; see `jobs.sweep.run_sweep`.

        Raises:
            ConfigError: before any job starts.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            configs.append(self.compose_job(overrides, number))
        specs = check_jobs(job_overrides, configs)
        if isinstance(self.pool, InProcess | Processes):  # another machine may have other files
            check_files_of_jobs(job_overrides, configs)
        # imported after the check: it imports what jobs import
        from int8run.jobs.sweep import run_sweep

        sweep_folder = find_sweep_folder(configs)
        with claim_sweep_folder(
            sweep_folder.path,
            read_unresolved(self.config.hydra.sweep, "dir"),
            log.warning,
            goes_on=sweep_folder.goes_on,
        ) as folder:
            OmegaConf.save(mask_config(self.config), folder / "multirun.yaml")
            for config in configs:
                config.hydra.sweep.dir = str(folder)
            values = run_sweep(
                configs,
                specs,
                pool=self.pool,
                hydra_context=self.context,
                task_function=self.task_function,
            )
        return [make_job_return(config, value) for config, value in zip(configs, values, strict=True)]

    def compose_job(self, overrides: Sequence[str], number: int) -> DictConfig:
        """Compose the config of one job."""
        config: DictConfig = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = number
            config.hydra.job.id = number
        # the address may come from this process's environment, which other machines do not have
        OmegaConf.resolve(config.tracker)
        return config


class Grid(Sweeper):
    """Makes every combination of values, as hydra's own sweeper does; the launcher composes each job once.

    Args:
        params: a sweep that is written in a file: key -> values.
    """

    def __init__(self, params: dict[str, str] | None = None):
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what hydra hands to a sweeper, and make the launcher."""
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Split the overrides into jobs and hand all of them to the launcher."""
        from_file = [f"{key}={value}" for key, value in self.params.items()]
        parser = OverridesParser.create(config_loader=self.loader)
        overrides = parser.parse_overrides([*from_file, *arguments])
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        returns: Sequence[JobReturn] = self.launcher.launch(jobs, initial_job_idx=0)
        return returns


def make_job_return(config: DictConfig, value: float | None) -> JobReturn:
    """Return what hydra expects of a job that finished."""
    job_return = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.COMPLETED)
    job_return.return_value = value
    return job_return


def register_plugins() -> None:
    """Make our sweeper and launchers known to hydra.

    Hydra looks plugins up by name, in a module below `hydra_plugins`; that module is made here, unless it
    exists.
    """
    plugins = Plugins.instance()  # imports `hydra_plugins`, if another program has installed one
    if PLUGIN_MODULE in sys.modules:
        return
    classes: list[type[Any]] = [type("Grid", (Grid,), {"__module__": PLUGIN_MODULE})]
    for pool_class in POOL_CLASSES:
        attributes = {"pool_class": pool_class, "__module__": PLUGIN_MODULE}
        classes.append(type(pool_class.__name__, (SweepLauncher,), attributes))
    module = ModuleType(PLUGIN_MODULE)
    for plugin in classes:
        setattr(module, plugin.__name__, plugin)
        plugins.register(plugin)
    package_name, module_name = PLUGIN_MODULE.split(".")
    sys.modules[PLUGIN_MODULE] = module
    package = sys.modules.setdefault(package_name, ModuleType(package_name))
    if not hasattr(package, "__path__"):
        package.__path__ = []
    setattr(package, module_name, module)
