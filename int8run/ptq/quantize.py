"""The loops over a model's Linears: quantize each one, and bind each result to a backend.

`int8run.pipeline`, `int8run.text_encoders` and the Python API call these with a list of `LayerPlan`, and
write what was decided and measured into the plans. Nothing here knows where weights or calibration data come
from.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from int8run.backends.auto import AutoBackend, BackendChooser, LayerChoice
from int8run.backends.base import Backend, find_instruction_set
from int8run.backends.float import Float
from int8run.backends.registry import list_usable_backends
from int8run.errors import BackendError, ConfigError
from int8run.kernels.cpu.rows import quantize_weight_rows
from int8run.layers.grouped_int8_linear import make_int8_linear
from int8run.layers.int8_conv import Int8Layer, get_layer
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer, get_linear
from int8run.layers.plan import ATTENTION, CONV, FLOAT_FALLBACK, Int8Settings, LayerPlan
from int8run.outlier.base import (
    LayerStatistics,
    OutlierMethod,
    OutlierTransform,
    find_channel_obstacle,
    fit_convolution,
)
from int8run.ptq.bits import report_decoding
from int8run.quant.grouped_rounding import DEFAULT_GROUP_SIZE, GroupLayout, find_layout
from int8run.quant.grouped_weight import LayerWeight
from int8run.quant.rounding import AbsMax, Rounding, round_to_bits
from int8run.quant.weight import QuantizedWeight, sqnr_db

log = logging.getLogger(__name__)


def check_outlier_method(outlier: OutlierMethod, plans: Sequence[LayerPlan]) -> None:
    """Note in the plans which layers the method cannot take; they are quantized without it.

    Raises:
        ConfigError: when it can take none.
    """
    plans = [plan for plan in plans if plan.kind != ATTENTION]
    for plan in plans:
        plan.outlier_skip_reason = find_outlier_obstacle(outlier, plan) or ""
    counts = Counter(plan.outlier_skip_reason for plan in plans if plan.outlier_skip_reason)
    reasons = "; ".join(f"{count} × {reason}" for reason, count in counts.items())
    n_skipped = counts.total()
    if n_skipped and n_skipped == len(plans):
        raise ConfigError(
            f"outlier={outlier.name} can take none of the {len(plans)} layers ({reasons}); "
            "choose another outlier="
        )
    if n_skipped:
        log.warning(
            "outlier=%s cannot take %d of %d layers (%s); these are plain INT8",
            outlier.name,
            n_skipped,
            len(plans),
            reasons,
        )


def find_outlier_obstacle(outlier: OutlierMethod, plan: LayerPlan) -> str | None:
    """Why a method cannot take a Linear or a convolution; None when it can."""
    if plan.kind == CONV:
        return find_channel_obstacle(outlier, plan.channels)
    return outlier.unsupported_reason(plan.in_features)


def check_backend(backend: Backend, device: torch.device, plans: Iterable[LayerPlan]) -> None:
    """Check that a backend can run here and can take every layer, before anything is quantized.

    Raises:
        BackendError: with every reason, and every layer that it cannot take.
    """
    reasons = backend.limits.unsupported_reasons(device)
    if reasons:
        usable = ", ".join(list_usable_backends(device))
        way_out = "set device=cpu, or int8.enable=false for the float model"
        if usable:
            way_out = f"these can: {usable}"
        raise BackendError(f"backend {backend.name!r} cannot run here: {'; '.join(reasons)}; {way_out}")
    unsupported = []
    for plan in plans:
        if not plan.is_linear:
            continue
        reasons = backend.limits.unsupported_layer_reasons(plan.in_features, plan.out_features)
        if reasons:
            unsupported.append(f"{plan.name}: {', '.join(reasons)}")
    if unsupported:
        raise BackendError(
            f"backend {backend.name!r} cannot take {len(unsupported)} layers: {'; '.join(unsupported)}; "
            "backend=auto gives them to another"
        )


def check_weight(plan: LayerPlan, weight: Tensor) -> None:
    """Check that a weight can be quantized.

    Raises:
        ConfigError: naming the layer.
    """
    if not weight.numel():
        raise ConfigError(
            f"{plan.name}: the weight is {plan.out_features} x {plan.in_features}, nothing to quantize; "
            "keep the layer float"
        )
    if not torch.isfinite(weight).all():
        raise ConfigError(
            f"{plan.name}: the weight holds NaN or infinity and cannot be quantized; check the checkpoint"
        )


def quantize_layers(
    model: nn.Module,
    plans: Iterable[LayerPlan],
    *,
    methods: Mapping[str, OutlierMethod],
    rounding: Rounding,
    statistics: Mapping[str, LayerStatistics],
    group_size: int = DEFAULT_GROUP_SIZE,
    read: Callable[[str], Tensor] | None = None,
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """Quantize each planned Linear, one at a time, so that the caller decides what stays in memory.

    Args:
        model: the float model.
        plans: of the Linears to quantize.
        methods: outlier method of each layer, by name; a layer without one is quantized as it is.
        rounding: makes the integers.
        statistics: of the layers that a calibration reached, where a method or the rounding needs one.
        group_size: columns that share a scale, of weights whose plan has 4 or 6 bits.
        read: gives the float weight of a Linear by its name; None: the model has them all.

    Raises:
        ConfigError: for a weight that cannot be quantized, or a layer that the calibration did not reach.
    """
    for plan in plans:
        float_layer = get_layer(model, plan.name)
        weight = float_layer.weight.detach() if read is None else read(plan.name)
        weight = weight.flatten(1)  # [N, K]; of a convolution [N, C / groups, *kernel] -> [N, K]
        layer_rounding = rounding
        if plan.kind == CONV and rounding.needs_calibration:
            layer_rounding = AbsMax()  # it is fitted to products of rows, which a convolution has none of
        if not weight.numel():
            check_weight(plan, weight)
        method, layer_statistics = methods.get(plan.name), statistics.get(plan.name)
        if layer_statistics is None:
            check_needs_no_statistics(plan, method, layer_rounding)
        transform = OutlierTransform()
        if method is not None and plan.kind == CONV:
            transform = fit_convolution(method, weight, plan.taps)
        elif method is not None:
            transform = method.fit(weight, layer_statistics)
        transform.to(weight.device)
        quantized: LayerWeight
        if plan.bits == 8 and type(layer_rounding) is AbsMax and weight.device.type == "cpu":
            quantized = round_weight_rows(plan, weight, transform)
        else:
            layout = None if plan.bits == 8 else GroupLayout(plan.bits, group_size)
            quantized = round_weight(plan, weight, transform, layer_rounding, layer_statistics, layout)
        plan.outlier, plan.rounding = transform.label, layer_rounding.name
        yield plan, QuantizedLayer(quantized, transform, float_layer.bias)


def check_needs_no_statistics(plan: LayerPlan, method: OutlierMethod | None, rounding: Rounding) -> None:
    """Check a layer that the calibration did not reach.

    Args:
        plan: of the layer.
        method: its outlier method; None: it has none.
        rounding: makes the integers.

    Raises:
        ConfigError: when either needs statistics.
    """
    method_needs = method is not None and method.needs_calibration
    if method_needs or rounding.needs_calibration:
        raise ConfigError(
            f"{plan.name}: the calibration never reached it; keep the layer float, or take other "
            "calibration.prompts"
        )


def round_weight(
    plan: LayerPlan,
    weight: Tensor,
    transform: OutlierTransform,
    rounding: Rounding,
    statistics: LayerStatistics | None,
    layout: GroupLayout | None = None,
) -> LayerWeight:
    """A weight in the transform's basis, rounded; its error goes into the plan.

    Args:
        plan: of the layer.
        weight: [N, K].
        transform: of the layer.
        rounding: makes the integers.
        statistics: of the layer's input, for a rounding that needs them.
        layout: of a weight with 4 or 6 bits; None: it has 8.

    Raises:
        ConfigError: for a weight that is not finite, or a rounding that has no weights of these bits.
    """
    check_weight(plan, weight)
    if layout is None:
        transformed = transform.transform_weight(weight.float())
    else:
        transformed = transform.transform_rows(weight)
    inputs = None
    if rounding.needs_calibration and statistics is not None:
        sample = statistics.sample.to(weight.device)
        inputs = transform.round_input(sample).flatten(0, -2)  # [S, T, K] -> [S T, K]
    quantized = round_to_bits(rounding, transformed, inputs, layout)
    plan.measured["weight_sqnr_db"] = sqnr_db(transformed, quantized.dequantize())
    plan.measured["saturated_share"] = quantized.saturated_share
    return quantized


def round_weight_rows(plan: LayerPlan, weight: Tensor, transform: OutlierTransform) -> QuantizedWeight:
    """The same for the rounding `absmax` on a CPU, by int8run's own kernels, which are many times as fast.

    Args:
        plan: of the layer; the error of the weight goes into it.
        weight: [N, K].
        transform: of the layer.

    Raises:
        ConfigError: for a weight that is not finite.
    """
    q = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), 1)
    columns = transform.arrange_columns(weight).contiguous()
    sums = quantize_weight_rows(columns, q, scale, transform.factor, transform.rotation)
    if not sums.finite:
        check_weight(plan, weight)
        raise ConfigError(
            f"{plan.name}: the weight overflows under {transform.label}; "
            "keep the layer float, or set outlier=none"
        )
    plan.measured["weight_sqnr_db"] = math.inf
    if sums.signal and sums.noise:
        plan.measured["weight_sqnr_db"] = 10 * math.log10(sums.signal / sums.noise)
    plan.measured["saturated_share"] = sums.saturated / q.numel()
    return QuantizedWeight(transform.restore_columns(q), scale)


class LayerBackends:
    """The backend of each layer: the one of the config, or what `backend=auto` chooses for the layer's shape.

    Args:
        backend: of the config.
        device: where the layers run.
        only_if_faster: whether `auto` also says where the float layer is faster.
    """

    def __init__(self, backend: Backend, device: torch.device, *, only_if_faster: bool):
        self.backend, self.device = backend, device
        self.only_if_faster = only_if_faster
        self.choosers: dict[torch.dtype, BackendChooser] = {}  # each reads the file of measured choices

    def choose_backend(
        self, plan: LayerPlan, rows: int, dtype: torch.dtype, layout: GroupLayout | None
    ) -> tuple[Backend, int | None]:
        """The backend of one layer, and up to how many rows float is faster, where that was measured.

        What was measured, and whether the layer is to stay float, is noted in the plan.

        Args:
            plan: of the layer.
            rows: that the layer sees in one call.
            dtype: of the float model.
            layout: of its weight, where that has 4 or 6 bits; None: it has 8.
        """
        if isinstance(self.backend, Float):
            plan.float_reason = "backend=float"
        if not isinstance(self.backend, AutoBackend):
            return self.backend, None
        if dtype not in self.choosers:
            self.choosers[dtype] = self.backend.make_chooser(
                self.device, dtype, times_float=self.only_if_faster
            )
        chooser = self.choosers[dtype]
        choice = chooser.choose_layer((rows, plan.in_features, plan.out_features), layout)
        only_if_faster = self.only_if_faster and layout is None
        note_choice(plan, choice, rows=rows, only_if_faster=only_if_faster)
        # without only_if_faster nothing asks for the ratio, and one that the cache has from an earlier run
        # must not change what the same config makes of a layer
        comparison = choice.comparison
        if only_if_faster and comparison.speedup is not None and not comparison.is_float_faster:
            # what was measured for this very number of rows counts more than what holds in general
            return choice.backend, 0
        return choice.backend, chooser.measured_float_rows(plan.in_features, plan.out_features)


def note_choice(plan: LayerPlan, choice: LayerChoice, *, rows: int, only_if_faster: bool) -> None:
    """Write what `backend=auto` found into a layer's plan.

    Args:
        plan: of the layer.
        choice: for its shape.
        rows: that it was measured with.
        only_if_faster: whether the layer stays float where that is faster.
    """
    plan.backends_left_out = "; ".join(f"{name}: {reason}" for name, reason in choice.failures.items())
    plan.speedup = choice.comparison.speedup
    if only_if_faster and choice.comparison.is_float_faster:
        plan.float_reason = choice.comparison.explain_float(choice.backend.name, f"at {rows} rows")


def keep_faster_layers(plans: Sequence[LayerPlan], layers: Mapping[str, Int8Layer]) -> dict[str, Int8Layer]:
    """The layers that compute in INT8; those of which the plans say otherwise are noted as float.

    Args:
        plans: of all Linears.
        layers: from `build_int8_layers`, by name.
    """
    chosen = [plan for plan in plans if plan.skip_reason is None and plan.float_reason]
    for plan in chosen:
        plan.leave_float()
    if any(plan.speedup is not None for plan in chosen):
        log.info(
            "%d of %d layers stay float, which is faster here than INT8; int8.only_if_faster=false makes "
            "them INT8 for their memory",
            len(chosen),
            len(layers),
        )
    kept_float = {plan.name for plan in plans if plan.skip_reason is not None}
    return {name: layer for name, layer in layers.items() if name not in kept_float}


def build_int8_layers(
    model: nn.Module,
    layers: Iterable[tuple[LayerPlan, QuantizedLayer]],
    *,
    backend: Backend,
    settings: Int8Settings,
    rows: Mapping[str, int],
    on_layer: Callable[[Int8Linear], object] | None = None,
    device: torch.device | None = None,
) -> dict[str, Int8Linear]:
    """Bind each quantized layer to a backend.

    Args:
        model: the float model.
        layers: from `quantize_layers`, or read from a file.
        backend: of the config.
        settings: which layers compute in float when a call has few rows.
        rows: rows that each layer sees in this run, by name; `backend=auto` measures with them.
        on_layer: called with each layer once it is made.
        device: where the layers will run; None: where the model is.

    Returns:
        The layers by the name of the Linear whose place they can take.
    """
    if device is None:
        device = next(p.device for p in model.parameters() if not p.is_meta)
    backends = LayerBackends(backend, device, only_if_faster=settings.leaves_slow_layers_float)
    matrices: dict[tuple[int, bool], Tensor | None] = {}
    made = {}
    for plan, layer in layers:
        share_matrix(layer.transform, matrices)
        dtype = get_linear(model, plan.name).weight.dtype
        layout = find_layout(layer.weight)
        chosen, measured = backends.choose_backend(plan, rows[plan.name], dtype, layout)
        params = plan.in_features * plan.out_features
        float_rows = settings.choose_float_rows(params, rows[plan.name], measured)
        plan.backend_asked = backend.name
        plan.backend_used = FLOAT_FALLBACK if float_rows else chosen.name
        plan.instructions = "" if float_rows else find_instruction_set(chosen)
        made[plan.name] = make_int8_linear(layer, chosen, dtype, float_rows)
        if on_layer is not None:
            on_layer(made[plan.name])
    report_decoding(made.values())
    return made


def share_matrix(transform: OutlierTransform, matrices: dict[tuple[int, bool], Tensor | None]) -> None:
    """Let transforms with the same rotation hold one matrix.

    Args:
        transform: changed in place.
        matrices: those seen so far, by size and construction.
    """
    rotation = (transform.group_size, transform.sylvester)
    transform.matrix = matrices.setdefault(rotation, transform.matrix)
