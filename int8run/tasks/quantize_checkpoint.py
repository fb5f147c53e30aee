"""`task=quantize`: a checkpoint from file to file, in the memory of a few layers."""

import hashlib
import importlib.metadata
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.checkpoints.output_path import prepare_output_path
from int8run.checkpoints.detect import get_logical_shapes, read_layers
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import make_write_error
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.export.stream_quantizer import (
    KeyParts,
    QuantizationRecipe,
    Target,
    keep_own_names,
    plan_targets,
    write_targets,
)
from int8run.layers.plan import LayerPlan
from int8run.metrics.memory import read_peak_bytes
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import AutoFamily, ModelFamily, load_families
from int8run.models.key_mapping import load_mappings
from int8run.models.name_pattern import match_pattern
from int8run.models.resolve_weights import CONFIG_NAME, WEIGHTS_NAME, ResolvedWeights, resolve_weights
from int8run.models.state_dict_adapter import (
    TensorPart,
    find_drop_reason,
    find_prefix,
    find_targets,
    to_original,
)
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod
from int8run.ptq.quantize import check_outlier_method
from int8run.report.console import Progress, print_lines
from int8run.report.formatting import format_megabytes, format_pairs
from int8run.report.run_files import write_json, write_layers_csv

log = logging.getLogger(__name__)
HASHED_BYTES = 4096  # bytes of each tensor that tell one checkpoint from another of the same shapes
BLOCK = re.compile(r"(\w+\.)\d+\.")


@dataclass(frozen=True)
class DenoiserCheckpoint:
    """What a checkpoint is.

    Args:
        class_name: diffusers class of the denoiser; empty when nobody knows it.
        prefix: before the denoiser's keys in the file.
        parameters: of diffusers that each key, without prefix, stands for.
        native: the file uses its authors' names and not those of diffusers.
    """

    family: ModelFamily
    class_name: str
    prefix: str
    parameters: Mapping[str, tuple[str, ...]]
    native: bool

    def find_skip_reason(self, key: str, parts: tuple[TensorPart, ...]) -> str | None:
        """The reason why a weight stays float: that of any of the layers that it holds."""
        names = [name for part in parts for name in self.parameters[part.key.removeprefix(self.prefix)]]
        if not names:
            key = parts[0].key.removeprefix(self.prefix)
            return f"no layer of {self.class_name}: {find_drop_reason(key, load_mappings(self.class_name))}"
        for name in names:
            why = (
                self.family.find_skip_reason(name.removesuffix(WEIGHT))
                if name.endswith(WEIGHT)
                else "a table, no Linear"
            )
            if why is not None:
                return why if len(names) == 1 else f"{why} ({name.removesuffix(WEIGHT)} is a part of it)"
        return None


