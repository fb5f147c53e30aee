"""A text encoder with quantized layers in the place of its Linears and embeddings."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.auto import AutoBackend
from int8run.backends.base import Backend
from int8run.backends.registry import make_backend
from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.errors import BackendError, FileError
from int8run.kernels.dequantize.reference import infer_block_shape
from int8run.layers.fusion import copy_sharing_tensors
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import Int8Settings, LayerPlan
from int8run.layers.weight_only import (
    BlockInt8Linear,
    PackedLayer,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    is_rowwise,
    scaled_mm_unsupported_reason,
    to_quantized_weight,
)
from int8run.models.state_dict_adapter import StateDictLayout, TensorPart
from int8run.outlier.base import OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.ptq.quantize import build_int8_layers, check_backend, check_weight, round_weight_rows
from int8run.quant.formats import FORMATS, WeightFormat, choose_format
from int8run.quant.packed_weight import PackedWeight
from int8run.quant.weight import sqnr_db
from int8run.text_encoders.base import DEQUANTIZE, SCALED_MM
from int8run.text_encoders.registry import EncoderFamily
from int8run.text_encoders.skeleton import remove_optional_modules
from int8run.text_encoders.state_dict_adapter import build_encoder_layout
from int8run.text_encoders.weights import EncoderWeights, check_finite, name_file_in_errors

log = logging.getLogger(__name__)
# weights stay as they are stored: a float copy for few rows would cost what they save
NO_FALLBACK = Int8Settings(small_batch_fallback="never")
ROWWISE = "int8_rowwise"
EMBED_SCALE = "embed_scale"  # what Gemma's embeddings multiply to their rows
# a layer's name and its weight, to be read if it is wanted -> the weight with what is added to it; None:
# nothing is
WeightChange = Callable[[str, Callable[[], Tensor]], Tensor | None]


@dataclass(frozen=True)
class Kernels:
    """How quantized layers run.

    Args:
        word: `auto`, an INT8 backend, `dequantize` or `scaled_mm`.
        rows: tokens of a call, which `auto` measures with.
    """

    word: str
    device: torch.device
    rows: int

    @cached_property
    def backend(self) -> Backend | None:
        """What runs INT8 layers; None: float products."""
        return None if self.word in (DEQUANTIZE, SCALED_MM) else make_backend(self.word)

    @property
    def reader(self) -> str:
        """What reads codes as floats."""
        if self.word == "reference":
            return self.word
        return (
            "triton"
            if self.device.type == "cuda" and self.word in ("auto", "triton", DEQUANTIZE)
            else "eager"
        )


@dataclass
class BuiltEncoder:
    """One text encoder with quantized layers.

    Args:
        module: what a pipeline calls.
        skeleton: the float module; it shares what is float with `module`, and has no weights where that is
            quantized.
        plans: what became of each Linear and embedding; `rounding` is the format.
    """

    module: nn.Module
    skeleton: nn.Module
    plans: list[LayerPlan]
    weights: EncoderWeights
    layout: StateDictLayout
    to: WeightFormat | None
    kernels: Kernels
    merged: WeightChange

    def refresh(self, names: Iterable[str]) -> None:
        """Make layers anew from the source, with what `merged` adds to their weights now. Float layers are left alone."""
        wanted = set(names)
        plans = [plan for plan in self.plans if plan.name in wanted and plan.skip_reason is None]
        for name, layer in build_quantized_modules(self, plans).items():
            replace_module(self.module, name, layer)


def build_encoder(
    skeleton: nn.Module,
    weights: EncoderWeights,
    to: WeightFormat | None,
    kernels: Kernels,
    adopt: Callable[[nn.Module], WeightChange] | None = None,
) -> BuiltEncoder:
    """Fill a skeleton.

    Args:
        skeleton: without weights, its buffers are there.
        weights: what to fill it with. Layers that are quantized there stay so.
        to: what other layers become, as far as the encoder's family allows; None: float.
        adopt: called with the skeleton when its float parts are there; gives what is added to weights that
            are read (LoRAs).

    Raises:
        FileError: when the weights are of another model, are incomplete, or hold NaN.
        BackendError: when the kernels cannot run here, or cannot run any of the layers.
    """
    layout = fit_weights(weights, skeleton)
    check_and_warn_unused(weights, layout)
    plans = plan_encoder(skeleton, weights, layout, to)
    check_kernels(kernels, plans, weights)
    fill_skeleton(
        skeleton, weights, layout, {plan.name for plan in plans if plan.skip_reason is None}, kernels.device
    )
    merged = adopt(skeleton) if adopt is not None else lambda name, read: None
    built = BuiltEncoder(
        copy_sharing_tensors(skeleton), skeleton, plans, weights, layout, to, kernels, merged
    )
    for name, layer in build_quantized_modules(
        built, [plan for plan in plans if plan.skip_reason is None]
    ).items():
        replace_module(built.module, name, layer)
    log_layer_counts(built)
    return built


def fit_weights(weights: EncoderWeights, model: nn.Module) -> StateDictLayout:
    """Where a model's parameters are; what no text needs and the weights lack is taken out of the model.

    Raises:
        FileError: when they are not of one size.
    """
    with name_file_in_errors(weights.where):
        weights.resolve_padded_shapes(model)
        remove_optional_modules(weights.encoder, weights.shapes, model)
        return build_encoder_layout(weights.encoder, weights.shapes, model)


def check_complete(weights: EncoderWeights, layout: StateDictLayout) -> None:
    """Refuse weights that lack something, and those of a file whose sizes were read from it and that holds more.

    Raises:
        FileError: naming the first.
    """
    check_missing(weights, layout)
    if layout.unused:
        raise FileError(
            f"{weights.where}: {len(layout.unused)} tensors have no place in the {weights.encoder.name} encoder that the others make "
            f"(first: {layout.unused[0]}); the file is damaged, incomplete or of another encoder"
        )


def check_missing(weights: EncoderWeights, layout: StateDictLayout) -> None:
    """Refuse weights that lack something.

    Raises:
        FileError: naming the first.
    """
    if layout.missing:
        raise FileError(
            f"{weights.where}: {len(layout.missing)} parameters of the {weights.encoder.name} encoder are not there (first: "
            f"{layout.missing[0]}); the file is incomplete or of another size"
        )


def check_and_warn_unused(weights: EncoderWeights, layout: StateDictLayout) -> None:
    """Refuse weights that lack something, and say what of them has no place.

    Raises:
        FileError: naming the first.
    """
    check_missing(weights, layout)
    if layout.unused:
        log.warning(
            "%s: %d tensors have no place in the encoder (first: %s)",
            weights.where,
            len(layout.unused),
            layout.unused[0],
        )


def plan_encoder(
    skeleton: nn.Module, weights: EncoderWeights, layout: StateDictLayout, to: WeightFormat | None
) -> list[LayerPlan]:
    """What becomes of each Linear and embedding."""
    layers = {
        name: m
        for name, m in skeleton.named_modules()
        if isinstance(m, nn.Linear | nn.Embedding) and m.weight is not None
    }
    usual = Counter(module.weight.dtype for module in layers.values()).most_common(1)
    plans = []
    for name, module in layers.items():
        rows, columns = module.weight.shape
        plan = LayerPlan(name, columns, rows, None)
        stored = find_source_layer(layout.parts[name + WEIGHT])
        word = "" if stored is None else weights.get_format(stored)
        if module.weight.dtype != usual[0][0]:  # T5's `wo` beside float16, whose range its outputs leave
            why = f"transformers keeps it in {str(module.weight.dtype).removeprefix('torch.')}"
            plan.skip_reason = f"{word}, read as float: {why}" if word else why
        elif stored is None:
            plan.skip_reason = "several tensors of the file make it"
        else:
            plan_layer(plan, module, weights, stored, to)
        plans.append(plan)
    return plans


def plan_layer(
    plan: LayerPlan, module: nn.Module, weights: EncoderWeights, stored: str, to: WeightFormat | None
) -> None:
    """A layer that is one tensor of the source."""
    word = weights.get_format(stored)
    if to is not None and word != to.name:
        plan_quantization(plan, module, weights.encoder, stored, to)
    elif not word:
        plan.skip_reason = "float in the file"
    if word and not plan.rounding:  # quantized in the source, and nothing else is wanted
        plan.skip_reason = None
        plan_stored_format(
            plan, module, word, weights.is_packable(stored), weights.encoder.needs_float_embedding(stored)
        )


def find_source_layer(parts: tuple[TensorPart, ...]) -> str | None:
    """The layer of the source that is this one as it is; None where rows are cut or turned."""
    whole = len(parts) == 1 and parts[0] == TensorPart(parts[0].key) and parts[0].key.endswith(WEIGHT)
    return parts[0].key.removesuffix(WEIGHT) if whole else None


def plan_stored_format(plan: LayerPlan, module: nn.Module, word: str, codable: bool, table: bool) -> None:
    """A weight that is quantized in the source.

    Args:
        codable: its numbers can stay as they are.
        table: the model asks for the weight itself.
    """
    if not codable:
        plan.skip_reason = f"{word}, which is read as float"
    elif table:
        plan.skip_reason = f"{word}, read as float: the model asks for the table itself"
    elif type(module) not in (nn.Linear, nn.Embedding) and not hasattr(module, EMBED_SCALE):
        plan.skip_reason = (
            f"{word}, read as float: a {type(module).__name__} does more than look up or multiply"
        )
    else:
        plan.rounding = word


def plan_quantization(
    plan: LayerPlan, module: nn.Module, encoder: EncoderFamily, stored: str, to: WeightFormat
) -> None:
    """A float weight on its way to a format."""
    why = encoder.find_skip_reason(stored, to.name)
    if why is not None or type(module) is not nn.Linear:
        plan.skip_reason = why or f"a {type(module).__name__}"
        return
    form = choose_format(to.name, plan.out_features, plan.in_features)
    plan.rounding = form.name
    plan.outlier_skip_reason = (
        (to.unsupported_reason(plan.out_features, plan.in_features) or "") if form is not to else ""
    )


def fill_skeleton(
    skeleton: nn.Module, weights: EncoderWeights, layout: StateDictLayout, but: set[str], device: torch.device
) -> None:
    """Bring a skeleton to the device and read every parameter and buffer that has no value, except the weights of these layers; tied
    ones once."""
    left = {name + WEIGHT for name in but}
    known: dict[Any, nn.Parameter] = {}  # of tied ones each module has the same
    for prefix, module in skeleton.named_modules():
        for store in (module._parameters, module._buffers):
            for word, empty in list(store.items()):
                name = f"{prefix}.{word}".removeprefix(".")
                if empty is not None and not empty.is_meta:
                    store[word] = empty.to(device)
                if empty is None or not empty.is_meta or name in left:
                    continue
                parts = layout.parts[name]
                if (parts, empty.dtype) not in known:
                    tensor = read_float(weights, parts, empty).to(device)
                    known[parts, empty.dtype] = nn.Parameter(tensor, requires_grad=False)
                parameter = known[parts, empty.dtype]
                store[word] = parameter if store is module._parameters else parameter.data


def read_float(weights: EncoderWeights, parts: tuple[TensorPart, ...], like: Tensor) -> Tensor:
    """One float parameter out of its parts."""
    read = [
        part.extract(check_finite(weights.where, part.key, weights.read_tensor(part.key))) for part in parts
    ]
    return (
        torch.cat(read).to(like.dtype)
        if len(read) > 1
        else read[0].to(like.dtype).reshape(like.shape).contiguous()
    )


def check_kernels(kernels: Kernels, plans: Iterable[LayerPlan], weights: EncoderWeights) -> None:
    """Refuse kernels that cannot run here, or that have nothing to run.

    Raises:
        BackendError: naming what would work.
    """
    words = Counter(plan.rounding for plan in plans if plan.skip_reason is None)
    backend = kernels.backend
    if backend is not None:
        try:
            check_backend(backend, kernels.device, ())
        except BackendError as error:
            raise BackendError(
                f"clip.kernel_backend={kernels.word}: {error}; {DEQUANTIZE} runs everywhere"
            ) from error
        if (
            words
            and kernels.word not in ("auto", "triton", "reference")
            and not any(word.startswith("int8") for word in words)
        ):
            raise BackendError(
                f"clip.kernel_backend={kernels.word} runs INT8 layers, and {weights.where} gives {format_counts(words)}; choose auto "
                f"or {DEQUANTIZE}"
            )


def build_quantized_modules(built: BuiltEncoder, plans: Iterable[LayerPlan]) -> dict[str, nn.Module]:
    """The quantized layer of each plan, by name, made one after the other; INT8 ones with a scale per row by the denoiser's own loop."""
    plans, made, backend = list(plans), {}, built.kernels.backend
    tables: dict[tuple[TensorPart, ...], nn.Module] = {}  # tied ones are one

    def int8_rows() -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
        for plan in plans:
            parts = built.layout.parts[plan.name + WEIGHT]
            if not is_linear_layer(built, plan):
                made[plan.name] = tables[parts] = tables.get(parts) or build_module(
                    built, plan, build_packed_layer(built, plan)
                )
                continue
            layer = build_packed_layer(built, plan)
            if backend is not None and is_int8_rowwise(layer.weight):
                yield plan, QuantizedLayer(to_quantized_weight(layer.weight), layer.transform, layer.bias)
            else:
                made[plan.name] = build_module(built, plan, layer)

    if backend is None:
        rest = list(int8_rows())
        assert not rest, "without a backend no layer is left to it"
        return made
    tokens = dict.fromkeys((plan.name for plan in plans), built.kernels.rows)
    return (
        build_int8_layers(
            built.skeleton, int8_rows(), backend, NO_FALLBACK, tokens, device=built.kernels.device
        )
        | made
    )


