"""Plans what becomes of each Linear and embedding of a text encoder, before any weight is read.

A layer that is quantized in the source stays so, becomes another format, or is read as float; a float one is
quantized where that is asked for and the encoder's rules allow it.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.layers.plan import LayerPlan
from int8run.models.state_dict_adapter import StateDictLayout
from int8run.models.tensor_part import TensorPart
from int8run.quant.formats import WeightFormat, choose_format
from int8run.text_encoders.registry import EncoderFamily
from int8run.text_encoders.weights import EncoderWeights

# Gemma's embeddings multiply their rows with it
EMBED_SCALE = "embed_scale"
READ_AS_FLOAT = "read as float"


def plan_encoder(
    skeleton: nn.Module, weights: EncoderWeights, layout: StateDictLayout, target: WeightFormat | None
) -> list[LayerPlan]:
    """Return what becomes of each Linear and embedding.

    Args:
        skeleton: the model, without weights.
        weights: their source.
        layout: where the model's parameters are in it.
        target: the format that float layers become; None: they stay float.
    """
    layers = {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight is not None
    }
    dtypes = Counter(module.weight.dtype for module in layers.values())
    usual_dtype = dtypes.most_common(1)[0][0] if dtypes else None
    plans: list[LayerPlan] = []
    for name, module in layers.items():
        rows, columns = module.weight.shape
        plan = LayerPlan(name, in_features=columns, out_features=rows, skip_reason=None)
        plans.append(plan)
        source_layer = find_source_layer(layout.parts[name + WEIGHT])
        # T5's `wo` beside float16, whose range its outputs leave
        if module.weight.dtype != usual_dtype:
            plan.skip_reason = describe_own_dtype(module.weight.dtype, weights, source_layer)
        elif source_layer is None:
            plan.skip_reason = "several tensors of the file make it"
        else:
            plan_layer(plan, module, weights=weights, source_layer=source_layer, target=target)
    return plans


def describe_own_dtype(dtype: torch.dtype, weights: EncoderWeights, source_layer: str | None) -> str:
    """Return why a layer stays float that transformers keeps in another dtype than the others.

    Args:
        dtype: of the layer.
        weights: the source.
        source_layer: its name there; None where it is made of several tensors.
    """
    reason = f"transformers keeps it in {str(dtype).removeprefix('torch.')}"
    format_name = "" if source_layer is None else weights.get_format(source_layer)
    if not format_name:
        return reason
    return f"{format_name}, {READ_AS_FLOAT}: {reason}"


def find_source_layer(parts: tuple[TensorPart, ...]) -> str | None:
    """Return the layer of the source that is one of the model as it is.

    None where the model's layer is made of several, or of some rows of one, or is its transpose.
    """
    key = parts[0].key
    is_whole_weight = parts == (TensorPart(key),) and key.endswith(WEIGHT)
    return key.removesuffix(WEIGHT) if is_whole_weight else None


def plan_layer(
    plan: LayerPlan,
    module: nn.Module,
    *,
    weights: EncoderWeights,
    source_layer: str,
    target: WeightFormat | None,
) -> None:
    """Plan a layer that is one tensor of the source.

    Args:
        plan: of the layer; is changed.
        module: the layer in the skeleton.
        weights: the source.
        source_layer: its name there.
        target: the format that is asked for; None: that of the source.
    """
    source_format = weights.get_format(source_layer)
    if target is not None and source_format != target.name:
        plan_quantization(plan, module, weights.encoder, source_layer=source_layer, target=target)
        if plan.rounding or not source_format:
            return
    elif not source_format:
        plan.skip_reason = "float in the file"
        return
    plan.skip_reason = find_unpacked_reason(module, weights, source_layer)
    if plan.skip_reason is None:
        plan.rounding = source_format


def plan_quantization(
    plan: LayerPlan, module: nn.Module, encoder: EncoderFamily, *, source_layer: str, target: WeightFormat
) -> None:
    """Plan the quantization of a float weight.

    Args:
        plan: of the layer; is changed.
        module: the layer in the skeleton.
        encoder: whose rules say which layers stay float.
        source_layer: the layer's name in the source.
        target: the format that is asked for; a weight whose shape it does not take gets its fallback.
    """
    skip_reason = encoder.find_skip_reason(source_layer, target.name)
    if skip_reason is None and type(module) is not nn.Linear:
        skip_reason = f"a {type(module).__name__}"
    if skip_reason is not None:
        plan.skip_reason = skip_reason
        return
    chosen = choose_format(target.name, plan.out_features, plan.in_features)
    plan.rounding = chosen.name
    if chosen is not target:
        plan.outlier_skip_reason = target.unsupported_reason(plan.out_features, plan.in_features) or ""


def find_unpacked_reason(module: nn.Module, weights: EncoderWeights, source_layer: str) -> str | None:
    """Return why a layer that is quantized in the source is read as float; None when it stays as it is.

    Args:
        module: the layer in the skeleton.
        weights: the source.
        source_layer: its name there.
    """
    source_format = weights.get_format(source_layer)
    if not weights.is_packable(source_layer):
        return f"{source_format}, which is {READ_AS_FLOAT}"
    if weights.encoder.needs_float_embedding(source_layer):
        return f"{source_format}, {READ_AS_FLOAT}: the model reads the table itself"
    if type(module) not in (nn.Linear, nn.Embedding) and not hasattr(module, EMBED_SCALE):
        class_name = type(module).__name__
        return f"{source_format}, {READ_AS_FLOAT}: a {class_name} does more than look up or multiply"
    return None


def format_counts(counts: Mapping[str, int]) -> str:
    """Return `3 × this, 1 × that`."""
    return ", ".join(f"{count} × {what}" for what, count in counts.items())
