"""The loops over a model's Linears: which ones, to what, and put in place."""

import copy
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from int8run.backends.auto import AutoBackend, Chooser
from int8run.backends.base import Backend
from int8run.backends.shipped import usable_here
from int8run.errors import BackendError, ConfigError, in_range, one_of, switch
from int8run.kernels.cpu.rows import quantize_weight_rows
from int8run.layers.linear import Int8Linear, KeepsDtypes, QuantizedLayer, SharedInput, linear_at
from int8run.models.family import ModelFamily
from int8run.outlier.base import LayerStatistics, OutlierMethod, OutlierTransform
from int8run.quant.rounding import AbsMax, Rounding
from int8run.quant.weight import QuantizedWeight, sqnr_db

log = logging.getLogger(__name__)
# what `layers.csv` names as the backend of a layer that small_batch_fallback sends to a float product
FALLBACK = "float_fallback"
# a call with at most this many rows may be faster in float; what task=bench measured takes its place
DEFAULT_ROWS = 8


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
        one_of("int8.small_batch_fallback", self.small_batch_fallback, ("only_small_layers", "always", "never"))
        switch("int8.enable", self.enable)
        if self.max_rows is not None:
            in_range("int8.max_rows", self.max_rows, 0, 4096, whole=True)
        in_range("int8.small_layer_params", self.small_layer_params, 0, 2**40, whole=True)

    def float_rows(self, params: int, rows: int, measured: int | None = None) -> int:
        """Up to how many rows a layer computes in float; 0: never, so that it need not keep a float weight.

        Args:
            params: weights of the layer.
            rows: rows that it sees in this run.
            measured: up to how many rows float was faster for this layer on this machine, where that is known.
        """
        small = self.small_batch_fallback == "only_small_layers" and params <= self.small_layer_params
        default = DEFAULT_ROWS if measured is None else measured
        limit = default if self.max_rows is None else self.max_rows
        return limit if (small or self.small_batch_fallback == "always") and rows <= limit else 0


@dataclass
class LayerPlan:
    """What happens to one Linear; a row of `layers.csv`."""

    name: str
    in_features: int
    out_features: int
    keep_float: str | None  # the reason, or None when it becomes INT8
    outlier: str = ""  # method and settings
    outlier_why_not: str = ""  # the reason why the method that was asked for is not the one
    rounding: str = ""
    backend_asked: str = ""
    backend_used: str = ""
    measured: dict[str, float] = field(default_factory=dict)

    def keep(self, why: str) -> None:
        """The layer stays float after all."""
        self.keep_float, self.outlier, self.outlier_why_not, self.rounding, self.backend_asked, self.backend_used = why, "", "", "", "", ""
        self.measured.clear()


