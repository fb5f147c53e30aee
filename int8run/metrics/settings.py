"""Settings of the measurements of a run, as `metrics=` composes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.metrics.names import METRICS, MS_SSIM, list_measures

BASELINES = ("run", "cached", "none")
PERCEPTUAL = list_measures()


@dataclass(frozen=True)
class MetricsSettings:
    """What is measured, and against what.

    Args:
        baseline: `run`: the float model generates too, in turn with the INT8 model. `cached`: it generates
            first and alone, unless an earlier run kept its images. `none`: there is no float model.
        layers: whether to measure each layer's output SQNR on real activations: one float step with hooks.
        perceptual: metrics of PERCEPTUAL in addition to PSNR, SSIM and latent error.
        objective: the metric that a sweeper gets, and that the best job of a sweep is chosen by; one of
            `names.METRICS`.
        system_s: seconds between samples of the machine's load in system.csv; 0: none.
    """

    baseline: str = "run"
    layers: bool = True
    perceptual: Sequence[str] = ()
    objective: str = "quality/psnr_db"
    system_s: float = 10

    def __post_init__(self) -> None:
        check_choice("metrics.baseline", self.baseline, BASELINES)
        check_bool("metrics.layers", self.layers)
        check_range("metrics.system_s", self.system_s, 0, 3600)
        if isinstance(self.perceptual, str) or not isinstance(self.perceptual, Sequence):
            raise ConfigError(
                f"metrics.perceptual is {self.perceptual!r}; give a list of {', '.join(PERCEPTUAL)}, such as "
                "[lpips]"
            )
        object.__setattr__(self, "perceptual", tuple(self.perceptual))
        for name in self.perceptual:
            check_choice("an entry of metrics.perceptual", name, PERCEPTUAL)
            is_repeated = self.perceptual.count(name) > 1
            if is_repeated:
                raise ConfigError(f"metrics.perceptual has {name!r} twice; name each metric once")
        if self.perceptual and self.baseline == "none":
            raise ConfigError(
                f"metrics.perceptual={list(self.perceptual)} compares with the float model's images, which "
                "metrics.baseline=none does not generate; set metrics.baseline=run, or metrics=basic"
            )
        self._check_objective()

    def _check_objective(self) -> None:
        """Check that runs with these settings can have it; its model and LoRAs decide whether one has it."""
        check_choice("metrics.objective", self.objective, METRICS)
        measure = METRICS[self.objective].measure
        if measure is None or measure == MS_SSIM or measure in self.perceptual:
            return
        names = ", ".join([*self.perceptual, measure])
        raise ConfigError(
            f"metrics.objective={self.objective} is not measured with these settings; set "
            f"metrics.perceptual=[{names}]"
        )
