"""`task=quantize task.component=text_encoder`: a text encoder from file to file, one tensor at a time.

`options.Quantize` calls `quantize_text_encoder`. It plans everything from the header and an encoder without
weights (a skeleton), then reads, quantizes and writes tensor by tensor.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from int8run import __version__
from int8run.checkpoints.comfy_formats import TORCH_DTYPES, collect_tensors, plan_packed_entries
from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.kept_dtype import find_kept_dtype
from int8run.checkpoints.output_path import prepare_output_path
from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, suggest_similar
from int8run.layers.plan import LayerPlan
from int8run.models.hub import check_repository, make_download_error
from int8run.models.pipeline_index import MODEL_INDEX_NAME, MODULAR_INDEX_NAME, has_pipeline_index
from int8run.models.resolve_weights import CONFIG_NAME
from int8run.models.source import read_config
from int8run.models.state_dict_adapter import TensorPart, join_shapes
from int8run.outlier.base import OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.pipeline.text_encoders import EncoderSlot, find_encoder_slots
from int8run.quant.formats import FORMATS, WeightFormat
from int8run.report.console import Progress
from int8run.report.formatting import format_megabytes
from int8run.tasks.quantize_common import (
    MegabyteProgress,
    collect_metrics,
    count_bytes,
    count_megabytes,
    count_skip_reasons,
    hash_checkpoint,
    log_kept_dtype,
    merge_metadata,
    print_read_and_written,
    report_result,
    resolve_new_file,
    warn_replaced,
)
from int8run.text_encoders.build import fit_weights
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.plan_layers import find_source_layer, format_counts, plan_quantization
from int8run.text_encoders.quantized_layers import quantize_weight
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.state_dict_adapter import map_canonical_names
from int8run.text_encoders.weights import EncoderFile, check_finite
from int8run.utils.paths import SAFETENSORS, to_local_path
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
    """

    key: str
    parts: tuple[TensorPart, ...]
    shape: tuple[int, ...]
    dtype: str
    weight_format: WeightFormat | None = None
    plan: LayerPlan | None = None
    copied_layer: str | None = None
    transform: OutlierTransform = field(default_factory=OutlierTransform)

    def list_entries(self) -> list[TensorEntry]:
        """List the tensors that it adds to the new file."""
        if self.weight_format is None:
            return [TensorEntry(self.key, self.dtype, self.shape)]
        rows, columns = self.shape
        return plan_packed_entries(self.key, self.weight_format, (rows, columns), self.transform)


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


def quantize_text_encoder(spec: RunSpec, job: Job, component: str) -> dict[str, float]:
    """Quantize a text encoder of `model.location` into `save`, to the format of `clip=`.

    Leaves layers.csv and metrics.json in the output folder.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
        component: of the pipeline, such as `text_encoder_2`.

    Returns:
        Metrics by their public names.

    Raises:
        ConfigError: for settings that do not apply to text encoders, or when no layer is quantized.
        FileError: when the source cannot be read, or the result cannot be written.
    """
    weight_format = choose_format(spec, component)
    prepare_output_path(str(spec.save))  # before the work whose result goes there
    slot = find_slot(spec, component)
    started = time.perf_counter()
    weights = EncoderFile(slot.folder, class_name=slot.class_name)
    with weights.files:
        plan = plan_file(spec, slot, weights, weight_format)
        print_header(spec, weights, plan)
        bytes_written = write_file(spec, weights, plan)
        bytes_read = count_bytes(weights.files)
    metrics = collect_metrics(
        plan.layer_plans,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        seconds=time.perf_counter() - started,
        group="clip",
        quantized="quantized",
    )
    facts = {
        "source": weights.where,
        "save": str(plan.path),
        "encoder": weights.encoder.name,
        "format": weight_format.name,
    }
    report_result(job, plan.path, plan.layer_plans, metrics, facts, quantized=weight_format.name)
    return metrics