def is_linear_layer(built: BuiltEncoder, plan: LayerPlan) -> bool:
    """Whether the layer multiplies; else it is an embedding."""
    return isinstance(built.skeleton.get_submodule(plan.name), nn.Linear)


def is_int8_rowwise(weight: PackedWeight) -> bool:
    """Whether a weight is what `Int8Linear` takes: int8 with one scale, or one per row."""
    return weight.storage_dtype == "int8" and is_rowwise(weight)


def build_packed_layer(built: BuiltEncoder, plan: LayerPlan) -> PackedLayer:
    """One layer's codes, on the device: as the source has them, else quantized now; with its bias as it is now."""
    module, weights = built.skeleton.get_submodule(plan.name), built.weights
    stored = find_source_layer(built.layout.parts[plan.name + WEIGHT])
    assert stored is not None, "layers that are made of several tensors stay float"
    bias = getattr(module, "bias", None)
    read = lambda: weights.read_tensor(stored + WEIGHT)  # noqa: E731
    changed = built.merged(plan.name, read)
    found = (
        weights.read_packed(stored)
        if changed is None and plan.rounding == weights.get_format(stored)
        else None
    )
    if found is None:  # a way of storing that has no word is one of int8's
        form = choose_format(
            plan.rounding if plan.rounding in FORMATS else ROWWISE, plan.out_features, plan.in_features
        )
        found = quantize_weight(plan, read() if changed is None else changed, form)
    plan.outlier = found.transform.label
    device = built.kernels.device
    return PackedLayer(found.weight.to(device), found.transform.to(device), bias)


