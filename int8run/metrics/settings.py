"""Settings of the measurements of a run, as `metrics=` composes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.metrics.base import Measure
from int8run.metrics.catalog import build_measure, describe_measured
from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.measures.ms_ssim import MsSsim
from int8run.metrics.metric_files import read_metric_files
from int8run.metrics.names import METRICS

BASELINES = ("run", "cached", "none")
PERCEPTUAL = tuple(read_metric_files())


@dataclass(frozen=True)
class MetricsSettings:
    """What is measured, and against what.

    Args:
        baseline: `run`: the float model generates too, in turn with the INT8 model. `cached`: it generates
            first and alone, unless an earlier run kept its images. `none`: there is no float model.
        layers: whether to measure each layer's output SQNR on real activations: one float step with hooks.
        perceptual: names of metrics in addition to PSNR, SSIM and latent error: of PERCEPTUAL, or of
            `measures`.
        objective: the metric that a sweeper gets, and that the best job of a sweep is chosen by; one of
            `names.METRICS`, or one that `measures` adds.
        noise_floor: whether the float model generates once more, computed otherwise, and once in another
            dtype: what it differs from itself by.
        margin_db: INT8 counts as exact as that where both PSNRs differ by less, in dB.
        intervals: how sure a mean over samples is.
        system_s: seconds between samples of the machine's load in system.csv; 0: none.
        measures: the metrics of `perceptual` by name; one that ships and is not here has its defaults.
    """

    baseline: str = "run"
    layers: bool = True
    perceptual: Sequence[str] = ()
    objective: str = "quality/psnr_db"
    noise_floor: bool = False
    margin_db: float = 1.0
    intervals: IntervalSettings = field(default_factory=IntervalSettings)
    system_s: float = 10
    measures: Mapping[str, Measure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("metrics.baseline", self.baseline, BASELINES)
        check_bool("metrics.layers", self.layers)
        check_range("metrics.system_s", self.system_s, 0, 3600)
        self._check_perceptual()
        self._check_statistics()
        if self.perceptual and self.baseline == "none":
            raise ConfigError(
                f"metrics.perceptual={list(self.perceptual)} compares with the float model's images, which "
                "metrics.baseline=none does not generate; set metrics.baseline=run, or metrics=basic"
            )
        self._check_objective()

    def _check_perceptual(self) -> None:
        """Check the names of metrics, and give each that has none its default settings."""
        if isinstance(self.perceptual, str) or not isinstance(self.perceptual, Sequence):
            raise ConfigError(
                f"metrics.perceptual is {self.perceptual!r}; give a list of {', '.join(PERCEPTUAL)}, such as "
                "[lpips]"
            )
        object.__setattr__(self, "perceptual", tuple(self.perceptual))  # the class is frozen
        known = [*PERCEPTUAL, *(name for name in self.measures if name not in PERCEPTUAL)]
        measures = {}
        for name in self.perceptual:
            check_choice("an entry of metrics.perceptual", name, known)
            if name in measures:
                raise ConfigError(f"metrics.perceptual has {name!r} twice; name each metric once")
            measures[name] = self.measures.get(name) or build_measure(name)
        unused = sorted(set(self.measures) - set(measures))
        if unused:
            raise ConfigError(
                f"metrics.measures.{unused[0]} sets a metric that is not measured; add {unused[0]} to "
                "metrics.perceptual, or leave its settings out"
            )
        object.__setattr__(self, "measures", measures)

    def _check_statistics(self) -> None:
        """Raise ConfigError for an interval, a margin or a noise floor that cannot be computed."""
        if not isinstance(self.intervals, IntervalSettings):
            raise ConfigError(
                f"metrics.intervals is {self.intervals!r}; it takes names and values, such as {{level: 0.9}}"
            )
        check_range("metrics.margin_db", self.margin_db, 0.01, 100)
        check_bool("metrics.noise_floor", self.noise_floor)
        if self.noise_floor and self.baseline == "none":
            raise ConfigError(
                "metrics.noise_floor=true compares the float model with itself, and metrics.baseline=none "
                "has no float model; set metrics.baseline=run or cached, or metrics.noise_floor=false"
            )

    def _check_objective(self) -> None:
        """Check that runs with these settings can have it; its model and LoRAs decide whether one has it."""
        metrics = {**METRICS, **describe_measured(self.measures)}
        check_choice("metrics.objective", self.objective, metrics)
        measure = metrics[self.objective].measure
        if measure is None or measure == MsSsim.name or measure in self.perceptual:
            return
        names = ", ".join([*self.perceptual, measure])
        raise ConfigError(
            f"metrics.objective={self.objective} is not measured with these settings; set "
            f"metrics.perceptual=[{names}]"
        )