def choose_format(spec: RunSpec, component: str) -> WeightFormat:
    """Return the format to write.

    Raises:
        ConfigError: when there is none, or no place to write to.
    """
    if spec.save is None:
        raise ConfigError("task=quantize writes a checkpoint; set save=<file.safetensors> or save=<folder>")
    weight_format = FORMATS.get(spec.clip.format)
    if weight_format is None or weight_format.is_read_only:
        choices = ", ".join(name for name, choice in FORMATS.items() if not choice.is_read_only)
        raise ConfigError(
            f"task.component={component} is written in the format of clip=; choose one: {choices}"
        )
    if spec.clip.path is not None:
        raise ConfigError("task=quantize reads model.location; set it to the file, and clip.path=null")
    return weight_format


def find_slot(spec: RunSpec, component: str) -> EncoderSlot:
    """Find the source: a component of a pipeline, or a file or folder that is an encoder itself.

    Raises:
        ConfigError: when the pipeline has no such component.
        FileError: when it could not be downloaded.
    """
    location = str(spec.model.location)
    path = to_local_path(location)
    is_pipeline = has_pipeline_index(path)
    if path.exists() and not is_pipeline:
        return EncoderSlot(component, read_class_name(path), path)
    if not is_pipeline:
        path = download_component(location, spec.model.revision, component)
    parts = {name: part for name, part in spec.model.parts.items() if name == component}
    slots = find_encoder_slots(path, parts)
    if component not in slots:
        names = ", ".join(slots) or "none"
        raise ConfigError(
            f"task.component={component} is not a text encoder of {location}; "
            f"{suggest_similar(component, list(slots))}it has {names}"
        )
    return slots[component]


def download_component(location: str, revision: str | None, component: str) -> Path:
    """Download one component of a pipeline, and the index that names its class.

    Args:
        location: hub id of the pipeline.
        revision: on the hub.
        component: of the pipeline.

    Returns:
        The pipeline's folder.

    Raises:
        ConfigError: when it is no hub id.
        FileError: when it could not be downloaded.
    """
    check_repository(location, "model.location", revision)
    indexes = [MODEL_INDEX_NAME, MODULAR_INDEX_NAME]
    patterns = [*indexes, f"{component}/*.json", f"{component}/*{SAFETENSORS}"]
    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise make_download_error(location, "model.location", error) from error


def read_class_name(path: Path) -> str:
    """Read the class of transformers from the config in an encoder's folder; empty where there is none."""
    if not path.is_dir() or not (path / CONFIG_NAME).is_file():
        return ""
    architectures = read_config(path).get("architectures")
    return str(architectures[0]) if architectures else ""


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
    if is_folder(spec):
        save = str(Path(save) / FILE_IN_FOLDER)
    path = resolve_new_file(save, weights.files)
    if slot.class_name:
        config = dict(read_config(slot.folder))
    else:
        config = build_config(weights.encoder, weights.shapes)
    class_name = slot.class_name or weights.encoder.classes[0]
    targets = plan_targets(weights, class_name, config, weight_format, to_folder=is_folder(spec))
    check_targets(weights, targets, weight_format)
    return EncoderFilePlan(path, config, weight_format, targets)


def is_folder(spec: RunSpec) -> bool:
    """Whether the new file is in a folder as transformers has it."""
    return Path(str(spec.save)).suffix != SAFETENSORS


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


def count_kept_weights(targets: Sequence[EncoderTarget], weights: EncoderFile) -> int:
    """Count the weights that are quantized in the source and stay float."""
    count = 0
    for target in targets:
        if target.weight_format is None:
            count += sum(is_quantized(weights, part) for part in target.parts)
    return count


def is_quantized(weights: EncoderFile, part: TensorPart) -> bool:
    """Whether a tensor of the source is a quantized weight."""
    return bool(weights.get_format(part.key.removesuffix(WEIGHT)))


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
        plan.skip_reason = None
        plan.rounding = f"{source_format}, as in the source"
    elif plan.skip_reason is None:
        target.weight_format = FORMATS[plan.rounding]
        if target.weight_format.is_rotated:
            target.transform = ConvRot().fit(torch.ones(1, columns), None)


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