def quantize_weight(plan: LayerPlan, weight: Tensor, form: WeightFormat) -> PackedLayer:
    """A float weight in a format. What that cost goes into the plan."""
    check_weight(plan, weight)
    transform = ConvRot().fit(weight, None) if form.is_rotated else OutlierTransform()
    plan.outlier = transform.label
    if (
        form.qdata_dtype == torch.int8 and form.granularity == "row" and weight.device.type == "cpu"
    ):  # by a kernel, many times as fast
        rounded = round_weight_rows(plan, weight, transform)
        return PackedLayer(
            PackedWeight(rounded.qdata, rounded.scale, (plan.out_features, plan.in_features)), transform, None
        )
    x = transform.transform_weight(weight.float())
    made = form.quantize(x)
    plan.measured["weight_sqnr_db"] = sqnr_db(x, made.dequantize())
    return PackedLayer(made, transform, None)


def build_module(built: BuiltEncoder, plan: LayerPlan, layer: PackedLayer) -> nn.Module:
    """The module of a layer that is no `Int8Linear`."""
    module: Any = built.skeleton.get_submodule(plan.name)
    kernels = built.kernels
    plan.backend_asked = kernels.word
    if isinstance(module, nn.Embedding):
        plan.backend_used = "look-up"
        scale = float(getattr(module, EMBED_SCALE, 1.0))
        return WeightOnlyEmbedding(
            layer.weight, layer.transform, module.weight.dtype, module.padding_idx, scale
        )
    dtype = module.weight.dtype
    backend = kernels.backend
    if backend is not None and layer.weight.storage_dtype == "int8":
        if isinstance(backend, AutoBackend):
            backend = backend.make_chooser(kernels.device, dtype).choose_backend(
                kernels.rows, get_block_size(layer.weight), plan.out_features
            )
        plan.backend_used = f"{backend.name}, in blocks"
        return BlockInt8Linear(layer, backend)
    if kernels.word == SCALED_MM and scaled_mm_unsupported_reason(layer.weight, kernels.device) is None:
        plan.backend_used = SCALED_MM
        return WeightOnlyLinear(layer, dtype, SCALED_MM)
    plan.backend_used = f"{DEQUANTIZE}, {kernels.reader}"
    return WeightOnlyLinear(layer, dtype, kernels.reader)


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.eval())


