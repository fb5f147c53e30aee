"""The loops over a model's Linears: which ones, to what, and put in place."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from int8run.backends.auto import AutoBackend, BackendChooser
from int8run.backends.base import Backend
from int8run.backends.registry import list_usable_backends
from int8run.errors import BackendError, ConfigError
from int8run.kernels.cpu.rows import quantize_weight_rows
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer, get_linear
from int8run.layers.plan import FLOAT_FALLBACK, Int8Settings, LayerPlan
from int8run.outlier.base import LayerStatistics, OutlierMethod, OutlierTransform
from int8run.quant.rounding import AbsMax, Rounding
from int8run.quant.weight import QuantizedWeight, sqnr_db

log = logging.getLogger(__name__)


def check_outlier_method(outlier: OutlierMethod, plans: Sequence[LayerPlan]) -> None:
    """Note in the plan which layers the method cannot take; they are quantized without it.

    Raises:
        ConfigError: when it can take none.
    """
    for plan in plans:
        plan.outlier_skip_reason = outlier.unsupported_reason(plan.in_features) or ""
    refused = [plan for plan in plans if plan.outlier_skip_reason]
    reasons = "; ".join(
        f"{n} × {why}" for why, n in Counter(plan.outlier_skip_reason for plan in refused).items()
    )
    if len(refused) == len(plans):
        raise ConfigError(
            f"outlier={outlier.name} can take none of the {len(plans)} layers ({reasons}); choose another outlier="
        )
    if refused:
        log.warning(
            "outlier=%s cannot take %d of %d layers (%s); these are plain INT8",
            outlier.name,
            len(refused),
            len(plans),
            reasons,
        )


def quantize_layers(
    model: nn.Module,
    plans: Iterable[LayerPlan],
    methods: Mapping[str, OutlierMethod],
    rounding: Rounding,
    statistics: Mapping[str, LayerStatistics],
    read: Callable[[str], Tensor] | None = None,
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """Quantize each planned Linear, one at a time, so that a consumer decides what stays in memory.

    Args:
        read: gives the float weight of a Linear by its name; None: the model has them all.
        methods: outlier method of each layer; one without is quantized as it is.
        statistics: of the layers that a calibration reached, where a method or the rounding needs one.
    """
    for plan in plans:
        linear = get_linear(model, plan.name)
        original = linear.weight.detach() if read is None else read(plan.name)
        if not original.numel():
            check_weight(plan, original)
        seen = statistics.get(plan.name)
        method = methods.get(plan.name)
        if seen is None and (rounding.needs_calibration or (method is not None and method.needs_calibration)):
            raise ConfigError(
                f"{plan.name}: the calibration never reached it; keep the layer float, or take other calibration.prompts"
            )
        transform = OutlierTransform() if method is None else method.fit(original, seen)
        transform.to(original.device)
        if (
            type(rounding) is AbsMax and original.device.type == "cpu"
        ):  # by kernels of our own, many times as fast
            weight = round_weight_rows(plan, original, transform)
            plan.outlier, plan.rounding = transform.label, rounding.name
            yield plan, QuantizedLayer(weight, transform, linear.bias)
            continue
        check_weight(plan, original)
        transformed = transform.transform_weight(original.float())
        inputs = None
        if rounding.needs_calibration and seen is not None:
            inputs = transform.round_input(seen.sample.to(original.device)).flatten(0, -2)
        weight = rounding.round_weight(transformed, inputs)
        plan.outlier, plan.rounding = transform.label, rounding.name
        plan.measured["weight_sqnr_db"] = sqnr_db(transformed, weight.dequantize())
        plan.measured["saturated_share"] = weight.saturated_share
        yield plan, QuantizedLayer(weight, transform, linear.bias)


def round_weight_rows(plan: LayerPlan, original: Tensor, transform: OutlierTransform) -> QuantizedWeight:
    """A weight in the transform's basis, rounded by `absmax`, and in the plan what that cost.

    Raises:
        ConfigError: for a weight that is not finite.
    """
    q = torch.empty(original.shape, dtype=torch.int8)
    scale = torch.empty(len(original), 1)
    sums = quantize_weight_rows(original.contiguous(), q, scale, transform.factor, transform.rotation)
    if not sums.finite:
        check_weight(plan, original)
        raise ConfigError(
            f"{plan.name}: the weight overflows under {transform.label}; keep the layer float, or set outlier=none"
        )
    plan.measured["weight_sqnr_db"] = (
        10 * math.log10(sums.signal / sums.noise) if sums.signal and sums.noise else math.inf
    )
    plan.measured["saturated_share"] = sums.saturated / q.numel()
    return QuantizedWeight(q, scale)


def check_weight(plan: LayerPlan, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized.

    Raises:
        ConfigError: naming the layer.
    """
    if not weight.numel():
        raise ConfigError(
            f"{plan.name}: the weight is {plan.out_features} x {plan.in_features}, nothing to quantize; keep the layer float"
        )
    if not torch.isfinite(weight).all():
        raise ConfigError(
            f"{plan.name}: the weight holds NaN or infinity and cannot be quantized; check the checkpoint"
        )


def check_backend(backend: Backend, device: torch.device, plans: Iterable[LayerPlan]) -> None:
    """Refuse a backend that cannot run here, or cannot take a layer, before anything is quantized.

    Raises:
        BackendError: with every reason, and every layer that it cannot take.
    """
    reasons = backend.limits.unsupported_reasons(device)
    if reasons:
        able = ", ".join(list_usable_backends(device))
        raise BackendError(
            f"backend {backend.name!r} cannot run here: {'; '.join(reasons)}; these can: {able}"
        )
    refused = {
        p.name: why
        for p in plans
        if (why := backend.limits.unsupported_layer_reasons(p.in_features, p.out_features))
    }
    if refused:
        listed = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
        raise BackendError(
            f"backend {backend.name!r} cannot take {len(refused)} layers: {listed}; backend=auto gives them to another"
        )


def build_int8_layers(
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
    choosers: dict[torch.dtype, BackendChooser] = {}
    matrices: dict[tuple[int, bool], Tensor | None] = {}  # one of each kind serves all layers
    made = {}
    for plan, layer in layers:
        layer.transform.matrix = matrices.setdefault(
            (layer.transform.group_size, layer.transform.sylvester), layer.transform.matrix
        )
        dtype = get_linear(model, plan.name).weight.dtype
        chosen, measured = backend, None
        if isinstance(backend, AutoBackend):
            if dtype not in choosers:  # each reads the table of measured choices
                choosers[dtype] = backend.make_chooser(device, dtype)
            chosen = choosers[dtype].choose_backend(rows[plan.name], plan.in_features, plan.out_features)
            measured = choosers[dtype].measured_float_rows(plan.in_features, plan.out_features)
        float_rows = settings.choose_float_rows(
            plan.in_features * plan.out_features, rows[plan.name], measured
        )
        plan.backend_asked, plan.backend_used = backend.name, FLOAT_FALLBACK if float_rows else chosen.name
        made[plan.name] = Int8Linear(layer, chosen, dtype, float_rows)
        on_layer(plan)
    return made