def print_header(spec: RunSpec, weights: EncoderFile, plan: EncoderFilePlan) -> None:
    """Print what is read and what is written."""
    num_quantized = sum(target.weight_format is not None for target in plan.targets)
    print_read_and_written(
        read=[
            ("read", weights.where),
            ("encoder", weights.encoder.name),
            ("size", format_megabytes(count_bytes(weights.files))),
        ],
        written=[
            ("write", plan.path),
            ("layers", num_quantized),
            ("format", plan.weight_format.name),
        ],
    )
    warn_replaced(plan.path, spec.save)


def write_file(spec: RunSpec, weights: EncoderFile, plan: EncoderFilePlan) -> int:
    """Write the new file; in a folder also the config of the encoder's class.

    Args:
        spec: the settings.
        weights: the source.
        plan: of the file.

    Returns:
        Its size in bytes.
    """
    entries = [entry for target in plan.targets for entry in target.list_entries()]
    metadata = build_metadata(weights, spec, plan.layer_plans)
    num_megabytes = count_megabytes(weights.files)
    with (
        StreamWriter(plan.path, entries, metadata) as writer,
        Progress(enabled=spec.progress).track_loop("Quantizing megabytes", num_megabytes) as advance,
    ):
        on_bytes = MegabyteProgress(advance)
        for target in plan.targets:
            write_target(writer, weights, target)
            on_bytes(count_source_bytes(weights, target))
        writer.finish()
        bytes_written = writer.nbytes
    if is_folder(spec):
        config_text = json.dumps(plan.config, indent=2, default=str) + "\n"
        plan.path.with_name(CONFIG_NAME).write_text(config_text)
    return bytes_written


def count_source_bytes(weights: EncoderFile, target: EncoderTarget) -> int:
    """Count the bytes of the source that a target takes; rows of a tensor do not count."""
    whole_parts = [part for part in target.parts if part.rows is None]
    return sum(weights.files[weights.prefix + part.key].nbytes for part in whole_parts)


def write_target(writer: StreamWriter, weights: EncoderFile, target: EncoderTarget) -> None:
    """Read, quantize and write one tensor."""
    if target.weight_format is None:
        for part in target.parts:
            writer.write(target.key, read_float_part(weights, part, target.dtype))
        return
    layer = None
    if target.copied_layer is not None:
        layer = weights.read_packed(target.copied_layer)
    if layer is None:
        assert target.plan is not None, "what is quantized is a layer"
        weight = weights.read_tensor(target.parts[0].key)
        layer = quantize_weight(target.plan, weight, target.weight_format)
    tensors = collect_tensors(target.key, layer.weight, target.weight_format, layer.transform)
    for key, data in tensors.items():
        writer.write(key, data)


def read_float_part(weights: EncoderFile, part: TensorPart, dtype: str) -> Tensor:
    """Read a part of a tensor that stays float, in the dtype of the new file.

    Args:
        weights: the source.
        part: rows of one of its tensors.
        dtype: safetensors' name.

    Raises:
        FileError: when it holds NaN or infinity.
    """
    if dtype == BYTES:
        tensor = weights.files.read(weights.prefix + part.key)
    else:
        tensor = check_finite(weights.where, part.key, weights.read_tensor(part.key))
    return part.extract(tensor).to(TORCH_DTYPES[dtype]).contiguous()


def build_metadata(weights: EncoderFile, spec: RunSpec, plans: Sequence[LayerPlan]) -> dict[str, str]:
    """Build the metadata of the new file: that of the source, and how the file was made.

    Args:
        weights: the source.
        spec: the settings.
        plans: of all layers.
    """
    provenance = {
        "int8run": __version__,
        "model": str(spec.model.location),
        "revision": spec.model.revision,
        "source": {
            "files": [file.name for file in weights.files.files],
            "sha256": hash_checkpoint(weights.files),
        },
        "encoder": weights.encoder.name,
        "format": spec.clip.format,
        "seed": spec.seed,
        "kept_float": {plan.name: plan.skip_reason for plan in plans if plan.skip_reason is not None},
    }
    return merge_metadata(weights.files.metadata, provenance)
