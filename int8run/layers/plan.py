"""What is decided for each Linear, convolution and attention before and while it becomes INT8.

One `LayerPlan` is one row of `layers.csv`. `plan_layers` makes the list, `int8run.ptq.quantize` and
`int8run.pipeline` fill it in, metrics and reports read it. `Int8Settings` is the config group `int8`.

Who decides that a layer stays float: the `ignore` rules of its family (`conf/model_type`, by way of
`ModelFamily.find_skip_reason`; from file to file `int8run.tasks.denoiser_checkpoint` asks them), then a
quality budget (`int8run.ptq.mixed_precision`), or the file that INT8 layers are loaded from
(`int8run.pipeline.prequantized`), last the speed of this machine (`leave_float`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod

from torch import nn

from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.kernels.grouped_weight.reference import BITS
from int8run.layers.int8_conv import count_conv_inputs, describe_conv, find_conv_obstacle, is_convolution
from int8run.layers.step_precision import check_step_precisions, computes_in_float
from int8run.quant.grouped_rounding import GroupLayout
from int8run.utils.step_schedule import Schedule

# what `layers.csv` names as the backend of a layer that small_batch_fallback sends to a float product
FLOAT_FALLBACK = "float_fallback"

# a call with at most this many rows may be faster in float; what task=bench measured takes its place
DEFAULT_FLOAT_ROWS = 8

SMALL_BATCH_FALLBACKS = ("only_small_layers", "always", "never")

# what `int8.attention` and `int8.convolutions` can be: INT8 wherever it can be, or where it is good and fast
# enough here
FLOAT, INT8, AUTO = "float", "int8", "auto"
# what `int8.bits` can be; `auto` chooses for each layer, by a quality budget
BITS_CHOICES = (8, 6, 4, AUTO)
ATTENTION_MODES = CONVOLUTION_CHOICES = (FLOAT, INT8, AUTO)
VAE_CHOICES = CONTROLNET_CHOICES = (FLOAT, INT8)


@dataclass(frozen=True)
class Int8Settings:
    """Whether to quantize, and when a layer computes in float all the same.

    Args:
        enable: false runs the float model through the same path.
        bits: of the weights of Linears: 8, or 6 or 4 for less memory, which are decoded to int8 for each
            product; `auto`: for each layer those that a quality budget allows.
        group_size: columns of a weight of 4 or 6 bits that share a scale.
        small_batch_fallback: which layers compute with the dequantized weight when a call has at most
            `max_rows` rows: `only_small_layers` (at most `small_layer_params` weights), `always`, `never`.
        max_rows: None: what `task=bench` measured for the layer, where it has, else DEFAULT_FLOAT_ROWS.
        small_layer_params: the most weights of a small layer.
        only_if_faster: with `backend=auto`, whether a layer that is faster in the model's dtype stays float;
            false: it becomes INT8 all the same, for its memory. Layers of 4 and 6 bits always do.
        convolutions: `float`: they stay as they are; `int8`; `auto`: INT8 where that is faster here.
        controlnet: `int8`: a ControlNet becomes INT8 as the denoiser does; `float`: it stays as it is.
        vae: `float`: the VAE stays as it is; `int8`: its Linears and convolutions.
        checkpoint: file or folder of INT8 layers, by component where there are two denoisers; the layers are
            used as they are. None: quantize.
        attention: which attentions of the INT8 model are INT8: none (`float`), all that can be (`int8`), or
            those that are exact and fast enough (`auto`); None: `auto` where a run has a quality budget, else
            `float`.
        attention_min_sqnr_db: with `auto`, the least SQNR of an attention's output.
        steps: which steps the denoiser computes in float and which in INT8, as `[fraction of the steps,
            precision from there on]`; None: all in INT8.
    """

    enable: bool = True
    bits: int | str = 8
    group_size: int = 16
    small_batch_fallback: str = "only_small_layers"
    max_rows: int | None = None
    small_layer_params: int = 1_000_000
    only_if_faster: bool = True
    convolutions: str = FLOAT
    controlnet: str = INT8
    vae: str = FLOAT
    checkpoint: str | Mapping[str, str] | None = None
    attention: str | None = FLOAT
    attention_min_sqnr_db: float = 35.0
    steps: Schedule | None = None

    def __post_init__(self) -> None:
        check_choice("int8.small_batch_fallback", self.small_batch_fallback, SMALL_BATCH_FALLBACKS)
        check_choice("int8.convolutions", self.convolutions, CONVOLUTION_CHOICES)
        check_choice("int8.controlnet", self.controlnet, CONTROLNET_CHOICES)
        check_choice("int8.vae", self.vae, VAE_CHOICES)
        check_bool("int8.enable", self.enable)
        self.check_bits()
        if self.attention is not None:
            check_choice("int8.attention", self.attention, ATTENTION_MODES)
        check_range("int8.attention_min_sqnr_db", self.attention_min_sqnr_db, 0, 200)
        check_bool("int8.only_if_faster", self.only_if_faster)
        if self.steps is not None:
            check_step_precisions(self.steps)
        if self.max_rows is not None:
            check_range("int8.max_rows", self.max_rows, 0, 4096, whole=True)
        check_range("int8.small_layer_params", self.small_layer_params, 0, 2**40, whole=True)

    def check_bits(self) -> None:
        """Raise ConfigError for bits or a group size that weights cannot have."""
        if isinstance(self.bits, bool) or self.bits not in BITS_CHOICES:
            choices = ", ".join(map(str, BITS_CHOICES))
            raise ConfigError(f"int8.bits is {self.bits!r}; choose from {choices}")
        self.list_layouts()  # each checks itself

    def check_has_budget(self, *, has_budget: bool) -> None:
        """Raise ConfigError where a quality budget is to choose the bits and there is none."""
        if self.bits == AUTO and not has_budget:
            raise ConfigError(
                "int8.bits=auto gives each layer the fewest bits that hold a quality: set it, such as "
                "model_type.mixed_precision=auto quality_db=40, or set int8.bits=8, 6 or 4"
            )

    def list_layouts(self) -> list[GroupLayout]:
        """How weights of fewer than 8 bits are laid out, by rising bits; none where all have 8."""
        if self.bits == 8:
            return []
        bits = BITS if self.bits == AUTO else (int(self.bits),)
        return [GroupLayout(number, self.group_size) for number in bits]

    @property
    def leaves_slow_layers_float(self) -> bool:
        """Whether layers stay float where that is faster: not where bits are chosen, which is for memory."""
        return self.only_if_faster and self.bits != AUTO

    def turn_off(self) -> "Int8Settings":
        """The settings of a run with the float model alone."""
        return replace(
            self,
            enable=False,
            bits=8,
            checkpoint=None,
            attention=FLOAT,
            convolutions=FLOAT,
            vae=FLOAT,
            steps=None,
        )

    def get_layout(self, bits: int) -> GroupLayout | None:
        """How weights of so many bits are laid out; None: they have 8."""
        return None if bits == 8 else GroupLayout(bits, self.group_size)

    @property
    def fixed_layout(self) -> GroupLayout | None:
        """How all weights are laid out; None where they have 8 bits, or each layer gets its own."""
        layouts = self.list_layouts()
        return layouts[0] if len(layouts) == 1 else None

    @property
    def has_float_steps(self) -> bool:
        """Whether the float denoiser computes some of the steps."""
        return self.enable and computes_in_float(self.steps)

    def describe_bits(self) -> dict[str, int | str]:
        """What files say of the bits of their weights; nothing where all have 8."""
        return {} if self.bits == 8 else {"bits": self.bits, "group_size": self.group_size}

    def choose_float_rows(self, params: int, rows: int, measured: int | None = None) -> int:
        """Up to how many rows a layer computes in float; 0: never, so that it need not keep a float weight.

        Args:
            params: weights of the layer.
            rows: rows that it sees in this run.
            measured: up to how many rows float was faster for this layer on this machine, where known.
        """
        if self.small_batch_fallback == "never":
            return 0
        if self.small_batch_fallback == "only_small_layers" and params > self.small_layer_params:
            return 0
        limit = self.max_rows
        if limit is None:
            limit = DEFAULT_FLOAT_ROWS if measured is None else measured
        return limit if rows <= limit else 0


# what a plan can be of
LINEAR, CONV, ATTENTION = "linear", "conv", "attention"


@dataclass
class LayerPlan:
    """What happens to one Linear, convolution or attention; a row of `layers.csv`.

    Args:
        name: of the module in the model.
        in_features: K, numbers that one number of the output is summed from; of a convolution its input
            channels (of one group) times the size of its kernel, of an attention the width of a head.
        out_features: N, of a convolution its output channels, of an attention the width of a head's values.
        skip_reason: why the layer stays float; None when it is quantized.
        outlier: outlier method and settings.
        outlier_skip_reason: why the layer has not the method that was asked for; empty when it has.
        rounding: the rounding of the weight.
        backend_asked: the backend of the config.
        backend_used: the backend that runs the layer, or FLOAT_FALLBACK.
        backends_left_out: backends that `auto` could not run here, with the reasons.
        speedup: time of the float layer over that of the fastest INT8 backend; None: it was not measured.
        float_reason: why the layer is to compute in float although it can be INT8; empty where it is not to.
        is_float_by_choice: whether it stays float for that reason.
        instructions: instruction set of that backend's kernels, where they are built for one.
        measured: errors of the layer by name of the metric, such as weight_sqnr_db.
        kind: LINEAR, CONV or ATTENTION.
        shape: what the two numbers do not say, for people: kernel and stride, or number of heads.
        macs_share: share of all multiply-adds of the denoiser in one step; None: they were not counted.
        taps: of a convolution the size of its kernel; else 1.
        bits: stored bits of a weight, where it is quantized.
        bits_reason: why they are not those that were asked for; empty where they are.
        lora: how the INT8 layer gets its LoRAs: `dynamic`, `bake`, `stochastic`; empty without any, and where
            they were baked before it was quantized.
        lora_reason: why it is not dynamic, where that was a choice.
    """

    name: str
    in_features: int
    out_features: int
    skip_reason: str | None
    outlier: str = ""
    outlier_skip_reason: str = ""
    rounding: str = ""
    backend_asked: str = ""
    backend_used: str = ""
    backends_left_out: str = ""
    speedup: float | None = None
    float_reason: str = ""
    is_float_by_choice: bool = False
    instructions: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    kind: str = LINEAR
    shape: str = ""
    macs_share: float | None = None
    taps: int = 1
    bits: int = 8
    bits_reason: str = ""
    lora: str = ""
    lora_reason: str = ""

    @property
    def is_linear(self) -> bool:
        """Whether it is a Linear: calibrations and the backends of the settings are about those alone."""
        return self.kind == LINEAR

    @property
    def channels(self) -> int:
        """Numbers that an outlier method treats: inputs of a Linear, of a convolution channels of a group."""
        return self.in_features // self.taps

    @property
    def num_weights(self) -> int:
        """Numbers of its weight; 0 for an attention, which has none."""
        if self.kind == ATTENTION:
            return 0
        return self.in_features * self.out_features

    def skip(self, reason: str) -> None:
        """Keep the layer float after all, and forget what was decided and measured for INT8."""
        self.skip_reason = reason
        self.outlier = ""
        self.outlier_skip_reason = ""
        self.bits = 8
        self.bits_reason = ""
        self.rounding = ""
        self.backend_asked = ""
        self.backend_used = ""
        self.float_reason = ""
        self.instructions = ""
        self.measured.clear()

    def become(self, other: "LayerPlan") -> None:
        """Take over everything that was decided and measured for another plan of the same layer."""
        for item in fields(self):
            setattr(self, item.name, getattr(other, item.name))

    def leave_float(self) -> None:
        """Keep a layer float for its `float_reason`, after its integers were made."""
        self.skip(self.float_reason)
        self.is_float_by_choice = True


def plan_layers(
    model: nn.Module, find_skip_reason: Callable[[str], str | None], *, convolutions: str = FLOAT
) -> list[LayerPlan]:
    """A plan for every Linear of the model, each exactly once, in the model's order.

    Args:
        model: the float model.
        find_skip_reason: gives the reason to keep the layer of that name float, or None.
        convolutions: as `Int8Settings` has it; unless it is `float` they have a plan as well.
    """
    plans = []
    for name, module in model.named_modules():
        if convolutions != FLOAT and is_convolution(module):
            plans.append(plan_convolution(name, module, find_skip_reason(name)))
        if isinstance(module, nn.Linear):
            plan = LayerPlan(
                name=name,
                in_features=module.in_features,
                out_features=module.out_features,
                skip_reason=find_skip_reason(name),
            )
            plans.append(plan)
    return plans


def plan_convolution(
    name: str, conv: nn.Module, reason: str | None, *, known_subclasses: Sequence[str] = ()
) -> LayerPlan:
    """The plan of one convolution.

    Args:
        name: of it in the model.
        conv: of any kind; one that INT8 does not have stays float.
        reason: why it is to stay float; None: it is not.
        known_subclasses: as for `find_conv_obstacle`.
    """
    obstacle = find_conv_obstacle(conv, known_subclasses=known_subclasses)
    return LayerPlan(
        name=name,
        in_features=count_conv_inputs(conv),
        out_features=int(conv.out_channels),  # type: ignore[arg-type]
        skip_reason=reason or obstacle,
        kind=CONV,
        shape=describe_conv(conv),
        taps=prod(conv.kernel_size),  # type: ignore[arg-type]
    )
