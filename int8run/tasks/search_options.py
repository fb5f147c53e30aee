"""What `task=search` is asked for: the class that conf/task/search.yaml names. See `tasks.options`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.layers.plan import AUTO
from int8run.search.parse_space import parse_space

# words of search.measurement, which imports what only a search needs
COSTS = ("seconds", "bytes")
CALIBRATION, RUN = "calibration", "run"


@dataclass(frozen=True)
class Search:
    """Find the cheapest recipe for a quality.

    Args:
        minimise: the cost: seconds per image, or bytes of the denoiser and the text encoders.
        n_trials: runs that may be used, failed ones included.
        judge_by: whose prompts the trials generate: `calibration`, or `run`, those of `prompts=`.
        confirm: whether the winner runs once more, with the prompts and seeds of the command.
        batch: trials that are chosen at once; None: as many as the launcher runs on one machine.
        space: ingredients by name; see `search.space`.
    """

    recorded: ClassVar[bool] = True
    tracked: ClassVar[bool] = False
    makes_runs: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset({"sync", "save"})

    minimise: str = "seconds"
    n_trials: int = 24
    judge_by: str = CALIBRATION
    confirm: bool = True
    batch: int | None = None
    space: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("task.minimise", self.minimise, COSTS)
        check_range("task.n_trials", self.n_trials, 1, 100_000, whole=True)
        check_choice("task.judge_by", self.judge_by, (CALIBRATION, RUN))
        check_bool("task.confirm", self.confirm)
        if self.batch is not None:
            check_range("task.batch", self.batch, 1, 1024, whole=True)
        parse_space(self.space)

    def check(self, spec: RunSpec) -> None:
        """Refuse a search without a quality, with two, without a comparison or without Optuna."""
        from int8run.search.proposals import check_optuna
        from int8run.tasks.start_checks import check_start

        if spec.quality_db is None or math.isnan(spec.quality_db):
            raise ConfigError(
                "task=search looks for the cheapest recipe of a quality; give the least PSNR to the float "
                "model, such as quality_db=35"
            )
        if spec.metrics.baseline == "none":
            raise ConfigError(
                "task=search compares with the float model, and metrics.baseline=none has none; choose run "
                "or cached"
            )
        if spec.has_mixed_precision or spec.int8.bits == AUTO:
            raise ConfigError(
                "model_type.mixed_precision=auto and int8.bits=auto need a quality_db of their own, and that "
                "of this command is what the search looks for; leave them out: choices of task.space.kept "
                "have both"
            )
        check_optuna()
        check_start(spec)

    def execute(self, spec: RunSpec, job: Job) -> None:
        """Run the trials, write search.json, search.html and recipe.yaml, and print what was found.

        Raises:
            ConfigError: no recipe meets the quality; the nearest is written all the same.
        """
        from int8run.tasks.search import run_search

        run_search(spec, job, self)