def quantize_file(spec: RunSpec, job: Job, component: str | None) -> dict[str, float]:
    """Quantize `model.location` into `save`; show what becomes of it, leave layers.csv and metrics.json in the output folder.

    Returns:
        The metrics.

    Raises:
        ConfigError: for settings that need the model to run, or when no layer becomes INT8.
        FileError: when the source cannot be read or the result not be written.
    """
    outlier = check_streamable(spec)
    prepare_output_path(str(spec.save))  # before the work whose result it is to hold
    location, component = choose_location(spec.model.location, component)
    located = resolve_weights(location, spec.model.revision, component)
    recipe = QuantizationRecipe(outlier, spec.rounding, getattr(torch, spec.model.dtype))
    started = time.perf_counter()
    with TensorFiles.open(located.path) as files:
        prefix = find_prefix(files)
        stored = read_layers(files, prefix)
        known = recognize_checkpoint(files, stored, prefix, located, spec.model_type)
        to_folder = Path(str(spec.save)).suffix != ".safetensors"
        path = (
            resolve_file_in_folder(str(spec.save), located, known, files)
            if to_folder
            else resolve_new_file(str(spec.save), files)
        )
        names = plan_names(files, stored, known, to_folder)
        planned = plan_targets(files, stored, names, known.find_skip_reason, recipe)
        plans = [target.plan for target in planned if target.plan is not None]
        check_plans(plans, planned, known, outlier)
        metadata = build_metadata(files, spec, known, plans)
        read, total = (
            sum(info.nbytes for info in files.values()),
            sum(t.plan is not None and t.int8 for t in planned),
        )
        print_lines(
            format_pairs(
                [
                    ("read", located.path),
                    ("files", len(files.files)),
                    ("size", format_megabytes(read)),
                    ("family", known.family.name),
                ]
            ),
            format_pairs(
                [
                    ("write", path),
                    ("INT8 layers", total),
                    ("outlier", outlier.name),
                    ("rounding", spec.rounding.name),
                ]
            ),
        )
        if path.exists():
            log.warning("save=%s replaces a file that is there", spec.save)
        with Progress(spec.progress).track_loop("quantize, MB", max(1, read // 10**6)) as advance:
            written = write_targets(files, stored, planned, path, metadata, recipe, MegabyteProgress(advance))
        if to_folder:
            write_config(located.config, path.with_name(CONFIG_NAME))
    metrics = collect_metrics(plans, read, written, time.perf_counter() - started)
    write_layers_csv(plans, job.output_dir / "layers.csv")
    about = {
        "source": str(located.path),
        "save": str(path),
        "family": known.family.name,
        "denoiser": known.class_name,
    }
    write_json({"metrics": metrics, **about}, job.output_dir / "metrics.json")
    print_lines(
        *format_summary(plans, metrics),
        f"files: {path}, {job.output_dir / 'layers.csv'}, {job.output_dir / 'metrics.json'}",
    )
    return metrics


def check_streamable(spec: RunSpec) -> OutlierMethod:
    """The outlier method, if this job needs no more than the weights.

    Raises:
        ConfigError: for what needs the model to run, or another task.
    """
    if spec.save is None:
        raise ConfigError("task=quantize writes a checkpoint; set save=<file.safetensors> or save=<folder>")
    drawn = {
        f"outlier={spec.outlier.name}": spec.outlier.needs_calibration,
        f"rounding={spec.rounding.name}": spec.rounding.needs_calibration,
        "model_type.mixed_precision=auto": spec.model_type.mixed_precision == "auto",
    }
    for setting, needed in drawn.items():
        if needed:
            raise ConfigError(
                f"{setting} needs calibration pictures, and task=quantize looks at weights alone; set task=run save={spec.save}, which "
                "draws them"
            )
    if spec.clip.is_quantized:
        raise ConfigError(
            "task=quantize writes one component, here the denoiser, and clip= is about text encoders; leave it out, or set "
            "task.component=text_encoder to write one"
        )
    if spec.lora.adapters:
        raise ConfigError(
            f"task=quantize leaves LoRAs out; set lora=none, or task=run lora.mode=bake save={spec.save}"
        )
    if spec.int8.checkpoint is not None:
        raise ConfigError("task=quantize reads model.location; set it to the file, and int8.checkpoint=null")
    assert not isinstance(spec.outlier, AutoOutlier)  # it needs a calibration
    return spec.outlier


def choose_location(location: Any, component: str | None) -> tuple[str, str | None]:
    """The location of the denoiser that is meant, and which part of it: files that are named one by one are parts already.

    Raises:
        ConfigError: when none of them is named.
    """
    if not isinstance(location, Mapping):
        return str(location), component
    if component not in location:
        raise ConfigError(
            f"model.location names {len(location)} denoisers; choose one: task.component={' or task.component='.join(location)}"
        )
    return str(location[component]), None


def recognize_checkpoint(
    files: TensorFiles,
    stored: Mapping[str, CheckpointLayer],
    prefix: str,
    located: ResolvedWeights,
    asked: ModelFamily | AutoFamily,
) -> DenoiserCheckpoint:
    """The family and the class of a checkpoint: told by its config, else by its names."""
    keys = [key.removeprefix(prefix) for key in keep_own_names(files, stored) if key.startswith(prefix)]
    automatic = isinstance(asked, AutoFamily)
    families = [asked] if isinstance(asked, ModelFamily) else [*(asked.families or load_families()).values()]
    known = get_logical_shapes(files, stored)
    shapes = {key: known[prefix + key] for key in keys}
    found = None if located.class_name else detect_denoiser(keys, families, shapes if automatic else None)
    fallback = asked.denoisers[0] if isinstance(asked, ModelFamily) and len(asked.denoisers) == 1 else ""
    class_name = located.class_name or (found[1] if found else fallback)
    native = has_original_names(shapes, class_name)
    rules = load_mappings(class_name)
    parameters = (
        find_targets(keys, class_name)
        if native
        else {key: () if find_drop_reason(key, rules) else (key,) for key in keys}
    )
    linears = {
        name.removesuffix(WEIGHT): stored[(prefix + key).removesuffix(WEIGHT)].columns
        for key, names in parameters.items()
        if (prefix + key).removesuffix(WEIGHT) in stored and key.endswith(WEIGHT)
        for name in names
        if name.endswith(WEIGHT)
    }
    if automatic and found:
        return DenoiserCheckpoint(found[0], class_name, prefix, parameters, native)
    family = asked.resolve_family(
        class_name or f"what {located.path.name} holds", find_repeated_blocks(linears), linears
    )
    return DenoiserCheckpoint(family, class_name, prefix, parameters, native)


def has_original_names(keys: Iterable[str], class_name: str) -> bool:
    """Whether names are those of a model's authors: more of them have another name in diffusers than are such names.

    A few names of one side may look like names of the other.
    """
    names = load_mappings(class_name)
    rules = (*names.parameters, *names.names)
    authors = diffusers = 0
    for key in keys:
        authors += any(match_pattern(rule.original, rule.extract_name(key)) is not None for rule in rules)
        diffusers += any(
            match_pattern(target, rule.extract_name(key)) is not None
            for rule in rules
            for target in rule.targets
        )
    return authors > diffusers


def find_repeated_blocks(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Prefixes of the repeated blocks (`transformer_blocks.0.`) in the order of the names; a list of one is none."""
    found = list(dict.fromkeys(match[0] for name in names if (match := BLOCK.match(name))))
    lists = Counter(BLOCK.fullmatch(prefix)[1] for prefix in found)  # type: ignore[index] # each was made by a match
    return [prefix for prefix in found if lists[BLOCK.fullmatch(prefix)[1]] > 1]  # type: ignore[index]


def resolve_new_file(save: str, files: TensorFiles) -> Path:
    """The file to write.

    Raises:
        ConfigError: when it would replace what is read.
    """
    path = Path(save).expanduser().absolute()
    if any(path == file.absolute() or (path.exists() and path.samefile(file)) for file in files.files):
        raise ConfigError(f"save={save} is the source itself; choose another name")
    return path


def resolve_file_in_folder(
    save: str, located: ResolvedWeights, known: DenoiserCheckpoint, files: TensorFiles
) -> Path:
    """The file to write in a folder as diffusers has it.

    Raises:
        ConfigError: when the source does not have diffusers' names or config, or the folder holds other weights.
    """
    path = Path(save).expanduser().absolute()
    if known.native:
        raise ConfigError(
            f"save={save} is a folder, and {located.path} has its authors' names, not those of diffusers; save to a .safetensors file"
        )
    if located.config is None:
        raise ConfigError(
            f"save={save} is a folder, and there is no {CONFIG_NAME} beside {located.path} to go with it; save to a .safetensors file"
        )
    others = (
        [file.name for file in sorted(path.glob("*.safetensors*")) if file.name != WEIGHTS_NAME]
        if path.is_dir()
        else []
    )
    if others or any(file.parent.absolute() == path for file in files.files):
        held = f"{others[0]}, another checkpoint" if others else "the source itself"
        raise ConfigError(f"save={save} holds {held}; choose another folder")
    return path / WEIGHTS_NAME


def write_config(config: Mapping[str, Any] | None, path: Path) -> None:
    """The config of the class, which stays as it was.

    Raises:
        FileError: when it cannot be written.
    """
    try:
        path.write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise make_write_error(path, error) from error


def plan_names(
    files: TensorFiles, stored: Mapping[str, CheckpointLayer], known: DenoiserCheckpoint, to_folder: bool
) -> KeyParts:
    """What the tensors are called in the new file: as in the source, or for one of diffusers saved to a file, as by its authors."""
    own = keep_own_names(files, stored)
    if known.native or (not known.class_name and not to_folder):
        return own
    shapes = get_logical_shapes(files, stored)
    prefix, inside = known.prefix, [key for key in own if key.startswith(known.prefix)]
    rest = {key: parts for key, parts in own.items() if not key.startswith(prefix)}
    if to_folder:
        return {key.removeprefix(prefix): (TensorPart(key),) for key in inside}
    native = to_original({key.removeprefix(prefix): shapes[key] for key in inside}, known.class_name)
    return {
        key: tuple(replace(part, key=prefix + part.key) for part in parts) for key, parts in native.items()
    } | rest


def check_plans(
    plans: Sequence[LayerPlan], planned: Sequence[Target], known: DenoiserCheckpoint, outlier: OutlierMethod
) -> None:
    """Say which layers are taken as they are and which the outlier method cannot take.

    Raises:
        ConfigError: when no layer becomes INT8, with the reasons by count.
    """
    copied = [target for target in planned if target.copied]
    chosen = [
        target.plan for target in planned if target.plan is not None and target.int8 and not target.copied
    ]
    if copied:
        kinds = ", ".join(f"{n} × {label}" for label, n in Counter(t.transform.label for t in copied).items())
        log.info(
            "%d layers are INT8 in the source and are taken as they are (%s); outlier= and rounding= have no say there",
            len(copied),
            kinds,
        )
    if chosen:
        check_outlier_method(outlier, chosen)
    if not chosen and not copied:
        counted = (
            "; ".join(f"{n} × {why}" for why, n in count_skip_reasons(plans).items())
            or "it has no weight with two dimensions"
        )
        raise ConfigError(f"no layer becomes INT8 ({counted}); choose another model_type=")


def count_skip_reasons(plans: Sequence[LayerPlan]) -> Counter[str]:
    """Why layers stay float, by count; the name of a part, which differs from layer to layer, left out."""
    return Counter(plan.skip_reason.split(" (")[0] for plan in plans if plan.skip_reason is not None)


def build_metadata(
    files: TensorFiles, spec: RunSpec, known: DenoiserCheckpoint, plans: Sequence[LayerPlan]
) -> dict[str, str]:
    """What the source's header says, without a description of quantized layers that is none any more, and how the file was made."""
    choices: dict[str, Any] = {"outlier": spec.outlier, "rounding": spec.rounding}
    note: dict[str, Any] = {
        "int8run": importlib.metadata.version("int8run"),
        "model": spec.model.location,
        "revision": spec.model.revision,
        "source": {
            "files": [file.name for file in files.files],
            "sha256": hash_checkpoint(files),
            "sha256_of": f"keys, dtypes, shapes and the first {HASHED_BYTES} bytes of every tensor",
        },
        "family": known.family.name,
        "denoiser": known.class_name,
        "outlier": spec.outlier.name,
        "rounding": spec.rounding.name,
        "settings": {name: asdict(choice) for name, choice in choices.items()},
        "seed": spec.seed,
        "loras": [],
        "kept_float": {plan.name: plan.skip_reason for plan in plans if plan.skip_reason is not None},
    }
    kept = {
        key: text
        for key, text in files.metadata.items()
        if key not in (PROVENANCE_KEY, "_quantization_metadata")
    }
    return {"format": "pt", **kept, PROVENANCE_KEY: json.dumps(note)}


def hash_checkpoint(files: TensorFiles) -> str:
    """A hash that tells checkpoints apart without reading all of them."""
    digest, buffer = hashlib.sha256(), torch.empty(HASHED_BYTES, dtype=torch.uint8)
    for key, info in files.items():
        digest.update(json.dumps([key, info.dtype, info.shape]).encode())
        part = buffer[: min(HASHED_BYTES, info.nbytes)]
        files.read_bytes(info.file, info.start, part)
        digest.update(part.numpy().data)
    return digest.hexdigest()


class MegabyteProgress:
    """Bytes for a bar that counts megabytes."""

    def __init__(self, advance: Any):
        self.advance, self.left = advance, 0

    def __call__(self, count: int) -> None:
        whole, self.left = divmod(self.left + count, 10**6)
        self.advance(whole)


def collect_metrics(
    plans: Sequence[LayerPlan],
    read: int,
    written: int,
    seconds: float,
    group: str = "quant",
    made: str = "int8",
) -> dict[str, float]:
    """The numbers of the job.

    Args:
        group, made: words of the metrics' names.
    """
    sqnr = [plan.measured["weight_sqnr_db"] for plan in plans if "weight_sqnr_db" in plan.measured]
    int8 = [plan for plan in plans if plan.skip_reason is None]
    return {
        f"{group}/layers_{made}": len(int8),
        f"{group}/layers_float": len(plans) - len(int8),
        **(
            {f"{group}/weight_sqnr_db_mean": sum(sqnr) / len(sqnr), f"{group}/weight_sqnr_db_min": min(sqnr)}
            if sqnr
            else {}
        ),
        "build/quantize_s": seconds,
        "build/read_bytes": read,
        "build/written_bytes": written,
        "build/read_bytes_per_s": read / seconds,
        "memory/peak_bytes": read_peak_bytes(torch.device("cpu")),
    }


def format_summary(plans: Sequence[LayerPlan], metrics: Mapping[str, float], name: str = "INT8") -> list[str]:
    """What was done, in a few lines.

    Args:
        name: what layers became.
    """
    read, written = metrics["build/read_bytes"], metrics["build/written_bytes"]
    kept = "; ".join(f"{n} × {why}" for why, n in count_skip_reasons(plans).items())
    made = sum(plan.skip_reason is None for plan in plans)
    layers: list[tuple[str, object]] = [
        (name, f"{made} layers"),
        ("float", f"{len(plans) - made}{f' ({kept})' if kept else ''}"),
    ]
    sqnr = {key.rpartition("_")[2]: value for key, value in metrics.items() if "weight_sqnr_db" in key}
    if sqnr:
        layers.append(("SQNR, mean / min", f"{sqnr['mean']:.1f} / {sqnr['min']:.1f} dB"))
    size = (
        f"{format_megabytes(read)} → {format_megabytes(written)}, {written / read:.2f}×"
        if read
        else format_megabytes(written)
    )
    speed = (
        f"{metrics['build/quantize_s']:.1f} s, {format_megabytes(metrics['build/read_bytes_per_s'])}/s read"
    )
    return [
        format_pairs(layers),
        format_pairs(
            [("size", size), ("time", speed), ("peak memory", format_megabytes(metrics["memory/peak_bytes"]))]
        ),
    ]