def log_layer_counts(built: BuiltEncoder) -> None:
    """Say what is other than asked: layers in another format, read as float, or not run by the kernel that was named.

    Raises:
        BackendError: when the named kernel runs none.
    """
    chosen = [plan for plan in built.plans if plan.skip_reason is None]
    where = built.weights.where
    if built.to is not None:
        others = Counter(
            f"{plan.rounding}: {plan.outlier_skip_reason}" for plan in chosen if plan.outlier_skip_reason
        )
        if others:
            log.warning(
                "%s: %d layers cannot be %s: %s", where, others.total(), built.to.name, format_counts(others)
            )
        words = [
            (
                built.weights.get_format(find_source_layer(built.layout.parts[plan.name + WEIGHT]) or ""),
                plan.rounding,
            )
            for plan in chosen
        ]
        again = Counter(word for word, now in words if word not in ("", now))
        if again:
            log.warning(
                "%s: quantized layers are rounded once more, from what they stand for: %s",
                where,
                format_counts(again),
            )
    floats = Counter(
        plan.skip_reason for plan in built.plans if plan.skip_reason and "read as float" in plan.skip_reason
    )
    if floats:
        log.warning(
            "%s: %d quantized layers are floats in memory: %s", where, floats.total(), format_counts(floats)
        )
    if built.kernels.word == SCALED_MM:
        whys = [
            scaled_mm_unsupported_reason(weight, built.kernels.device)
            for weight in list_packed_weights(built)
        ]
        refused = Counter(why for why in whys if why is not None)
        if refused and refused.total() == len(whys):
            raise BackendError(
                f"clip.kernel_backend={SCALED_MM} can run none of the layers of {where}: {format_counts(refused)}; choose auto"
            )
        if refused:
            log.warning(
                "clip.kernel_backend=%s: %d layers of %s are dequantized: %s",
                SCALED_MM,
                refused.total(),
                where,
                format_counts(refused),
            )


def list_packed_weights(built: BuiltEncoder) -> list[PackedWeight]:
    """Of the layers that multiply codes as floats or as fp8."""
    return [module.packed_weight for module in built.module.modules() if isinstance(module, WeightOnlyLinear)]


def get_block_size(weight: PackedWeight) -> int:
    """Columns that share scales, of a weight with several scales in a row."""
    assert weight.scale is not None
    return infer_block_shape(weight.qdata.shape, weight.scale.shape, weight.block_size or None)[1]


def format_counts(counts: Mapping[str, int]) -> str:
    """`3 × this, 1 × that`."""
    return ", ".join(f"{n} × {what}" for what, n in counts.items())
