"""What `task=quantize` will write for a text encoder, tensor by tensor, from the header of its file alone.

`quantize_text_encoder` calls `plan_file` and then writes. No tensor is read here.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from int8run.checkpoints.comfy_formats import plan_packed_entries
from int8run.checkpoints.comfy_grouped import CodeTensors, describe_stored_codes
from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.kept_dtype import find_kept_dtype
from int8run.checkpoints.writer import TensorEntry
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.layers.plan import LayerPlan
from int8run.models.source import read_config
from int8run.models.tensor_part import TensorPart, join_shapes
from int8run.outlier.base import OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.pipeline.text_encoders import EncoderSlot
from int8run.quant.formats import FORMATS, WeightFormat
from int8run.tasks.quantize_common import count_skip_reasons, is_folder, log_kept_dtype, resolve_new_file
from int8run.text_encoders.build import fit_weights
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.plan_layers import find_source_layer, format_counts, plan_quantization
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.state_dict_adapter import map_canonical_names
from int8run.text_encoders.weights import EncoderFile
from int8run.utils.paths import SAFETENSORS
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)

BYTES = "U8"  # the dtype of tokenizers and other data that is no number of the model
FILE_IN_FOLDER = f"model{SAFETENSORS}"  # as transformers has it


@dataclass
class EncoderTarget:
    """One tensor of the new file.

    Args:
        key: in the new file.
        parts: tensors of the source that it is made of, one after the other.
        shape: of the whole.
        dtype: safetensors' name, of what stays float.
        weight_format: of a weight that is quantized; None: it stays float.
        plan: of a Linear or an embedding.
        copied_layer: the layer of the source whose quantized weight is copied as it is.
        transform: what is done to the weight before it is rounded; of a copied layer read from the file.
        codes: which tensors a copied weight of 4 or 6 bits is; None: it is made here, or is no such weight.
    """

    key: str
    parts: tuple[TensorPart, ...]
    shape: tuple[int, ...]
    dtype: str
    weight_format: WeightFormat | None = None
    plan: LayerPlan | None = None
    copied_layer: str | None = None
    transform: OutlierTransform = field(default_factory=OutlierTransform)
    codes: CodeTensors | None = None

    def list_entries(self) -> list[TensorEntry]:
        """List the tensors that it adds to the new file."""
        if self.weight_format is None:
            return [TensorEntry(self.key, self.dtype, self.shape)]
        rows, columns = self.shape
        return plan_packed_entries(self.key, self.weight_format, (rows, columns), self.transform, self.codes)


@dataclass(frozen=True)
class EncoderFilePlan:
    """What is written, and how; all of it is known from the header.

    Args:
        path: of the new file.
        config: of the encoder's class in transformers.
        weight_format: for the layers that are quantized.
        targets: tensors of the new file.
    """

    path: Path
    config: Mapping[str, Any]
    weight_format: WeightFormat
    targets: Sequence[EncoderTarget]

    @property
    def layer_plans(self) -> list[LayerPlan]:
        """What becomes of each layer."""
        return [target.plan for target in self.targets if target.plan is not None]


def plan_file(
    spec: RunSpec, slot: EncoderSlot, weights: EncoderFile, weight_format: WeightFormat
) -> EncoderFilePlan:
    """Plan the new file.

    Args:
        spec: the settings.
        slot: where the encoder was found.
        weights: the encoder.
        weight_format: for the layers that are quantized.

    Raises:
        ConfigError: when no layer is quantized, or the new file would replace the source.
        FileError: when a size cannot be read from the source.
    """
    save = str(spec.save)
    if is_folder(spec.save):
        save = str(Path(save) / FILE_IN_FOLDER)
    path = resolve_new_file(save, weights.files)
    if slot.class_name:
        config = dict(read_config(slot.folder))
    else:
        config = build_config(weights.encoder, weights.shapes)
    class_name = slot.class_name or weights.encoder.classes[0]
    targets = plan_targets(weights, class_name, config, weight_format, to_folder=is_folder(spec.save))
    check_targets(weights, targets, weight_format)
    return EncoderFilePlan(path, config, weight_format, targets)


def plan_targets(
    weights: EncoderFile,
    class_name: str,
    config: Mapping[str, Any],
    weight_format: WeightFormat,
    *,
    to_folder: bool,
) -> list[EncoderTarget]:
    """Plan what the new file will hold.

    Args:
        weights: the source.
        class_name: of transformers.
        config: of that class.
        weight_format: for the layers that are quantized.
        to_folder: whether the new file is in a folder, where tensors keep their names; in a single file
            they get those that ComfyUI reads.
    """
    modules = find_modules(weights, class_name, config)
    kept = find_kept_dtype(weights.files, weights.layers, weights.prefix)
    targets = []
    for key, parts in choose_names(weights, to_folder=to_folder).items():
        shape = join_shapes(parts, weights.shapes) or ()
        target = EncoderTarget(key, parts, shape, choose_dtype(weights, parts, kept.name))
        layer = find_source_layer(parts)
        if layer in modules and len(shape) == 2:
            plan_layer(target, weights, layer, modules[layer], weight_format)
        targets.append(target)
    log_kept_dtype(count_kept_weights(targets, weights), kept)
    return targets


def choose_names(weights: EncoderFile, *, to_folder: bool) -> dict[str, tuple[TensorPart, ...]]:
    """Choose what the tensors are called in the new file; a tokenizer among them is kept.

    Args:
        weights: the source.
        to_folder: as of `plan_targets`.

    Returns:
        Key in the new file -> what it is made of.
    """
    canonical_names, dropped = map_canonical_names(weights.encoder, weights.shapes)
    names = dict(canonical_names)
    if to_folder and not weights.prefix:
        names = {key: (TensorPart(key),) for key in weights.shapes if key not in dropped}
    for key in dropped:
        is_tokenizer = weights.files[weights.prefix + key].dtype == BYTES
        if is_tokenizer:
            names[key] = (TensorPart(key),)
    return names


def find_modules(
    weights: EncoderFile, class_name: str, config: Mapping[str, Any]
) -> dict[str, nn.Linear | nn.Embedding]:
    """Find the Linears and embeddings of an encoder, on the meta device.

    Args:
        weights: the source.
        class_name: of transformers.
        config: of that class.

    Returns:
        Modules by the name of their layer in the source.
    """
    model = build_skeleton(class_name, dict(config), torch.float32)
    parts = fit_weights(weights, model).parts
    modules = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or name + WEIGHT not in parts:
            continue
        layer = find_source_layer(parts[name + WEIGHT])
        if layer is not None:
            modules[layer] = module
    return modules


def choose_dtype(weights: EncoderFile, parts: tuple[TensorPart, ...], kept_dtype: str) -> str:
    """Choose the dtype of what stays float: its own; `kept_dtype` for what the source has quantized."""
    if any(is_quantized(weights, part) for part in parts):
        return kept_dtype
    dtypes = {weights.files[weights.prefix + part.key].dtype for part in parts}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def plan_layer(
    target: EncoderTarget,
    weights: EncoderFile,
    layer: str,
    module: nn.Module,
    weight_format: WeightFormat,
) -> None:
    """Decide what becomes of a Linear or an embedding; sets plan, format and transform of its target.

    Args:
        target: its weight in the new file.
        weights: the source.
        layer: its name in the source.
        module: the layer, on the meta device.
        weight_format: for the layers that are quantized.
    """
    rows, columns = target.shape
    plan = LayerPlan(target.key.removesuffix(WEIGHT), columns, rows, None)
    plan_quantization(plan, module, weights.encoder, source_layer=layer, target=weight_format)
    target.plan = plan
    source_format = weights.get_format(layer)
    if source_format and source_format == (plan.rounding or weight_format.name):
        # also an embedding, which is not quantized otherwise
        target.copied_layer = layer
        target.weight_format = weight_format
        target.transform = weights.layers[layer].read_transform(weights.files)
        if weight_format.is_grouped:
            target.codes = describe_stored_codes(weights.files, weights.layers[layer])
        plan.skip_reason = None
        plan.rounding = f"{source_format}, as in the source"
    elif plan.skip_reason is None:
        target.weight_format = FORMATS[plan.rounding]
        if target.weight_format.is_rotated:
            target.transform = ConvRot().fit(torch.ones(1, columns), None)


def is_quantized(weights: EncoderFile, part: TensorPart) -> bool:
    """Whether a tensor of the source is a quantized weight."""
    return bool(weights.get_format(part.key.removesuffix(WEIGHT)))


def count_kept_weights(targets: Sequence[EncoderTarget], weights: EncoderFile) -> int:
    """Count the weights that are quantized in the source and stay float."""
    count = 0
    for target in targets:
        if target.weight_format is None:
            count += sum(is_quantized(weights, part) for part in target.parts)
    return count


def check_targets(
    weights: EncoderFile, targets: Sequence[EncoderTarget], weight_format: WeightFormat
) -> None:
    """Warn of layers that are rounded twice, and of layers that get another format.

    Args:
        weights: the source.
        targets: tensors of the new file.
        weight_format: that the user chose.

    Raises:
        ConfigError: when no layer is quantized.
    """
    plans = [target.plan for target in targets if target.plan is not None]
    if all(target.weight_format is None for target in targets):
        reasons = format_counts(count_skip_reasons(plans))
        raise ConfigError(f"{weights.where}: no layer becomes {weight_format.name} ({reasons})")
    warn_rounded_again(weights, targets)
    unsupported: Counter[str] = Counter()
    for plan in plans:
        if plan.skip_reason is None and plan.outlier_skip_reason:
            unsupported[plan.outlier_skip_reason] += 1
    if unsupported:
        log.warning(
            "%s: %s cannot be %s: %s",
            weights.where,
            count_noun(unsupported.total(), "layer"),
            weight_format.name,
            format_counts(unsupported),
        )


def warn_rounded_again(weights: EncoderFile, targets: Sequence[EncoderTarget]) -> None:
    """Warn of layers that are quantized in the source, in another format than the new one."""
    rounded_again: Counter[str] = Counter()
    for target in targets:
        if target.plan is None or target.copied_layer is not None:
            continue
        for part in target.parts:
            source_format = weights.get_format(part.key.removesuffix(WEIGHT))
            if source_format:
                rounded_again[source_format] += 1
    if rounded_again:
        log.warning(
            "%s: layers that are quantized already are dequantized and rounded once more: %s",
            weights.where,
            format_counts(rounded_again),
        )