def plan_layers(model: nn.Module, why_float: Callable[[str], str | None]) -> list[LayerPlan]:
    """Every Linear of the model, each exactly once; `why_float(name)` is the reason to keep one float, or None."""
    return [
        LayerPlan(name, module.in_features, module.out_features, why_float(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def same_input_groups(names: Iterable[str], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Layers that read the same tensor, by full name; a layer that shares its input with none is a group of its own.

    Args:
        groups: names relative to a block.
    """
    left = dict.fromkeys(names)
    found = []
    for group in groups:
        for block in sorted({block for name in group for block in in_blocks(left, name)}):
            members = [block + name for name in group if block + name in left]
            found.append(members)
            for name in members:
                del left[name]
    return found + [[name] for name in left]


def check_outlier(outlier: OutlierMethod, plans: Sequence[LayerPlan]) -> None:
    """Note in the plan which layers the method cannot take; they are quantized without it.

    Raises:
        ConfigError: when it can take none.
    """
    for plan in plans:
        plan.outlier_why_not = outlier.refuse(plan.in_features) or ""
    refused = [plan for plan in plans if plan.outlier_why_not]
    reasons = "; ".join(f"{n} × {why}" for why, n in Counter(plan.outlier_why_not for plan in refused).items())
    if len(refused) == len(plans):
        raise ConfigError(f"outlier={outlier.name} can take none of the {len(plans)} layers ({reasons}); choose another outlier=")
    if refused:
        log.warning("outlier=%s cannot take %d of %d layers (%s); these are plain INT8", outlier.name, len(refused), len(plans), reasons)


def quantized_layers(
    model: nn.Module, plans: Iterable[LayerPlan], methods: Mapping[str, OutlierMethod], rounding: Rounding,
    statistics: Mapping[str, LayerStatistics], read: Callable[[str], Tensor] | None = None,
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:  # fmt: skip
    """Quantize each planned Linear, one at a time, so that a consumer decides what stays in memory.

    Args:
        read: gives the float weight of a Linear by its name; None: the model has them all.
        methods: outlier method of each layer; one without is quantized as it is.
        statistics: of the layers that a calibration reached, where a method or the rounding needs one.
    """
    for plan in plans:
        linear = linear_at(model, plan.name)
        original = linear.weight.detach() if read is None else read(plan.name)
        if not original.numel():
            check_weight(plan, original)
        seen = statistics.get(plan.name)
        method = methods.get(plan.name)
        if seen is None and (rounding.needs_calibration or (method is not None and method.needs_calibration)):
            raise ConfigError(f"{plan.name}: the calibration never reached it; keep the layer float, or take other calibration.prompts")
        transform = OutlierTransform() if method is None else method.fit(original, seen)
        transform.to(original.device)
        if type(rounding) is AbsMax and original.device.type == "cpu":  # by kernels of our own, many times as fast
            weight = rounded_rows(plan, original, transform)
            plan.outlier, plan.rounding = transform.label, rounding.name
            yield plan, QuantizedLayer(weight, transform, linear.bias)
            continue
        check_weight(plan, original)
        transformed = transform.transform_weight(original.float())
        inputs = None
        if rounding.needs_calibration and seen is not None:
            inputs = transform.rounded_input(seen.sample.to(original.device)).flatten(0, -2)
        weight = rounding.round(transformed, inputs)
        plan.outlier, plan.rounding = transform.label, rounding.name
        plan.measured["weight_sqnr_db"] = sqnr_db(transformed, weight.dequantize())
        plan.measured["saturated_share"] = weight.saturated_share
        yield plan, QuantizedLayer(weight, transform, linear.bias)


def rounded_rows(plan: LayerPlan, original: Tensor, transform: OutlierTransform) -> QuantizedWeight:
    """A weight in the transform's basis, rounded by `absmax`, and in the plan what that cost.

    Raises:
        ConfigError: for a weight that is not finite.
    """
    q = torch.empty(original.shape, dtype=torch.int8)
    scale = torch.empty(len(original), 1)
    sums = quantize_weight_rows(original.contiguous(), q, scale, transform.factor, transform.rotation)
    if not sums.finite:
        check_weight(plan, original)
        raise ConfigError(f"{plan.name}: the weight overflows under {transform.label}; keep the layer float, or set outlier=none")
    plan.measured["weight_sqnr_db"] = 10 * math.log10(sums.signal / sums.noise) if sums.signal and sums.noise else math.inf
    plan.measured["saturated_share"] = sums.saturated / q.numel()
    return QuantizedWeight(q, scale)


def check_weight(plan: LayerPlan, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized.

    Raises:
        ConfigError: naming the layer.
    """
    if not weight.numel():
        raise ConfigError(f"{plan.name}: the weight is {plan.out_features} x {plan.in_features}, nothing to quantize; keep the layer float")
    if not torch.isfinite(weight).all():
        raise ConfigError(f"{plan.name}: the weight holds NaN or infinity and cannot be quantized; check the checkpoint")


def check_backend(backend: Backend, device: torch.device, plans: Iterable[LayerPlan]) -> None:
    """Refuse a backend that cannot run here, or cannot take a layer, before anything is quantized.

    Raises:
        BackendError: with every reason, and every layer that it cannot take.
    """
    reasons = backend.limits.refuse(device)
    if reasons:
        able = ", ".join(usable_here(device))
        raise BackendError(f"backend {backend.name!r} cannot run here: {'; '.join(reasons)}; these can: {able}")
    refused = {p.name: why for p in plans if (why := backend.limits.refuse_layer(p.in_features, p.out_features))}
    if refused:
        listed = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
        raise BackendError(f"backend {backend.name!r} cannot take {len(refused)} layers: {listed}; backend=auto gives them to another")


def int8_layers(
    model: nn.Module,
    layers: Iterable[tuple[LayerPlan, QuantizedLayer]],
    backend: Backend,
    settings: Int8Settings,
    rows: Mapping[str, int],
    on_layer: Callable[[LayerPlan], None] = lambda plan: None,
    device: torch.device | None = None,
) -> dict[str, Int8Linear]:
    """The `Int8Linear` of each quantized layer, bound to a backend, by the name of the Linear whose place it can take.

    Args:
        model: the float model.
        rows: rows that each layer sees in this run, by name; `backend=auto` measures with them.
        on_layer: called after each layer, for progress.
        device: where the layers will run; None: where the model is.
    """
    device = next(p.device for p in model.parameters() if not p.is_meta) if device is None else device
    choosers: dict[torch.dtype, Chooser] = {}
    matrices: dict[tuple[int, bool], Tensor | None] = {}  # one of each kind serves all layers
    made = {}
    for plan, layer in layers:
        layer.transform.matrix = matrices.setdefault((layer.transform.group_size, layer.transform.sylvester), layer.transform.matrix)
        dtype = linear_at(model, plan.name).weight.dtype
        chosen, measured = backend, None
        if isinstance(backend, AutoBackend):
            if dtype not in choosers:  # each reads the table of measured choices
                choosers[dtype] = backend.chooser(device, dtype)
            chosen = choosers[dtype].choose(rows[plan.name], plan.in_features, plan.out_features)
            measured = choosers[dtype].float_rows(plan.in_features, plan.out_features)
        float_rows = settings.float_rows(plan.in_features * plan.out_features, rows[plan.name], measured)
        plan.backend_asked, plan.backend_used = backend.name, FALLBACK if float_rows else chosen.name
        made[plan.name] = Int8Linear(layer, chosen, dtype, float_rows)
        on_layer(plan)
    return made


def assemble(model: nn.Module, layers: Mapping[str, Int8Linear], family: ModelFamily) -> nn.Module:
    """An INT8 model: a copy of the module tree with these layers in it, sharing every tensor with both.

    Layers that read the same tensor share its quantization, and GELUs between INT8 layers move into the second one's, as the family
    says.
    """
    target = share_copy(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(target.get_submodule(parent), child, share_copy(layer))
    saved = share_inputs(target, family.same_input)
    moved = sum(defer_gelu(target, g.activation, g.source, g.into) for g in family.deferred_gelu)
    log.debug("layers with the same input share a quantization: %d fewer per step; %d GELUs moved into one", saved, moved)
    return target


def in_blocks(names: Iterable[str], relative: str) -> Iterator[str]:
    """Prefixes (with their final dot) of the blocks that hold a module of that relative name."""
    return (name.removesuffix(relative) for name in names if name.endswith(f".{relative}"))


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Let INT8 layers of one block that read the same tensor quantize it once; layers that treat it differently do not share.

    Args:
        groups: names relative to a block.

    Returns:
        The number of quantizations saved per call of the model.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Int8Linear)}
    saved = 0
    for group in same_input_groups(layers, groups):
        members = [layers[name] for name in group]
        while members:
            first = members[0]
            alike = [m for m in members if (m.backend, m.float_rows) == (first.backend, first.float_rows)]
            alike = [m for m in alike if m.transform.same_input_as(first.transform)]
            members = [m for m in members if m not in alike]
            if len(alike) > 1:
                shared = SharedInput(len(alike))
                for member in alike:
                    member.shared = shared
                saved += len(alike) - 1
    return saved


def defer_gelu(model: nn.Module, activation: str, source: str, into: str) -> int:
    """In every block, take out a GELU (tanh) whose result an INT8 layer quantizes, and let that quantization compute it.

    Returns:
        The number of activations moved.
    """
    modules = dict(model.named_modules())
    moved = 0
    for block in list(in_blocks(modules, activation)):
        found, layer = modules[block + activation], modules.get(block + into)
        width = getattr(modules.get(block + source), "out_features", None)
        if not isinstance(layer, Int8Linear) or width is None or getattr(found, "approximate", None) != "tanh":
            continue
        if not layer.backend.limits.fuses_gelu or layer.transform.centered:  # the mean is that of what the GELU gives
            continue
        # a module that holds its projection as well keeps that, under its old name
        held = source.removeprefix(f"{activation}.")
        rest = nn.Identity() if held == source else nn.Sequential(OrderedDict({held: modules[block + source]}))
        parent, _, child = (block + activation).rpartition(".")
        setattr(model.get_submodule(parent), child, rest)
        layer.gelu_from = layer.in_features - width
        moved += 1
    return moved


def share_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors and backends are the same: no memory until layers are replaced."""
    backends = [m.backend for m in model.modules() if isinstance(m, KeepsDtypes) and hasattr(m, "backend")]
    same = [*model.parameters(), *model.buffers(), *backends]
    return copy.deepcopy(model, memo={id(s): s for s in same})
