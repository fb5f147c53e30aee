"""The loops over a model's Linears: which ones, to what, and put in place."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from int8run.backends.auto import AutoBackend, Chooser
from int8run.backends.base import Backend
from int8run.backends.shipped import usable_here
from int8run.errors import BackendError, ConfigError, in_range, one_of, switch
from int8run.layers.linear import Int8Linear, QuantizedLayer, SharedInput, linear_at
from int8run.outlier.base import OutlierMethod, OutlierTransform
from int8run.quant.weight import quantize_weight

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
    """

    enable: bool = True
    small_batch_fallback: str = "only_small_layers"
    max_rows: int | None = None
    small_layer_params: int = 1_000_000

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
    outlier: str = ""
    backend_asked: str = ""
    backend_used: str = ""
    measured: dict[str, float] = field(default_factory=dict)


def plan_layers(model: nn.Module, why_float: Callable[[str], str | None]) -> list[LayerPlan]:
    """Every Linear of the model, each exactly once; `why_float(name)` is the reason to keep one float, or None."""
    return [
        LayerPlan(name, module.in_features, module.out_features, why_float(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def quantized_layers(model: nn.Module, plans: Iterable[LayerPlan], outlier: OutlierMethod) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """Quantize each planned Linear, one at a time, so that a consumer decides what stays in memory."""
    for plan in plans:
        linear = linear_at(model, plan.name)
        if not linear.weight.numel():
            raise ConfigError(
                f"{plan.name}: the weight is {plan.out_features} x {plan.in_features}, nothing to quantize; keep the layer float"
            )
        if not torch.isfinite(linear.weight).all():
            raise ConfigError(f"{plan.name}: the weight holds NaN or infinity and cannot be quantized; check the checkpoint")
        transform = outlier.fit(linear.weight)
        plan.outlier = outlier.name
        if transform is None:
            log.warning("%s: %s cannot take in_features=%d; plain INT8", plan.name, outlier.name, plan.in_features)
            transform, plan.outlier = OutlierTransform(), "none"
        transform.to(linear.weight.device)
        transformed = transform.transform_weight(linear.weight.detach().float())
        weight = quantize_weight(transformed)
        plan.measured["weight_sqnr_db"] = sqnr_db(transformed, weight.dequantize())
        plan.measured["saturated_share"] = weight.saturated_share
        yield plan, QuantizedLayer(weight, transform, linear.bias)


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


def install(
    model: nn.Module,
    layers: Iterable[tuple[LayerPlan, QuantizedLayer]],
    backend: Backend,
    settings: Int8Settings,
    rows: Mapping[str, int],
    on_layer: Callable[[LayerPlan], None] = lambda plan: None,
) -> None:
    """Put an `Int8Linear` in the place of each planned Linear.

    Args:
        rows: rows that each layer sees in this run, by name; `backend=auto` measures with them.
        on_layer: called after each layer, for progress.
    """
    device = next(model.parameters()).device
    choosers: dict[torch.dtype, Chooser] = {}
    for plan, layer in layers:
        dtype = linear_at(model, plan.name).weight.dtype
        chosen, measured = backend, None
        if isinstance(backend, AutoBackend):
            if dtype not in choosers:  # each reads the table of measured choices
                choosers[dtype] = backend.chooser(device, dtype)
            chosen = choosers[dtype].choose(rows[plan.name], plan.in_features, plan.out_features)
            measured = choosers[dtype].float_rows(plan.in_features, plan.out_features)
        float_rows = settings.float_rows(plan.in_features * plan.out_features, rows[plan.name], measured)
        plan.backend_asked, plan.backend_used = backend.name, FALLBACK if float_rows else chosen.name
        parent, _, child = plan.name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(layer, chosen, dtype, float_rows))
        on_layer(plan)


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
    for group in groups:
        blocks = {block for name in group for block in in_blocks(layers, name)}
        for block in sorted(blocks):
            members = [layers[block + name] for name in group if block + name in layers]
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
        if not layer.backend.limits.fuses_gelu:
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
    """A copy of the module tree whose parameters and buffers are the same tensors: no memory until layers are replaced."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(t): t for t in tensors})


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum r^2 / sum (r - a)^2), in dB; infinity when equal."""
    signal, noise = reference.double().pow(2).sum(), (reference - approximation).double().pow(2).sum()
    return float("inf") if noise == 0 else 10 * torch.log10(signal / noise).item()
