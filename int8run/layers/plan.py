"""What is decided for each Linear before it becomes INT8: one LayerPlan is one row of layers.csv."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from int8run.errors import check_bool, check_choice, check_range

# what `layers.csv` names as the backend of a layer that small_batch_fallback sends to a float product
FLOAT_FALLBACK = "float_fallback"


# a call with at most this many rows may be faster in float; what task=bench measured takes its place
DEFAULT_FLOAT_ROWS = 8


@dataclass(frozen=True)
class Int8Settings:
    """Whether to quantize, and when a layer computes in float all the same.

    Args:
        enable: false runs the float model through the same path.
        small_batch_fallback: which layers compute with the dequantized weight when a call has at most `max_rows` rows:
            `only_small_layers` (at most `small_layer_params` weights), `always`, `never`.
        max_rows: None: what `task=bench` measured for the layer, where it has, else DEFAULT_ROWS.
        checkpoint: file or folder of INT8 layers, by component where there are two denoisers; they are taken as they are. None: quantize.
    """

    enable: bool = True
    small_batch_fallback: str = "only_small_layers"
    max_rows: int | None = None
    small_layer_params: int = 1_000_000
    checkpoint: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        check_choice(
            "int8.small_batch_fallback", self.small_batch_fallback, ("only_small_layers", "always", "never")
        )
        check_bool("int8.enable", self.enable)
        if self.max_rows is not None:
            check_range("int8.max_rows", self.max_rows, 0, 4096, whole=True)
        check_range("int8.small_layer_params", self.small_layer_params, 0, 2**40, whole=True)

    def choose_float_rows(self, params: int, rows: int, measured: int | None = None) -> int:
        """Up to how many rows a layer computes in float; 0: never, so that it need not keep a float weight.

        Args:
            params: weights of the layer.
            rows: rows that it sees in this run.
            measured: up to how many rows float was faster for this layer on this machine, where that is known.
        """
        small = self.small_batch_fallback == "only_small_layers" and params <= self.small_layer_params
        default = DEFAULT_FLOAT_ROWS if measured is None else measured
        limit = default if self.max_rows is None else self.max_rows
        return limit if (small or self.small_batch_fallback == "always") and rows <= limit else 0


@dataclass
class LayerPlan:
    """What happens to one Linear; a row of `layers.csv`."""

    name: str
    in_features: int
    out_features: int
    skip_reason: str | None  # the reason, or None when it becomes INT8
    outlier: str = ""  # method and settings
    outlier_skip_reason: str = ""  # the reason why the method that was asked for is not the one
    rounding: str = ""
    backend_asked: str = ""
    backend_used: str = ""
    measured: dict[str, float] = field(default_factory=dict)

    def skip(self, why: str) -> None:
        """The layer stays float after all."""
        (
            self.skip_reason,
            self.outlier,
            self.outlier_skip_reason,
            self.rounding,
            self.backend_asked,
            self.backend_used,
        ) = why, "", "", "", "", ""
        self.measured.clear()


def plan_layers(model: nn.Module, why_float: Callable[[str], str | None]) -> list[LayerPlan]:
    """Every Linear of the model, each exactly once; `why_float(name)` is the reason to keep one float, or None."""
    return [
        LayerPlan(name, module.in_features, module.out_features, why_float(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
