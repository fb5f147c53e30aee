"""From a float denoiser to an INT8 one: select, calibrate, choose outlier methods, quantize, assemble.

build.py calls `quantize_denoiser`, which tells the order, and caches and saves what it returns. api.py uses
single steps. The loops over layers are in ptq/. Nothing here knows the settings of a run as a whole, or where
the weights come from: `LoadedModel` reads them.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from int8run.layers.assemble import assemble_int8_model
from int8run.layers.int8_conv import Int8Layer
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import AUTO, LayerPlan
from int8run.lora.stack import LoraStack
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import LayerStatistics, OutlierMethod
from int8run.pipeline.layer_selection import SelectedLayers, select_layers
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.outlier_choice import choose_methods
from int8run.pipeline.prequantized import PrequantizedLayers
from int8run.pipeline.quality_budget import (
    BoundLayers,
    is_from_cache,
    note_kept_attentions,
    read_mixed_precision,
    search_mixed_precision,
)
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.read_prequantized import read_prequantized_layers
from int8run.pipeline.trace_layers import TracedLayers
from int8run.ptq.bits import assign_bits
from int8run.ptq.calibration import capture_calibration_calls, collect_layer_statistics
from int8run.ptq.convolutions import ConvolutionBinder
from int8run.ptq.mixed_precision import MixedPrecisionResult
from int8run.ptq.quantize import (
    build_int8_layers,
    check_backend,
    check_outlier_method,
    keep_faster_layers,
    quantize_layers,
)
from int8run.report.console import Progress
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationData:
    """What the float model computed for the calibration images.

    Args:
        calls: arguments of the denoiser at some timesteps of each image.
        statistics: of the inputs of each layer that is fitted to them.
    """

    calls: Sequence[Mapping[str, Any]] = ()
    statistics: Mapping[str, LayerStatistics] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizedDenoiser:
    """An INT8 denoiser.

    Args:
        denoiser: a copy of the module tree that shares every float tensor with the float model.
        layers: the INT8 layers in it, by name.
        mixed_precision: what keeping layers float for `quality_db` brought; None where nothing was asked for.
    """

    denoiser: nn.Module
    layers: Mapping[str, Int8Layer]
    mixed_precision: MixedPrecisionResult | None


# -- the whole -------------------------------------------------------------------------------------


def quantize_denoiser(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    traced: TracedLayers,
    prequantized: PrequantizedLayers | None,
    loras: LoraStack,
    progress: Progress,
) -> QuantizedDenoiser:
    """Make the INT8 denoiser of a model.

    Args:
        loaded: the model, whose denoiser stays as it is.
        plans: of every Linear; what was done with each layer is noted there.
        settings: how layers become INT8.
        traced: what each layer which becomes INT8 gets in one step.
        prequantized: layers that exist already; None: all are quantized here.
        loras: adds baked LoRAs to the weights that are read.
        progress: of each step.

    Raises:
        ConfigError: when no layer becomes INT8, or the float model computes NaN.
        BackendError: when the backend cannot run here or cannot take a layer.
        FileError: when a layer of `prequantized` does not fit.
    """
    layers = select_layers(
        loaded, plans, rows=traced.rows, conv_inputs=traced.conv_inputs, prequantized=prequantized
    )
    check_settings(loaded, layers, settings)
    assign_bits(layers.new, settings.int8.fixed_layout)
    if not is_from_cache(prequantized):
        report_kept_bits(settings, layers)

    needs_search = settings.quality_db is not None and not is_from_cache(prequantized)
    calibration = calibrate(loaded, layers, settings, needs_search=needs_search, progress=progress)
    methods = choose_methods(loaded, layers, settings, statistics=calibration.statistics, progress=progress)

    quantized = yield_quantized_layers(
        loaded,
        layers,
        settings,
        methods=methods,
        statistics=calibration.statistics,
        prequantized=prequantized,
        loras=loras,
    )
    int8_layers = bind_layers(loaded, layers, settings, quantized=quantized, progress=progress)

    if needs_search:
        requantize = partial(
            yield_quantized_layers,
            loaded,
            settings=settings,
            methods=methods,
            statistics=calibration.statistics,
            prequantized=None,
            loras=loras,
        )
        bound = bind_fewer_bits(loaded, layers, settings, int8_layers, requantize, progress=progress)
        found = search_mixed_precision(
            loaded, layers, settings, bound=bound, calls=calibration.calls, progress=progress
        )
        return QuantizedDenoiser(*found)
    mixed_precision = read_mixed_precision(prequantized)
    if mixed_precision is not None:
        note_kept_attentions(settings, mixed_precision)
    return QuantizedDenoiser(
        denoiser=assemble_int8_model(loaded.denoiser, int8_layers, loaded.family, settings.attention_layers),
        layers=int8_layers,
        mixed_precision=mixed_precision,
    )


def leave_slow_layers_float(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    quantized: QuantizedDenoiser,
    loras: LoraStack,
) -> QuantizedDenoiser:
    """Put the float layers back where INT8 is not to compute; see `LayerPlan.float_reason`.

    Comes after the INT8 layers are stored, so that files do not depend on the machine that wrote them.

    Args:
        loaded: the model; float weights that it lacks are read.
        plans: of every Linear; layers that stay float are noted.
        settings: how layers become INT8.
        quantized: what `quantize_denoiser` made.
        loras: are added to weights that are read.
    """
    layers = keep_faster_layers(plans, quantized.layers)
    if len(layers) == len(quantized.layers):
        return quantized
    loaded.fill_weights(except_for=layers)
    loras.merge_late_weights()
    return QuantizedDenoiser(
        denoiser=assemble_int8_model(loaded.denoiser, layers, loaded.family, settings.attention_layers),
        layers=layers,
        mixed_precision=quantized.mixed_precision,
    )


# -- the steps -------------------------------------------------------------------------------------


def check_settings(loaded: LoadedModel, layers: SelectedLayers, settings: QuantizationSettings) -> None:
    """Check that backend and outlier method can take the layers, before anything is generated for them.

    Args:
        loaded: the model.
        layers: why the outlier method skips one is noted in its plan.
        settings: how layers become INT8.

    Raises:
        BackendError: when the backend cannot run here or cannot take a layer.
        ConfigError: when the outlier method can take none.
    """
    check_backend(settings.backend, loaded.device, layers.plans)
    if layers.new and not isinstance(settings.outlier, AutoOutlier):
        check_outlier_method(settings.outlier, layers.new)


def calibrate(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    *,
    needs_search: bool,
    progress: Progress,
) -> CalibrationData:
    """Let the float model generate the calibration images, where anything needs them.

    Args:
        loaded: the float model.
        layers: those that are quantized here may need statistics.
        settings: how layers become INT8.
        needs_search: whether a mixed precision search follows, which needs the calls alone.
        progress: of the images.

    Returns:
        Nothing in it where nothing needs it.
    """
    watched = select_watched_layers(layers, settings)
    if not watched and not needs_search:
        return CalibrationData()
    calls = capture_calibration_calls(
        loaded.pipe,
        loaded.component,
        loaded.denoiser,
        calibration=settings.calibration,
        sampling=loaded.sampling,
        progress=progress,
    )
    if not watched:
        return CalibrationData(calls)
    statistics = collect_layer_statistics(
        loaded.denoiser,
        watched,
        groups=[*layers.groups, *([plan.name] for plan in watched if not plan.is_linear)],
        calls=calls,
        calibration=settings.calibration,
    )
    return CalibrationData(calls, statistics)


def select_watched_layers(layers: SelectedLayers, settings: QuantizationSettings) -> list[LayerPlan]:
    """The layers that are fitted to activations: of convolutions `outlier=auto` alone compares methods."""
    if not settings.is_fitted:
        return []
    convolutions = layers.new_convolutions if isinstance(settings.outlier, AutoOutlier) else []
    return [*layers.new_linears, *convolutions]


def read_merged_weight(loaded: LoadedModel, loras: LoraStack, name: str) -> Tensor:
    """The float weight of a layer with the baked LoRAs added, [N, K] or a kernel [N, K, *kernel]."""
    return loras.merge_weight(name, loaded.read_weight(name))


def yield_quantized_layers(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    *,
    methods: Mapping[str, OutlierMethod],
    statistics: Mapping[str, LayerStatistics],
    prequantized: PrequantizedLayers | None,
    loras: LoraStack,
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """Read the layers that exist already, and quantize the others.

    One at a time, while `bind_layers` takes them: the float weights are never in memory together.

    Args:
        loaded: the model.
        layers: which of them exist.
        settings: how the others become INT8.
        methods: against outliers, of each of the others.
        statistics: of the inputs of those that are fitted to them.
        prequantized: has the ones that exist; None: there are none.
        loras: adds baked LoRAs to the weights that are read.
    """
    read_weight = partial(read_merged_weight, loaded, loras)
    if prequantized is not None:
        yield from read_prequantized_layers(loaded, layers.existing, prequantized, read_weight)
    yield from quantize_layers(
        loaded.denoiser,
        layers.new,
        methods=methods,
        rounding=settings.rounding,
        statistics=statistics,
        group_size=settings.int8.group_size,
        read=read_weight,
    )


def bind_layers(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    *,
    quantized: Iterable[tuple[LayerPlan, QuantizedLayer]],
    progress: Progress,
) -> dict[str, Int8Layer]:
    """Give each quantized layer its backend.

    Args:
        loaded: the model.
        layers: all that `quantized` yields.
        settings: how layers become INT8.
        quantized: the layers, one at a time.
        progress: of the layers.
    """
    label = "Quantizing layers" if layers.new else "Loading INT8 layers"
    with progress.track_loop(label, len(layers.plans)) as advance:

        def finish_layer(layer: Int8Layer) -> None:
            layer.to(loaded.offload_device)  # so that with offload= the GPU never holds them all
            advance(1)

        binder = ConvolutionBinder(settings.backend, loaded.device, settings.int8, layers.conv_inputs)
        linears = build_int8_layers(
            loaded.denoiser,
            binder.take_convolutions(loaded.denoiser, quantized, finish_layer),
            backend=settings.backend,
            settings=settings.int8,
            rows=layers.rows,
            on_layer=finish_layer,
            device=loaded.device,
        )
    made: dict[str, Int8Layer] = {**linears, **binder.made}
    return {plan.name: made[plan.name] for plan in layers.plans}


def bind_fewer_bits(
    loaded: LoadedModel,
    layers: SelectedLayers,
    settings: QuantizationSettings,
    int8_layers: Mapping[str, Int8Layer],
    requantize: Callable[[SelectedLayers], Iterable[tuple[LayerPlan, QuantizedLayer]]],
    *,
    progress: Progress,
) -> BoundLayers:
    """With `int8.bits=auto`, every layer also with 4 and 6 bits, where it can have them.

    They are all in memory at once, 1.4 bytes for each weight.

    Args:
        loaded: the model.
        layers: of the denoiser; those that exist already keep their bits.
        settings: how layers become INT8.
        int8_layers: with 8 bits, by name.
        requantize: makes layers with the bits of their plans.
        progress: of the layers.
    """
    if settings.int8.bits != AUTO:
        return BoundLayers(int8_layers)
    fewer_bits, plans_of_fewer = {}, {}
    for layout in settings.int8.list_layouts():
        plans = [replace(plan, measured={}) for plan in layers.new]
        assign_bits(plans, layout)
        narrow = [plan for plan in plans if plan.bits == layout.bits]
        selected = replace(layers, plans=narrow, new=narrow, existing=[])
        fewer_bits[layout.bits] = bind_layers(
            loaded, selected, settings, quantized=requantize(selected), progress=progress
        )
        plans_of_fewer[layout.bits] = {plan.name: plan for plan in narrow}
    return BoundLayers(int8_layers, fewer_bits, plans_of_fewer)


def report_kept_bits(settings: QuantizationSettings, layers: SelectedLayers) -> None:
    """Log what `int8.bits` does not change: layers that exist already, and attention."""
    bits = settings.int8.bits
    if bits == 8:
        return
    if layers.existing:
        log.warning(
            "int8.bits=%s: %s of the file as they are; quantize the float model to have other bits",
            bits,
            count_noun(len(layers.existing), "layer", "come"),
        )
    if settings.attention_layers:
        log.info("int8.bits=%s is about weights; attention computes with 8 bits", bits)
