"""Builds a text encoder with quantized layers in the place of its Linears and embeddings.

Called for the encoders of a pipeline, and by `build_text_encoder`: match the weights with a skeleton, plan
its layers, read what is float, build what is quantized.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.errors import BackendError, FileError
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.plan import LayerPlan
from int8run.layers.weight_only import WeightOnlyLinear, scaled_mm_unsupported_reason
from int8run.models.state_dict_adapter import StateDictLayout
from int8run.models.tensor_part import TensorPart
from int8run.quant.formats import WeightFormat
from int8run.text_encoders.base import SCALED_MM
from int8run.text_encoders.kernels import Kernels, check_kernels
from int8run.text_encoders.plan_layers import (
    READ_AS_FLOAT,
    find_source_layer,
    format_counts,
    plan_encoder,
)
from int8run.text_encoders.quantized_layers import LayerSource, WeightChange, build_quantized_modules
from int8run.text_encoders.skeleton import remove_optional_modules
from int8run.text_encoders.state_dict_adapter import build_encoder_layout
from int8run.text_encoders.weights import EncoderWeights, name_file_in_errors, read_parts
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


@dataclass
class BuiltEncoder:
    """One text encoder with quantized layers.

    Args:
        module: what a pipeline calls.
        plans: what became of each Linear and embedding; `rounding` is the format.
        target: the format that float layers became; None: they stayed float.
        source: what the quantized layers were built from.
    """

    module: nn.Module
    plans: list[LayerPlan]
    target: WeightFormat | None
    source: LayerSource

    @property
    def skeleton(self) -> nn.Module:
        """The float module; it shares what is float with `module`, and lacks weights that are quantized."""
        return self.source.skeleton

    @property
    def quantized_plans(self) -> list[LayerPlan]:
        """Those of the quantized layers."""
        return [plan for plan in self.plans if plan.skip_reason is None]

    def refresh(self, names: Iterable[str]) -> None:
        """Build layers anew, with the LoRAs as they are now; float layers are left alone."""
        changed = set(names)
        self.rebuild([plan for plan in self.quantized_plans if plan.name in changed])

    def rebuild(self, plans: Iterable[LayerPlan]) -> None:
        """Build the layers of these plans and put them into the module."""
        for name, layer in build_quantized_modules(self.source, plans).items():
            replace_module(self.module, name, layer)


def build_encoder(
    skeleton: nn.Module,
    weights: EncoderWeights,
    target: WeightFormat | None,
    kernels: Kernels,
    attach_loras: Callable[[nn.Module], WeightChange] | None = None,
) -> BuiltEncoder:
    """Fill a skeleton with weights, quantized ones and float ones.

    Args:
        skeleton: without weights; buffers that no checkpoint holds have their values.
        weights: what to fill it with. Layers that are quantized there stay so.
        target: what other layers become, as far as the encoder's rules allow; None: float.
        kernels: how the quantized layers run.
        attach_loras: called with the skeleton once it has its float parts; gives what is added to weights.

    Raises:
        FileError: when the weights are of another model, are incomplete, or hold NaN.
        BackendError: when the kernels cannot run here, or cannot run any of the layers.
    """
    layout = fit_weights(weights, skeleton)
    check_missing(weights, layout)
    warn_unused(weights, layout)
    plans = plan_encoder(skeleton, weights, layout, target)
    check_kernels(kernels, plans, weights.where)
    quantized = {plan.name for plan in plans if plan.skip_reason is None}
    fill_skeleton(skeleton, weights, layout, without=quantized, device=kernels.device)
    change_weight: WeightChange = keep_weight
    if attach_loras is not None:
        change_weight = attach_loras(skeleton)
    source = LayerSource(
        skeleton=skeleton,
        weights=weights,
        layout=layout,
        kernels=kernels,
        change_weight=change_weight,
    )
    built = BuiltEncoder(copy_sharing_tensors(skeleton), plans, target, source)
    built.rebuild(built.quantized_plans)
    warn_formats(built)
    warn_read_as_float(built)
    if kernels.name == SCALED_MM:
        check_scaled_mm(built)
    return built


def keep_weight(name: str, read: Callable[[], Tensor]) -> None:
    """Change no weight; the `WeightChange` without LoRAs."""


def fit_weights(weights: EncoderWeights, model: nn.Module) -> StateDictLayout:
    """Find a model's parameters in a source.

    What text does not need and the source lacks is taken out of the model.

    Args:
        weights: the source.
        model: is changed.

    Raises:
        FileError: when they are not of one size.
    """
    with name_file_in_errors(weights.where):
        weights.resolve_padded_shapes(model)
        remove_optional_modules(weights.encoder, weights.shapes, model)
        return build_encoder_layout(weights.encoder, weights.shapes, model)


def check_missing(weights: EncoderWeights, layout: StateDictLayout) -> None:
    """Raise FileError, naming the first, when the weights lack parameters of the model."""
    if layout.missing:
        raise FileError(
            f"{weights.where}: {len(layout.missing)} parameters of the {weights.encoder.name} encoder "
            f"are not there (first: {layout.missing[0]}); the file is incomplete or of another size"
        )


def check_unused(weights: EncoderWeights, layout: StateDictLayout) -> None:
    """Raise FileError, naming the first, for tensors that have no place in the model.

    For a model whose sizes were read from the file: such a tensor contradicts the others.
    """
    if layout.unused:
        tensors = count_noun(len(layout.unused), "tensor", "have")
        raise FileError(
            f"{weights.where}: {tensors} no place in the {weights.encoder.name} "
            f"encoder that the others make (first: {layout.unused[0]}); "
            "the file is damaged, incomplete or of another encoder"
        )


def warn_unused(weights: EncoderWeights, layout: StateDictLayout) -> None:
    """Log the tensors that have no place in the model."""
    if layout.unused:
        log.warning(
            "%s: %s no place in the encoder (first: %s)",
            weights.where,
            count_noun(len(layout.unused), "tensor", "have"),
            layout.unused[0],
        )


def fill_skeleton(
    skeleton: nn.Module,
    weights: EncoderWeights,
    layout: StateDictLayout,
    *,
    without: Collection[str],
    device: torch.device,
) -> None:
    """Read every parameter and buffer that has no value, and bring the others to the device.

    Args:
        skeleton: is filled.
        weights: the source.
        layout: where the parameters are in it.
        without: layers whose weights are not read.
        device: where the values go.
    """
    left_out = {name + WEIGHT for name in without}
    reader = ParameterReader(weights, device)
    for prefix, module in skeleton.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                key = f"{prefix}.{name}".removeprefix(".")
                if tensor is None:
                    continue
                if not tensor.is_meta:
                    tensors[name] = tensor.to(device)
                elif key not in left_out:
                    parameter = reader.read(layout.parts[key], tensor)
                    tensors[name] = parameter if tensors is module._parameters else parameter.data


class ParameterReader:
    """Reads parameters to a device; tied ones are read once and are one object.

    Args:
        weights: the source.
        device: where the values go.
    """

    def __init__(self, weights: EncoderWeights, device: torch.device):
        self.weights = weights
        self.device = device
        self.known: dict[tuple[tuple[TensorPart, ...], torch.dtype], nn.Parameter] = {}

    def read(self, parts: tuple[TensorPart, ...], like: Tensor) -> nn.Parameter:
        """Return a parameter.

        Args:
            parts: of the source, one after the other.
            like: has its dtype and shape.
        """
        key = (parts, like.dtype)
        if key not in self.known:
            value = read_parts(self.weights, parts).to(like.dtype).reshape(like.shape)
            on_device = value.contiguous().to(self.device)
            self.known[key] = nn.Parameter(on_device, requires_grad=False)
        return self.known[key]


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the module of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.eval())


def warn_formats(built: BuiltEncoder) -> None:
    """Log the layers that are in another format than the requested one, or were quantized before."""
    if built.target is None:
        return
    where, target = built.source.weights.where, built.target.name
    fallbacks: Counter[str] = Counter()
    requantized: Counter[str] = Counter()
    for plan in built.quantized_plans:
        if plan.outlier_skip_reason:
            fallbacks[f"{plan.rounding}: {plan.outlier_skip_reason}"] += 1
        source_layer = find_source_layer(built.source.layout.parts[plan.name + WEIGHT])
        source_format = built.source.weights.get_format(source_layer or "")
        if source_format not in ("", plan.rounding):
            requantized[source_format] += 1
    if fallbacks:
        layers = count_noun(fallbacks.total(), "layer")
        log.warning("%s: %s cannot be %s: %s", where, layers, target, format_counts(fallbacks))
    if requantized:
        log.warning(
            "%s: quantized layers are dequantized and rounded once more: %s",
            where,
            format_counts(requantized),
        )


def warn_read_as_float(built: BuiltEncoder) -> None:
    """Log the layers that are quantized in the source and float in memory."""
    reasons = [plan.skip_reason for plan in built.plans if plan.skip_reason is not None]
    read_as_float = Counter(reason for reason in reasons if READ_AS_FLOAT in reason)
    if read_as_float:
        log.warning(
            "%s: %s in memory as floats: %s",
            built.source.weights.where,
            count_noun(read_as_float.total(), "quantized layer", "are"),
            format_counts(read_as_float),
        )


def check_scaled_mm(built: BuiltEncoder) -> None:
    """Log the layers that `scaled_mm` does not run.

    Raises:
        BackendError: when it runs none.
    """
    where, device = built.source.weights.where, built.source.kernels.device
    layers = [module for module in built.module.modules() if isinstance(module, WeightOnlyLinear)]
    reasons = [scaled_mm_unsupported_reason(layer.stored_weight, device) for layer in layers]
    unsupported = Counter(reason for reason in reasons if reason is not None)
    if not unsupported:
        return
    if unsupported.total() == len(layers):
        raise BackendError(
            f"clip.kernel_backend={SCALED_MM} can run none of the layers of {where}: "
            f"{format_counts(unsupported)}; choose auto"
        )
    log.warning(
        "clip.kernel_backend=%s dequantizes %s of %s: %s",
        SCALED_MM,
        count_noun(unsupported.total(), "layer"),
        where,
        format_counts(unsupported),
    )
