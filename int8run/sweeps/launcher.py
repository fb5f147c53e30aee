"""Hydra's side of a sweep: the launchers that `hydra/launcher=` chooses between."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from int8run.sweeps.base import Pool
from int8run.sweeps.in_process import InProcess
from int8run.sweeps.local import Processes
from int8run.sweeps.ray_cluster import RayCluster
from int8run.sweeps.slurm import Slurm

# hydra takes launchers from modules below `hydra_plugins` only
MODULE = "hydra_plugins.int8run"
POOLS = (InProcess, Processes, RayCluster, Slurm)


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
        """Run every job; see `conduct.conduct`."""
        from int8run.sweeps.conduct import conduct

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = [self.compose(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        values = conduct(configs, self.pool, self.context, self.task_function)
        return [done(config, value) for config, value in zip(configs, values, strict=True)]

    def compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        """The config of one job, with paths and addresses that mean the same in every process."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
            config.hydra.sweep.dir = str(Path(str(self.config.hydra.sweep.dir)).absolute())
            OmegaConf.resolve(config.tracker)  # its address may come from this process's environment
        return config


def done(config: DictConfig, value: float | None) -> JobReturn:
    """What hydra's sweeper gets of a job that finished."""
    answer = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.COMPLETED)
    answer.return_value = value
    return answer


def register() -> None:
    """Make our launchers known to hydra, which looks a launcher up by its name in a module below `hydra_plugins`, found or made here."""
    plugins = Plugins.instance()  # imports `hydra_plugins`, if another program has installed one
    if MODULE in sys.modules:
        return
    package, name = MODULE.split(".")
    module = ModuleType(MODULE)
    for pool in POOLS:
        launcher = type(pool.__name__, (SweepLauncher,), {"pool_class": pool, "__module__": MODULE})
        setattr(module, pool.__name__, launcher)
        plugins.register(launcher)
    sys.modules[MODULE] = module
    parent = sys.modules.setdefault(package, ModuleType(package))
    if not hasattr(parent, "__path__"):
        parent.__path__ = []
    setattr(parent, name, module)
