"""Which measurements a run makes."""

from dataclasses import dataclass

from int8run.errors import one_of, switch


@dataclass(frozen=True)
class Metrics:
    """`baseline=run` generates with the float model too, interleaved; `none` measures the INT8 model alone."""

    baseline: str = "run"
    layers: bool = True  # per-layer output SQNR on real activations: one float step with hooks
    objective: str = "quality/psnr_db"  # the metric that a sweeper gets

    def __post_init__(self) -> None:
        one_of("metrics.baseline", self.baseline, ("run", "none"))
        switch("metrics.layers", self.layers)
