"""Hydra's side of a sweep: how words become jobs, and the launchers that `hydra/launcher=` chooses between."""

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

from int8run.config.compose import check_jobs
from int8run.jobs.base import Pool
from int8run.jobs.launchers.in_process import InProcess
from int8run.jobs.launchers.joblib_launcher import Processes
from int8run.jobs.launchers.ray_launcher import RayCluster
from int8run.jobs.launchers.slurm_launcher import Slurm
from int8run.jobs.resume import find_sweep_folder

# hydra takes launchers from modules below `hydra_plugins` only
PLUGIN_MODULE = "hydra_plugins.int8run"
POOL_CLASSES = (InProcess, Processes, RayCluster, Slurm)


class SweepLauncher(Launcher):
    """Hands the jobs of a sweep to a pool of workers. The settings of the option are those of the pool."""

    pool_class: ClassVar[type[Any]]

    def __init__(self, **settings: Any):
        plain = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
        self.pool: Pool = self.pool_class(**plain)  # type: ignore[arg-type]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What hydra hands to a launcher."""
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and check every job, then run them; see `conduct.conduct`.

        Raises:
            ConfigError: before any job starts.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = [self.compose(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        check_jobs(job_overrides, configs)
        from int8run.jobs.sweep import run_sweep  # imports what jobs import

        folder = find_sweep_folder(configs)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        for config in configs:
            config.hydra.sweep.dir = str(folder)
        values = run_sweep(configs, self.pool, self.context, self.task_function)
        return [make_job_return(config, value) for config, value in zip(configs, values, strict=True)]

    def compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        """The config of one job, with an address of the tracker that means the same in every process."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        OmegaConf.resolve(config.tracker)  # it may come from this process's environment
        return config


class Grid(Sweeper):
    """Every combination, as hydra's own sweeper makes them; but each job is composed once, by the launcher."""

    def __init__(self, params: dict[str, str] | None = None):
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What hydra hands to a sweeper."""
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Split the words into jobs and hand all of them to the launcher."""
        written = [f"{key}={value}" for key, value in self.params.items()]
        words = OverridesParser.create(config_loader=self.loader).parse_overrides([*written, *arguments])
        return self.launcher.launch(BasicSweeper.split_arguments(words, None)[0], initial_job_idx=0)


def make_job_return(config: DictConfig, value: float | None) -> JobReturn:
    """What hydra gets of a job that finished."""
    answer = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.COMPLETED)
    answer.return_value = value
    return answer


def register_plugins() -> None:
    """Make our sweeper and launchers known to hydra, which looks them up by name in a module below `hydra_plugins`, found or made here."""
    plugins = Plugins.instance()  # imports `hydra_plugins`, if another program has installed one
    if PLUGIN_MODULE in sys.modules:
        return
    package, name = PLUGIN_MODULE.split(".")
    module = ModuleType(PLUGIN_MODULE)
    launchers = [
        type(pool.__name__, (SweepLauncher,), {"pool_class": pool, "__module__": PLUGIN_MODULE}) for pool in POOL_CLASSES
    ]
    for plugin in [*launchers, type("Grid", (Grid,), {"__module__": PLUGIN_MODULE})]:
        setattr(module, plugin.__name__, plugin)
        plugins.register(plugin)
    sys.modules[PLUGIN_MODULE] = module
    parent = sys.modules.setdefault(package, ModuleType(package))
    if not hasattr(parent, "__path__"):
        parent.__path__ = []
    setattr(parent, name, module)
