"""`task=quantize task.component=text_encoder`: a text encoder from file to file, one tensor at a time."""

import importlib.metadata
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
from torch import nn

from int8run.checkpoints.comfy_formats import TORCH_DTYPES, collect_tensors, plan_packed_entries
from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.output_path import prepare_output_path
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, suggest_similar
from int8run.layers.plan import LayerPlan
from int8run.models.resolve_weights import CONFIG_NAME, MODEL_INDEX_NAME, SAFETENSORS, to_local_path
from int8run.models.source import make_download_error, read_config
from int8run.models.state_dict_adapter import TensorPart, join_shapes
from int8run.outlier.base import OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.pipeline.text_encoders import EncoderSlot, find_encoder_slots
from int8run.quant.formats import FORMATS, WeightFormat
from int8run.report.console import Progress, print_lines
from int8run.report.formatting import format_megabytes, format_pairs
from int8run.report.run_files import write_json, write_layers_csv
from int8run.tasks.quantize_checkpoint import (
    MegabyteProgress,
    collect_metrics,
    count_skip_reasons,
    format_summary,
    hash_checkpoint,
    resolve_new_file,
)
from int8run.text_encoders.build import fit_weights
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.plan_layers import find_source_layer, format_counts, plan_quantization
from int8run.text_encoders.quantized_layers import quantize_weight
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.state_dict_adapter import map_canonical_names
from int8run.text_encoders.weights import EncoderFile, check_finite

log = logging.getLogger(__name__)
BYTES = "U8"
FILE = f"model{SAFETENSORS}"  # in a folder, as transformers has it


@dataclass
class EncoderTarget:
    """One tensor of the new file.

    Args:
        parts: of the source's tensors.
        dtype: safetensors' word, of what stays float.
        form: of a weight that is quantized.
        plan: of a Linear or an embedding.
        copied: the layer of the source whose codes are taken as they are.
        transform: what is done to the weight; known before its numbers are.
    """

    key: str
    parts: tuple[TensorPart, ...]
    shape: tuple[int, ...]
    dtype: str
    form: WeightFormat | None = None
    plan: LayerPlan | None = None
    copied: str | None = None
    transform: OutlierTransform = field(default_factory=OutlierTransform)

    def entries(self) -> list[TensorEntry]:
        """What it adds to the new file."""
        if self.form is None:
            return [TensorEntry(self.key, self.dtype, self.shape)]
        return plan_packed_entries(self.key, self.form, (self.shape[0], self.shape[1]), self.transform)


