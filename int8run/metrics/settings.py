"""Which measurements a run makes."""

from collections.abc import Sequence
from dataclasses import dataclass

from int8run.errors import ConfigError, check_bool, check_choice, check_range

BASELINES = ("run", "cached", "none")
PERCEPTUAL = ("ms_ssim", "lpips", "effnet_distance", "clip_score")


@dataclass(frozen=True)
class MetricsSettings:
    """What is measured, and against what.

    Args:
        baseline: `run`: the float model draws too, in turn with the INT8 model. `cached`: it draws first and alone, unless an earlier run
            kept its pictures. `none`: there is no float model.
    """

    baseline: str = "run"
    layers: bool = True  # per-layer output SQNR on real activations: one float step with hooks
    perceptual: Sequence[str] = ()  # metrics of PERCEPTUAL wanted besides PSNR, SSIM and latent error
    objective: str = (
        "quality/psnr_db"  # the metric that a sweeper gets, and that the best job of a sweep is the best in
    )
    system_s: float = 10  # seconds between samples of the machine's load in system.csv; 0: none

    def __post_init__(self) -> None:
        check_choice("metrics.baseline", self.baseline, BASELINES)
        check_bool("metrics.layers", self.layers)
        check_range("metrics.system_s", self.system_s, 0, 3600)
        if isinstance(self.perceptual, str) or not isinstance(self.perceptual, Sequence):
            raise ConfigError(
                f"metrics.perceptual is {self.perceptual!r}; give a list of {', '.join(PERCEPTUAL)}, such as [lpips]"
            )
        object.__setattr__(self, "perceptual", tuple(self.perceptual))
        for name in self.perceptual:
            check_choice("an entry of metrics.perceptual", name, PERCEPTUAL)
            if self.perceptual.count(name) > 1:
                raise ConfigError(f"metrics.perceptual has {name!r} twice; name each metric once")
        if self.perceptual and self.baseline == "none":
            raise ConfigError(
                f"metrics.perceptual={list(self.perceptual)} compares with the float model's pictures, and metrics.baseline=none "
                "makes none; set metrics.baseline=run, or metrics=basic"
            )
