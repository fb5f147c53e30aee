"""What `task=quantize` will write for a denoiser, tensor by tensor, from the headers of its files alone.

`quantize_checkpoint` calls `plan_file` and then writes. No weight is read here.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from int8run.checkpoints.comfy_formats import TORCH_DTYPES
from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import get_logical_shapes, read_denoiser_layers
from int8run.checkpoints.kept_dtype import KeptDtype, find_kept_dtype
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.export.stream_plan import (
    DTYPE_NAMES,
    KeyParts,
    QuantizationRecipe,
    Target,
    keep_own_names,
    plan_targets,
)
from int8run.layers.plan import FLOAT, LayerPlan
from int8run.layers.plan_summary import warn_without_convolutions
from int8run.models.original_names import to_original
from int8run.models.resolve_weights import CONFIG_NAME, WEIGHTS_NAME, ResolvedWeights
from int8run.models.state_dict_adapter import find_prefix
from int8run.models.tensor_part import Shape, TensorPart
from int8run.outlier.base import OutlierMethod
from int8run.ptq.bits import warn_other_bits
from int8run.ptq.quantize import check_outlier_method
from int8run.tasks.denoiser_checkpoint import DenoiserCheckpoint, recognize_checkpoint
from int8run.tasks.quantize_common import count_skip_reasons, is_folder, log_kept_dtype, resolve_new_file
from int8run.tracking.setting_names import split_override
from int8run.utils.paths import expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilePlan:
    """What is read, what is written, and how; all of it is known from the headers.

    Args:
        files: the source, opened.
        layers: its weights by name.
        checkpoint: what the source is.
        path: of the new file.
        targets: tensors of the new file.
        recipe: how layers become INT8.
    """

    files: TensorFiles
    layers: Mapping[str, CheckpointLayer]
    checkpoint: DenoiserCheckpoint
    path: Path
    targets: Sequence[Target]
    recipe: QuantizationRecipe

    @property
    def layer_plans(self) -> list[LayerPlan]:
        """What becomes of each layer."""
        return [target.plan for target in self.targets if target.plan is not None]


def plan_file(
    spec: RunSpec, job: Job, source: ResolvedWeights, files: TensorFiles, outlier: OutlierMethod
) -> FilePlan:
    """Plan the new file.

    Args:
        spec: the settings.
        job: where they came from.
        source: where the checkpoint was found.
        files: its files.
        outlier: the method.

    Raises:
        ConfigError: when no layer becomes INT8, or the source cannot be saved like this.
        FileError: when a weight cannot be read.
    """
    prefix = find_prefix(files)
    declared = DeclaredFormat(spec.model.quant_format, spec.model.sdnq)
    layers = read_denoiser_layers(files, prefix, declared)
    checkpoint = recognize_checkpoint(files, layers, prefix=prefix, source=source, model_type=spec.model_type)
    if is_folder(spec.save):
        path = resolve_file_in_folder(str(spec.save), source, checkpoint, files)
    else:
        path = resolve_new_file(str(spec.save), files)
    names = plan_names(files, layers, checkpoint, to_folder=is_folder(spec.save))
    kept_dtype = choose_kept_dtype(files, layers, prefix, spec.model.dtype, job.overrides)
    recipe = QuantizationRecipe(
        outlier,
        spec.rounding,
        TORCH_DTYPES[kept_dtype.name],
        # the file does not depend on the machine that writes it: `auto` is decided where it is used
        has_convolutions=spec.int8.convolutions != FLOAT,
        layout=spec.int8.fixed_layout,
    )
    targets = plan_targets(files, layers, names, checkpoint.find_skip_reason, recipe)
    join_fits(targets, checkpoint)
    check_targets(targets, outlier, spec.int8.bits)
    plans = [target.plan for target in targets if target.plan is not None]
    warn_without_convolutions(plans, spec.int8.convolutions)
    log_kept_dtype(count_kept_weights(targets, layers), kept_dtype)
    return FilePlan(files, layers, checkpoint, path, targets, recipe)


def join_fits(targets: Sequence[Target], checkpoint: DenoiserCheckpoint) -> None:
    """Let targets that are one layer of the model be fitted together: it has one transform for all its rows.

    Args:
        targets: tensors of the new file; are changed.
        checkpoint: says which layer each is of.
    """
    by_layer: dict[str, list[Target]] = {}
    for target in targets:
        keys = [part.key.removeprefix(checkpoint.prefix) for part in target.parts]
        names = {name for key in keys for name in checkpoint.parameters.get(key, ())}
        if target.int8 and len(names) == 1:
            by_layer.setdefault(names.pop(), []).append(target)
    for same_layer in by_layer.values():
        if len(same_layer) == 1:
            continue
        parts = tuple(part for target in same_layer for part in target.parts)
        for target in same_layer:
            target.fitted_parts = parts


def resolve_file_in_folder(
    save: str, source: ResolvedWeights, checkpoint: DenoiserCheckpoint, files: TensorFiles
) -> Path:
    """Return the absolute path of the file to write, in a folder as diffusers has it.

    Args:
        save: the folder, as the user gave it.
        source: where the checkpoint was found.
        checkpoint: what it is.
        files: its files.

    Raises:
        ConfigError: when the source does not have diffusers' names or config, or the folder holds other
            weights.
    """
    path = expand_path(save).absolute()
    if checkpoint.is_original:
        raise ConfigError(
            f"save={save} is a folder, and {source.path} has its authors' names, not those of diffusers; "
            "save to a .safetensors file"
        )
    if source.config is None:
        raise ConfigError(
            f"save={save} is a folder, and there is no {CONFIG_NAME} beside {source.path} to go with it; "
            "save to a .safetensors file"
        )
    others = [file.name for file in sorted(path.glob("*.safetensors*")) if file.name != WEIGHTS_NAME]
    if others:
        raise ConfigError(f"save={save} holds {others[0]}, another checkpoint; choose another folder")
    if any(file.parent.absolute() == path for file in files.files):
        raise ConfigError(f"save={save} holds the source itself; choose another folder")
    return path / WEIGHTS_NAME


def plan_names(
    files: TensorFiles,
    layers: Mapping[str, CheckpointLayer],
    checkpoint: DenoiserCheckpoint,
    *,
    to_folder: bool,
) -> KeyParts:
    """Choose what the tensors are called in the new file.

    They keep their names, except in a single file: there, tensors with diffusers' names get those of the
    model's authors, which ComfyUI reads. In a folder as diffusers has it, only the denoiser is kept.

    Args:
        files: the source.
        layers: its weights by name.
        checkpoint: what it is.
        to_folder: whether the new file is in such a folder.

    Returns:
        Key in the new file -> what it is made of.
    """
    own_names = keep_own_names(files, layers)
    prefix = checkpoint.prefix
    if to_folder and not checkpoint.is_original:
        return {key.removeprefix(prefix): (TensorPart(key),) for key in own_names if key.startswith(prefix)}
    if checkpoint.is_original or not checkpoint.class_name:
        return own_names
    return take_original_names(own_names, get_logical_shapes(files, layers), checkpoint)


def take_original_names(
    own_names: KeyParts, shapes: Mapping[str, Shape], checkpoint: DenoiserCheckpoint
) -> KeyParts:
    """Give the tensors of a denoiser the names of the model's authors; others keep their own.

    Args:
        own_names: every tensor under its own name.
        shapes: logical shapes by those names.
        checkpoint: whose denoiser has diffusers' names.
    """
    prefix = checkpoint.prefix
    denoiser_shapes: dict[str, Shape] = {}
    other_names: dict[str, tuple[TensorPart, ...]] = {}
    for key, parts in own_names.items():
        if key.startswith(prefix):
            denoiser_shapes[key.removeprefix(prefix)] = shapes[key]
        else:
            other_names[key] = parts
    names: dict[str, tuple[TensorPart, ...]] = {}
    for key, parts in to_original(denoiser_shapes, checkpoint.class_name).items():
        names[key] = tuple(replace(part, key=prefix + part.key) for part in parts)
    return {**names, **other_names}


def choose_kept_dtype(
    files: TensorFiles,
    layers: Mapping[str, CheckpointLayer],
    prefix: str,
    model_dtype: str,
    overrides: Sequence[str],
) -> KeptDtype:
    """Choose the dtype of weights that are quantized in the source and stay float: that of their neighbours.

    `model.dtype` decides only where the command line names it: else it belongs to an option of `model=`,
    which says nothing about this file.

    Args:
        files: the source.
        layers: its weights by name.
        prefix: before the denoiser's keys.
        model_dtype: `model.dtype`, torch's name.
        overrides: the words of the command line.
    """
    named_settings = [split_override(word)[0] for word in overrides]
    if "model.dtype" in named_settings:
        return KeptDtype(DTYPE_NAMES[getattr(torch, model_dtype)], "as model.dtype says")
    return find_kept_dtype(files, layers, prefix)


def count_kept_weights(targets: Sequence[Target], layers: Mapping[str, CheckpointLayer]) -> int:
    """Count the weights that are quantized in the source and stay float."""
    count = 0
    for target in targets:
        if target.int8:
            continue
        for part in target.parts:
            layer = layers.get(part.key.removesuffix(WEIGHT))
            if layer is not None and layer.is_dequantized:
                count += 1
                break
    return count


def check_targets(targets: Sequence[Target], outlier: OutlierMethod, bits: int | str) -> None:
    """Log which layers are copied, and which ones the outlier method does not support.

    Args:
        targets: tensors of the new file.
        outlier: the method.
        bits: that were asked for.

    Raises:
        ConfigError: when no layer becomes INT8, with the reasons by count.
    """
    plans: list[LayerPlan] = []
    quantized: list[LayerPlan] = []
    copied: list[Target] = []
    for target in targets:
        if target.plan is None:
            continue
        plans.append(target.plan)
        if target.copied:
            copied.append(target)
        elif target.int8:
            quantized.append(target.plan)
    if not quantized and not copied:
        counts = count_skip_reasons(plans)
        reasons = "; ".join(f"{count} × {reason}" for reason, count in counts.items())
        raise ConfigError(
            f"no layer becomes INT8 ({reasons or 'it has no weight with two dimensions'}); "
            "choose another model_type="
        )
    if copied:
        log_copied(copied)
    if quantized:
        check_outlier_method(outlier, quantized)
        warn_other_bits(quantized, bits)


def log_copied(copied: Sequence[Target]) -> None:
    """Log the layers that are INT8 in the source and stay as they are."""
    labels = Counter(target.transform.label for target in copied)
    log.info(
        "%s INT8 in the source, copied as they are (%s); outlier= and rounding= do not change them",
        count_noun(len(copied), "layer", "are"),
        ", ".join(f"{count} × {label}" for label, count in labels.items()),
    )