def quantize_text_encoder(spec: RunSpec, job: Job, component: str) -> dict[str, float]:
    """Quantize a text encoder of `model.location` into `save`, to the format of `clip=`; layers.csv and metrics.json say what became of it.

    Returns:
        The metrics.

    Raises:
        ConfigError: for settings that say nothing about text encoders, or when no layer is quantized.
        FileError: when the source cannot be read or the result not be written.
    """
    form = choose_format(spec, component)
    prepare_output_path(str(spec.save))  # before the work whose result it is to hold
    slot = find_slot(spec, component)
    started = time.perf_counter()
    weights = EncoderFile(slot.folder, class_name=slot.class_name)
    with weights.files:
        to_folder = Path(str(spec.save)).suffix != SAFETENSORS
        config = (
            dict(read_config(slot.folder))
            if slot.class_name
            else build_config(weights.encoder, weights.shapes)
        )
        path = resolve_new_file(
            str(Path(str(spec.save)) / FILE) if to_folder else str(spec.save), weights.files
        )
        targets = plan_targets(
            weights, slot.class_name or weights.encoder.classes[0], config, form, to_folder
        )
        plans = [target.plan for target in targets if target.plan is not None]
        check_plans(weights, targets, form)
        read = sum(info.nbytes for info in weights.files.values())
        print_lines(
            format_pairs(
                [("read", weights.where), ("encoder", weights.encoder.name), ("size", format_megabytes(read))]
            ),
            format_pairs(
                [
                    ("write", path),
                    ("layers", sum(target.form is not None for target in targets)),
                    ("format", form.name),
                ]
            ),
        )
        if path.exists():
            log.warning("save=%s replaces a file that is there", spec.save)
        entries = [entry for target in targets for entry in target.entries()]
        with (
            StreamWriter(path, entries, build_metadata(weights, spec, plans)) as writer,
            Progress(spec.progress).track_loop("quantize, MB", max(1, read // 10**6)) as advance,
        ):
            steps = MegabyteProgress(advance)
            for target in targets:
                write_target(writer, weights, target)
                steps(
                    sum(
                        weights.files[weights.prefix + part.key].nbytes
                        for part in target.parts
                        if part.rows is None
                    )
                )
            writer.finish()
            written = writer.nbytes
        if to_folder:
            (path.parent / CONFIG_NAME).write_text(json.dumps(config, indent=2, default=str) + "\n")
    metrics = collect_metrics(plans, read, written, time.perf_counter() - started, "clip", "quantized")
    write_layers_csv(plans, job.output_dir / "layers.csv")
    about = {"source": weights.where, "save": str(path), "encoder": weights.encoder.name, "format": form.name}
    write_json({"metrics": metrics, **about}, job.output_dir / "metrics.json")
    print_lines(
        *format_summary(plans, metrics, form.name),
        f"files: {path}, {job.output_dir / 'layers.csv'}, {job.output_dir / 'metrics.json'}",
    )
    return metrics


def choose_format(spec: RunSpec, component: str) -> WeightFormat:
    """The format to write.

    Raises:
        ConfigError: when there is none, or no place to write to.
    """
    if spec.save is None:
        raise ConfigError("task=quantize writes a checkpoint; set save=<file.safetensors> or save=<folder>")
    form = FORMATS.get(spec.clip.format)
    if form is None or form.is_read_only:
        words = ", ".join(name for name, known in FORMATS.items() if not known.is_read_only)
        raise ConfigError(
            f"task.component={component} is written in the format of clip=; choose one: {words}"
        )
    if spec.clip.path is not None:
        raise ConfigError("task=quantize reads model.location; set it to the file, and clip.path=null")
    return form


def find_slot(spec: RunSpec, component: str) -> EncoderSlot:
    """The source: a component of a pipeline, or a file or folder that is an encoder itself.

    Raises:
        ConfigError: when the pipeline has no such component.
        FileError: when it cannot be had.
    """
    location = str(spec.model.location)
    path = to_local_path(location)
    if path.is_file() or (path.is_dir() and not (path / MODEL_INDEX_NAME).is_file()):
        own = path.is_dir() and (path / CONFIG_NAME).is_file()
        named = read_config(path).get("architectures") if own else None
        return EncoderSlot(component, str(named[0]) if named else "", path)
    if not path.is_dir():
        wanted = [MODEL_INDEX_NAME, f"{component}/*.json", f"{component}/*{SAFETENSORS}"]
        try:
            path = Path(snapshot_download(location, revision=spec.model.revision, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise make_download_error(location, "model.location", error) from error
    there = find_encoder_slots(
        path, {name: part for name, part in spec.model.parts.items() if name == component}
    )
    if component not in there:
        names = ", ".join(there) or "none"
        raise ConfigError(
            f"task.component={component} is no text encoder of {location}; {suggest_similar(component, list(there))}it has {names}"
        )
    return there[component]


def plan_targets(
    weights: EncoderFile, class_name: str, config: Mapping[str, Any], form: WeightFormat, to_folder: bool
) -> list[EncoderTarget]:
    """What the new file will hold: in a single file by ComfyUI's names, in a folder by those of the source."""
    model = build_skeleton(class_name, dict(config), torch.float32)
    layout = fit_weights(weights, model)
    names, dropped = map_canonical_names(weights.encoder, weights.shapes)
    blobs = {
        key: (TensorPart(key),) for key in dropped if weights.files[weights.prefix + key].dtype == BYTES
    }  # tokenizers
    if to_folder and not weights.prefix:
        names = {key: (TensorPart(key),) for key in weights.shapes if key not in dropped}
    modules = {
        source: (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
        and name + WEIGHT in layout.parts
        and (source := find_source_layer(layout.parts[name + WEIGHT])) is not None
    }
    targets = []
    for key, parts in {**names, **blobs}.items():
        shape = join_shapes(parts, weights.shapes) or ()
        target = EncoderTarget(key, parts, shape, choose_dtype(weights, parts))
        source = find_source_layer(parts)
        if source in modules and len(shape) == 2:
            plan_layer(target, weights, source, modules[source][1], form)
        targets.append(target)
    return targets


def choose_dtype(weights: EncoderFile, parts: tuple[TensorPart, ...]) -> str:
    """The dtype of what stays float: its own, of quantized weights bfloat16."""
    words = {weights.files[weights.prefix + part.key].dtype for part in parts}
    if any(weights.get_format(part.key.removesuffix(WEIGHT)) for part in parts):
        return "BF16"
    return words.pop() if len(words) == 1 else "F32"


def plan_layer(
    target: EncoderTarget, weights: EncoderFile, source: str, module: nn.Module, form: WeightFormat
) -> None:
    """Decide what becomes of a Linear or an embedding."""
    rows, columns = target.shape
    target.plan = plan = LayerPlan(target.key.removesuffix(WEIGHT), columns, rows, None)
    plan_quantization(plan, module, weights.encoder, source_layer=source, target=form)
    word = weights.get_format(source)
    if word and word == (plan.rounding or form.name):  # in this format already, embeddings included
        target.copied, target.form, target.transform = (
            source,
            form,
            weights.layers[source].read_transform(weights.files),
        )
        plan.skip_reason, plan.rounding = None, f"{word}, as in the source"
    elif plan.skip_reason is None:
        target.form = FORMATS[plan.rounding]
        if target.form.is_rotated:
            target.transform = ConvRot().fit(torch.ones(1, columns), None)


def check_plans(weights: EncoderFile, targets: Sequence[EncoderTarget], form: WeightFormat) -> None:
    """Say what is other than one might think.

    Raises:
        ConfigError: when no layer is quantized.
    """
    plans = [target.plan for target in targets if target.plan is not None]
    if not any(target.form is not None for target in targets):
        raise ConfigError(
            f"{weights.where}: no layer becomes {form.name} ({format_counts(count_skip_reasons(plans))})"
        )
    again = Counter(
        weights.get_format(part.key.removesuffix(WEIGHT))
        for t in targets
        if t.plan is not None and t.copied is None
        for part in t.parts
    )
    again.pop("", None)
    if again:
        log.warning(
            "%s: layers that are quantized already are rounded once more, from what they stand for: %s",
            weights.where,
            format_counts(again),
        )
    others = Counter(
        plan.outlier_skip_reason for plan in plans if plan.skip_reason is None and plan.outlier_skip_reason
    )
    if others:
        log.warning(
            "%s: %d layers cannot be %s: %s", weights.where, others.total(), form.name, format_counts(others)
        )


def write_target(writer: StreamWriter, weights: EncoderFile, target: EncoderTarget) -> None:
    """Read, quantize and write one tensor."""
    if target.form is None:
        for part in target.parts:
            blob = target.dtype == "U8"
            tensor = (
                weights.files.read(weights.prefix + part.key)
                if blob
                else check_finite(weights.where, part.key, weights.read_tensor(part.key))
            )
            writer.write(target.key, part.extract(tensor).to(TORCH_DTYPES[target.dtype]).contiguous())
        return
    layer = None if target.copied is None else weights.read_packed(target.copied)
    if layer is None:
        assert target.plan is not None
        layer = quantize_weight(target.plan, weights.read_tensor(target.parts[0].key), target.form)
    for key, data in collect_tensors(target.key, layer.weight, target.form, layer.transform).items():
        writer.write(key, data)


def build_metadata(weights: EncoderFile, spec: RunSpec, plans: Sequence[LayerPlan]) -> dict[str, str]:
    """What the source's header says, without a description of layers that is none any more, and how the file was made."""
    note = {
        "int8run": importlib.metadata.version("int8run"),
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
    kept = {
        key: text
        for key, text in weights.files.metadata.items()
        if key not in (PROVENANCE_KEY, "_quantization_metadata")
    }
    return {"format": "pt", **kept, PROVENANCE_KEY: json.dumps(note)}
