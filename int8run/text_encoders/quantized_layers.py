"""Builds the quantized layers of a text encoder: reads or quantizes a weight, and binds it to a kernel.

INT8 layers with a scale for each row become `Int8Linear`, as a denoiser's do; every other format has a layer
of its own. `build` puts them into the model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.auto import AutoBackend
from int8run.backends.base import Backend
from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.kernels.dequantize.reference import infer_block_shape
from int8run.layers.block_int8_linear import BlockInt8Linear
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import Int8Settings, LayerPlan
from int8run.layers.weight_only import (
    PackedLayer,
    StoredWeight,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    is_rowwise,
    scaled_mm_unsupported_reason,
    to_quantized_weight,
)
from int8run.models.state_dict_adapter import StateDictLayout
from int8run.models.tensor_part import TensorPart
from int8run.outlier.base import OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.ptq.quantize import build_int8_layers, check_weight, round_weight_rows
from int8run.quant.formats import FORMATS, WeightFormat, choose_format
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.packed_weight import PackedWeight
from int8run.quant.weight import QuantizedWeight, sqnr_db
from int8run.text_encoders.base import DEQUANTIZE, SCALED_MM
from int8run.text_encoders.kernels import Kernels
from int8run.text_encoders.plan_layers import EMBED_SCALE, find_source_layer
from int8run.text_encoders.weights import EncoderWeights

# encoders are quantized for their memory: a float copy of the weights for calls with few rows, or a layer
# that stays float because that is faster, would cost what quantization saves
NO_FALLBACK = Int8Settings(small_batch_fallback="never", only_if_faster=False)
ROWWISE = "int8_rowwise"
# a layer's name, and a function that reads its weight -> the weight with LoRAs added; None: it stays as it is
WeightChange = Callable[[str, Callable[[], Tensor]], Tensor | None]


@dataclass(frozen=True)
class LayerSource:
    """What quantized layers are built from.

    Args:
        skeleton: the float model; its Linears give the biases and the dtypes.
        weights: where the weights come from.
        layout: where the model's parameters are in them.
        kernels: how the layers run.
        change_weight: adds LoRAs to weights.
    """

    skeleton: nn.Module
    weights: EncoderWeights
    layout: StateDictLayout
    kernels: Kernels
    change_weight: WeightChange


def build_quantized_modules(source: LayerSource, plans: Iterable[LayerPlan]) -> dict[str, nn.Module]:
    """Return the quantized layer of each plan, by name.

    Args:
        source: what they are built from.
        plans: of layers that are quantized; what their quantization costs and what runs them is noted there.
    """
    linears: list[LayerPlan] = []
    embeddings: list[LayerPlan] = []
    for plan in plans:
        if isinstance(source.skeleton.get_submodule(plan.name), nn.Linear):
            linears.append(plan)
        else:
            embeddings.append(plan)
    return {**build_embeddings(source, embeddings), **build_linears(source, linears)}


def build_embeddings(source: LayerSource, plans: Iterable[LayerPlan]) -> dict[str, nn.Module]:
    """Return the quantized embeddings by name; tied ones are one module."""
    modules: dict[str, nn.Module] = {}
    by_parts: dict[tuple[TensorPart, ...], nn.Module] = {}
    for plan in plans:
        parts = source.layout.parts[plan.name + WEIGHT]
        if parts not in by_parts:
            by_parts[parts] = build_embedding(source, plan)
        modules[plan.name] = by_parts[parts]
    return modules


def build_embedding(source: LayerSource, plan: LayerPlan) -> nn.Module:
    """Return a quantized embedding."""
    layer = build_packed_layer(source, plan)
    module: Any = source.skeleton.get_submodule(plan.name)
    plan.backend_asked, plan.backend_used = source.kernels.name, "look-up"
    return WeightOnlyEmbedding(
        layer.weight,
        layer.transform,
        module.weight.dtype,
        padding_idx=module.padding_idx,
        embed_scale=float(getattr(module, EMBED_SCALE, 1.0)),
    )


def build_linears(source: LayerSource, plans: Sequence[LayerPlan]) -> dict[str, nn.Module]:
    """Return the quantized Linears by name."""
    backend = source.kernels.backend
    if backend is None:
        return {plan.name: build_linear(source, plan, build_packed_layer(source, plan)) for plan in plans}
    others: dict[str, nn.Module] = {}

    # a generator, so that one weight at a time is in memory before it is bound to its kernel
    def iter_rowwise_layers() -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
        for plan in plans:
            layer = build_packed_layer(source, plan)
            weight = find_layer_weight(layer.weight)
            if weight is not None:
                yield plan, QuantizedLayer(weight, layer.transform, layer.bias)
            else:
                others[plan.name] = build_linear(source, plan, layer)

    int8_layers = build_int8_layers(
        source.skeleton,
        iter_rowwise_layers(),
        backend=backend,
        settings=NO_FALLBACK,
        rows={plan.name: source.kernels.num_tokens for plan in plans},
        device=source.kernels.device,
    )
    return {**int8_layers, **others}


def find_layer_weight(weight: StoredWeight) -> QuantizedWeight | GroupedWeight | None:
    """A weight as INT8 layers take it: int8 with scales of rows, or codes that decode to it; None: others."""
    if isinstance(weight, GroupedWeight):
        return weight
    if weight.storage_dtype == "int8" and is_rowwise(weight):
        return to_quantized_weight(weight)
    return None


def build_linear(source: LayerSource, plan: LayerPlan, layer: PackedLayer) -> nn.Module:
    """Return a quantized Linear that is not an `Int8Linear`.

    Args:
        source: what it is built from.
        plan: of the layer; what runs it is noted there.
        layer: its weight, transform and bias.
    """
    kernels = source.kernels
    plan.backend_asked = kernels.name
    module: Any = source.skeleton.get_submodule(plan.name)
    dtype = module.weight.dtype
    weight = layer.weight
    backend = kernels.backend
    if backend is not None and isinstance(weight, PackedWeight) and weight.storage_dtype == "int8":
        backend = choose_block_backend(backend, kernels, plan, weight, dtype)
        plan.backend_used = f"{backend.name}, in blocks"
        return BlockInt8Linear(layer, backend)
    if kernels.name == SCALED_MM and scaled_mm_unsupported_reason(layer.weight, kernels.device) is None:
        plan.backend_used = SCALED_MM
        return WeightOnlyLinear(layer, dtype, SCALED_MM)
    plan.backend_used = f"{DEQUANTIZE}, {kernels.dequantizer}"
    return WeightOnlyLinear(layer, dtype, kernels.dequantizer)


def choose_block_backend(
    backend: Backend, kernels: Kernels, plan: LayerPlan, weight: PackedWeight, dtype: torch.dtype
) -> Backend:
    """Return what multiplies the blocks of a weight; `auto` chooses by the size of one block."""
    if not isinstance(backend, AutoBackend):
        return backend
    assert weight.scale is not None, "int8 weights have scales"
    _, columns = infer_block_shape(weight.qdata.shape, weight.scale.shape, weight.block_size or None)
    chooser = backend.make_chooser(kernels.device, dtype)
    return chooser.choose_backend(kernels.num_tokens, columns, plan.out_features)


def build_packed_layer(source: LayerSource, plan: LayerPlan) -> PackedLayer:
    """Return one quantized layer on the device, with its bias as it is now.

    The weight is as the source has it where it has the planned format and no LoRA changes it, else it is
    quantized.
    """
    weights = source.weights
    source_layer = find_source_layer(source.layout.parts[plan.name + WEIGHT])
    assert source_layer is not None, "layers that are made of several tensors stay float"

    def read_weight() -> Tensor:
        return weights.read_tensor(source_layer + WEIGHT)

    changed_weight = source.change_weight(plan.name, read_weight)
    layer = None
    if changed_weight is None and plan.rounding == weights.get_format(source_layer):
        layer = weights.read_packed(source_layer)
    if layer is None:
        weight = read_weight() if changed_weight is None else changed_weight
        # int8 weights can be stored in ways that are not a format of `clip=`
        format_name = plan.rounding if plan.rounding in FORMATS else ROWWISE
        target = choose_format(format_name, plan.out_features, plan.in_features)
        layer = quantize_weight(plan, weight, target)
    plan.outlier = layer.transform.label
    device = source.kernels.device
    bias = getattr(source.skeleton.get_submodule(plan.name), "bias", None)
    return PackedLayer(layer.weight.to(device), layer.transform.to(device), bias)


def quantize_weight(plan: LayerPlan, weight: Tensor, target: WeightFormat) -> PackedLayer:
    """Quantize a float weight to a format.

    Args:
        plan: of the layer; the outlier method and the error are noted there.
        weight: [N, K].
        target: the format.

    Raises:
        ConfigError: for a weight that is empty or not finite.
    """
    check_weight(plan, weight)
    transform = OutlierTransform()
    if target.is_rotated:
        transform = ConvRot().fit(weight, None)
    plan.outlier = transform.label
    is_int8_rowwise = target.qdata_dtype == torch.int8 and target.granularity == "row"
    if is_int8_rowwise and weight.device.type == "cpu":
        # by a kernel, which is many times as fast
        rounded = round_weight_rows(plan, weight, transform)
        packed = PackedWeight(rounded.qdata, rounded.scale, (plan.out_features, plan.in_features))
        return PackedLayer(packed, transform, None)
    if target.is_grouped:
        transformed = transform.transform_rows(weight)
    else:
        transformed = transform.transform_weight(weight.float())
    quantized = target.quantize(transformed)
    plan.measured["weight_sqnr_db"] = sqnr_db(transformed, quantized.dequantize())
    return PackedLayer(quantized, transform, None)
