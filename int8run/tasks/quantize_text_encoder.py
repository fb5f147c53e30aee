"""`task=quantize task.component=text_encoder`: a text encoder from file to file, one tensor at a time.

`options.Quantize` calls `quantize_text_encoder`. It plans everything from the header and an encoder without
weights (a skeleton), then reads, quantizes and writes tensor by tensor.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import Tensor

from int8run import __version__
from int8run.checkpoints.comfy_formats import TORCH_DTYPES, collect_tensors
from int8run.checkpoints.output_path import prepare_output_path
from int8run.checkpoints.writer import StreamWriter
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, suggest_similar
from int8run.layers.plan import LayerPlan
from int8run.models.hub import check_repository, make_download_error
from int8run.models.pipeline_index import MODEL_INDEX_NAME, MODULAR_INDEX_NAME, has_pipeline_index
from int8run.models.resolve_weights import CONFIG_NAME
from int8run.models.source import read_config
from int8run.models.tensor_part import TensorPart
from int8run.pipeline.text_encoders import EncoderSlot, find_encoder_slots
from int8run.quant.formats import FORMATS, WeightFormat
from int8run.report.console import Progress
from int8run.report.formatting import format_megabytes
from int8run.tasks.model_card import write_card
from int8run.tasks.quantize_common import (
    MegabyteProgress,
    collect_metrics,
    count_bytes,
    count_megabytes,
    describe_source,
    hash_checkpoint,
    is_folder,
    log_dequantized_source,
    log_ignored_settings,
    merge_metadata,
    print_read_and_written,
    report_result,
    warn_replaced,
)
from int8run.tasks.quantize_text_encoder_plan import (
    BYTES,
    EncoderFilePlan,
    EncoderTarget,
    plan_file,
)
from int8run.text_encoders.quantized_layers import quantize_weight
from int8run.text_encoders.weights import EncoderFile, check_finite
from int8run.utils.paths import SAFETENSORS, to_local_path

# of a text encoder `clip=` alone says what is written
OF_A_DENOISER = frozenset(
    {
        "model_type",
        "model.quant_format",
        "model.sdnq",
        "int8",
        "outlier",
        "rounding",
        "lora",
        "lora_dir",
        "quality_db",
    }
)


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
    log_ignored_settings(component, OF_A_DENOISER, job)
    prepare_output_path(str(spec.save))  # before the work whose result goes there
    slot = find_slot(spec, component)
    started = time.perf_counter()
    weights = EncoderFile(slot.folder, class_name=slot.class_name)
    with weights.files:
        plan = plan_file(spec, slot, weights, weight_format)
        print_header(spec, weights, plan)
        log_dequantized_source(weights.files)
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
    write_card(spec, job, [plan.path], metrics)
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
    if is_folder(spec.save):
        config_text = json.dumps(plan.config, indent=2, default=str) + "\n"
        plan.path.with_name(CONFIG_NAME).write_text(config_text, encoding="utf-8")
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
            **describe_source(weights.files),
            "sha256": hash_checkpoint(weights.files),
        },
        "encoder": weights.encoder.name,
        "format": spec.clip.format,
        "seed": spec.seed,
        "kept_float": {plan.name: plan.skip_reason for plan in plans if plan.skip_reason is not None},
    }
    return merge_metadata(weights.files.metadata, provenance)
