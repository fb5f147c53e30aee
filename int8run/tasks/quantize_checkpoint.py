"""`task=quantize`: a denoiser's checkpoint from file to file, in the memory of a few layers.

`options.Quantize` calls `quantize_file`. It plans everything from the headers, and lets
`export.stream_quantizer` read, quantize and write tensor by tensor. Neither diffusers nor transformers are
imported on the way: they would take more memory than all the rest.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8run import __version__
from int8run.checkpoints.detect import list_quantized_weights
from int8run.checkpoints.output_path import prepare_output_path
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import make_write_error
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.export.stream_quantizer import write_targets
from int8run.export.weight_layers import check_saved_bits
from int8run.layers.plan import AUTO, LayerPlan
from int8run.models.resolve_weights import CONFIG_NAME, ResolvedWeights, download_side_files, resolve_weights
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod
from int8run.quant.rounding import check_rounds_groups
from int8run.report.console import Progress
from int8run.report.formatting import format_megabytes
from int8run.tasks.denoiser_checkpoint import DenoiserCheckpoint
from int8run.tasks.model_card import write_card
from int8run.tasks.quantize_checkpoint_plan import FilePlan, plan_file
from int8run.tasks.quantize_common import (
    HASHED_BYTES,
    MegabyteProgress,
    collect_metrics,
    count_bytes,
    count_megabytes,
    describe_source,
    hash_checkpoint,
    is_folder,
    log_dequantized_source,
    merge_metadata,
    print_read_and_written,
    report_result,
    warn_replaced,
)


def quantize_file(spec: RunSpec, job: Job, component: str | None) -> dict[str, float]:
    """Quantize the denoiser of `model.location` into `save`.

    Leaves layers.csv and metrics.json in the output folder.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
        component: which denoiser, of a pipeline with several.

    Returns:
        Metrics by their public names.

    Raises:
        ConfigError: for settings that need the model to run, or when no layer becomes INT8.
        FileError: when the source cannot be read, or the result cannot be written.
    """
    outlier = check_streamable(spec)
    prepare_output_path(str(spec.save))  # before the work whose result goes there
    location, component = choose_location(spec.model.location, component)
    source = resolve_weights(location, spec.model.revision, component)
    started = time.perf_counter()
    with TensorFiles.open(source.path) as files:
        if list_quantized_weights(files):
            download_side_files(location, spec.model.revision)
        plan = plan_file(spec, job, source, files, outlier)
        print_header(spec, source, plan)
        log_dequantized_source(files)
        bytes_written = write_file(spec, source, plan)
        bytes_read = count_bytes(files)
    metrics = collect_metrics(
        plan.layer_plans,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
        seconds=time.perf_counter() - started,
    )
    facts = describe_result(source, plan.path, plan.checkpoint)
    write_card(spec, job, [plan.path], metrics)
    report_result(job, plan.path, plan.layer_plans, metrics, facts)
    return metrics


def write_file(spec: RunSpec, source: ResolvedWeights, plan: FilePlan) -> int:
    """Write the new file; in a folder also the config of the denoiser's class.

    Args:
        spec: the settings.
        source: where the checkpoint was found.
        plan: of the file.

    Returns:
        Its size in bytes.
    """
    metadata = build_metadata(plan.files, spec, plan.checkpoint, plan.layer_plans)
    num_megabytes = count_megabytes(plan.files)
    with Progress(enabled=spec.progress).track_loop("Quantizing megabytes", num_megabytes) as advance:
        bytes_written = write_targets(
            plan.files, plan.layers, plan.targets, plan.path, metadata, plan.recipe, MegabyteProgress(advance)
        )
    if is_folder(spec.save):
        write_config(source.config, plan.path.with_name(CONFIG_NAME))
    return bytes_written


def describe_result(source: ResolvedWeights, path: Path, checkpoint: DenoiserCheckpoint) -> dict[str, str]:
    """What a job leaves besides its numbers: where it read and wrote, and what that is."""
    return {
        "source": str(source.path),
        "save": str(path),
        "family": checkpoint.family.name,
        "denoiser": checkpoint.class_name,
    }


def check_streamable(spec: RunSpec) -> OutlierMethod:
    """Check that the settings need no more than the weights.

    Returns:
        The outlier method.

    Raises:
        ConfigError: for a setting that needs the model to run, or another task.
    """
    if spec.save is None:
        raise ConfigError("task=quantize writes a checkpoint; set save=<file.safetensors> or save=<folder>")
    check_needs_no_calibration(spec)
    check_saved_bits(spec.int8.bits, spec.outlier.name)
    if spec.int8.fixed_layout is not None:
        check_rounds_groups(spec.rounding, spec.int8.fixed_layout)
    if spec.clip.is_quantized:
        raise ConfigError(
            "task=quantize writes one component, here no text encoder, and clip= is about those; leave it "
            "out, or set task.component=text_encoder to write one"
        )
    if spec.lora.adapters:
        raise ConfigError(
            f"task=quantize leaves LoRAs out; set lora=none, or task=run lora.mode=bake save={spec.save}"
        )
    if spec.int8.checkpoint is not None:
        raise ConfigError("task=quantize reads model.location; set it to the file, and int8.checkpoint=null")
    assert not isinstance(spec.outlier, AutoOutlier)  # it needs a calibration
    return spec.outlier


def check_needs_no_calibration(spec: RunSpec) -> None:
    """Raise ConfigError for the first setting that needs calibration images."""
    needs_calibration = {
        f"outlier={spec.outlier.name}": spec.outlier.needs_calibration,
        f"rounding={spec.rounding.name}": spec.rounding.needs_calibration,
        "model_type.mixed_precision=auto": spec.model_type.mixed_precision == "auto",
        "int8.bits=auto": spec.int8.bits == AUTO,
    }
    for setting, is_needed in needs_calibration.items():
        if is_needed:
            raise ConfigError(
                f"{setting} needs calibration images, and task=quantize looks at weights alone; "
                f"set task=run save={spec.save}, which generates them"
            )


def choose_location(location: Any, component: str | None) -> tuple[str, str | None]:
    """Choose the location of a denoiser.

    Args:
        location: a path or hub id; of a pipeline whose denoisers are named one by one, denoiser -> location.
        component: which denoiser.

    Returns:
        The location, and which part of it: None for a denoiser that has a location of its own.

    Raises:
        ConfigError: when several are named and `component` is none of them.
    """
    if not isinstance(location, Mapping):
        return str(location), component
    if component not in location:
        choices = " or ".join(f"task.component={name}" for name in location)
        raise ConfigError(f"model.location names {len(location)} denoisers; choose one: {choices}")
    return str(location[component]), None


def build_metadata(
    files: TensorFiles, spec: RunSpec, checkpoint: DenoiserCheckpoint, plans: Sequence[LayerPlan]
) -> dict[str, str]:
    """Build the metadata of the new file: that of the source, and how the file was made.

    Args:
        files: the source.
        spec: the settings.
        checkpoint: what the source is.
        plans: of all layers.
    """
    options: dict[str, Any] = {"outlier": spec.outlier, "rounding": spec.rounding}
    provenance: dict[str, Any] = {
        "int8run": __version__,
        "model": spec.model.location,
        "revision": spec.model.revision,
        "source": {
            **describe_source(files),
            "sha256": hash_checkpoint(files),
            "sha256_of": f"keys, dtypes, shapes and the first {HASHED_BYTES} bytes of every tensor",
        },
        "family": checkpoint.family.name,
        "denoiser": checkpoint.class_name,
        "outlier": spec.outlier.name,
        "rounding": spec.rounding.name,
        **spec.int8.describe_bits(),
        "settings": {name: asdict(option) for name, option in options.items()},
        "seed": spec.seed,
        "loras": [],
        "kept_float": {plan.name: plan.skip_reason for plan in plans if plan.skip_reason is not None},
    }
    return merge_metadata(files.metadata, provenance)


def print_header(spec: RunSpec, source: ResolvedWeights, plan: FilePlan) -> None:
    """Print what is read and what is written."""
    num_int8 = sum(target.int8 for target in plan.targets)
    print_read_and_written(
        read=[
            ("read", source.path),
            ("files", len(plan.files.files)),
            ("size", format_megabytes(count_bytes(plan.files))),
            ("family", plan.checkpoint.family.name),
        ],
        written=[
            ("write", plan.path),
            ("INT8 layers", num_int8),
            *spec.int8.describe_bits().items(),
            ("outlier", spec.outlier.name),
            ("rounding", spec.rounding.name),
        ],
    )
    warn_replaced(plan.path, spec.save)


def write_config(config: Mapping[str, Any] | None, path: Path) -> None:
    """Write the config of the denoiser's class, which stays as it was.

    Raises:
        FileError: when it cannot be written.
    """
    try:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise make_write_error(path, error) from error
