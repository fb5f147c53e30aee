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

from int8run.checkpoints.comfy_int8 import NOTE, WEIGHT, prepare_folder
from int8run.checkpoints.detect import real_shapes, stored_layers
from int8run.checkpoints.layer import StoredLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import unwritable
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.export.stream_quantizer import Names, Recipe, Target, own_names, plan_targets, stream
from int8run.layers.plan import LayerPlan
from int8run.metrics.memory import peak_bytes
from int8run.models.detect_family import denoiser_of
from int8run.models.family import AutoFamily, ModelFamily, shipped_families
from int8run.models.key_mapping import captures, names_of
from int8run.models.resolve_weights import CONFIG, FILE, Located, locate
from int8run.models.state_dict_adapter import Part, strip_prefix, targets, to_native, why_dropped
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod
from int8run.ptq.quantize import check_outlier
from int8run.report.console import Progress, megabytes, pairs_line, say
from int8run.report.run_files import write_json, write_layers

log = logging.getLogger(__name__)
SAMPLED = 4096  # bytes of each tensor that tell one checkpoint from another of the same shapes
BLOCK = re.compile(r"(\w+\.)\d+\.")


@dataclass(frozen=True)
class Recognised:
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

    def why_float(self, key: str, parts: tuple[Part, ...]) -> str | None:
        """The reason why a weight stays float: that of any of the layers that it holds."""
        names = [name for part in parts for name in self.parameters[part.key.removeprefix(self.prefix)]]
        if not names:
            key = parts[0].key.removeprefix(self.prefix)
            return f"no layer of {self.class_name}: {why_dropped(key, names_of(self.class_name))}"
        for name in names:
            why = (
                self.family.why_float(name.removesuffix(WEIGHT))
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
    outlier = streamable(spec)
    prepare_folder(str(spec.save))  # before the work whose result it is to hold
    location, component = chosen(spec.model.location, component)
    located = locate(location, spec.model.revision, component)
    recipe = Recipe(outlier, spec.rounding, getattr(torch, spec.model.dtype))
    started = time.perf_counter()
    with TensorFiles.open(located.path) as files:
        prefix = strip_prefix(files)
        stored = stored_layers(files, prefix)
        known = recognise(files, stored, prefix, located, spec.model_type)
        to_folder = Path(str(spec.save)).suffix != ".safetensors"
        path = (
            file_in_folder(str(spec.save), located, known, files)
            if to_folder
            else new_file(str(spec.save), files)
        )
        names = new_names(files, stored, known, to_folder)
        planned = plan_targets(files, stored, names, known.why_float, recipe)
        plans = [target.plan for target in planned if target.plan is not None]
        check_plans(plans, planned, known, outlier)
        metadata = header_metadata(files, spec, known, plans)
        read, total = (
            sum(info.nbytes for info in files.values()),
            sum(t.plan is not None and t.int8 for t in planned),
        )
        say(
            pairs_line(
                [
                    ("read", located.path),
                    ("files", len(files.files)),
                    ("size", megabytes(read)),
                    ("family", known.family.name),
                ]
            ),
            pairs_line(
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
        with Progress(spec.progress).count("quantize, MB", max(1, read // 10**6)) as advance:
            written = stream(files, stored, planned, path, metadata, recipe, Steps(advance))
        if to_folder:
            write_config(located.config, path.with_name(CONFIG))
    metrics = measured(plans, read, written, time.perf_counter() - started)
    write_layers(plans, job.output_dir / "layers.csv")
    about = {
        "source": str(located.path),
        "save": str(path),
        "family": known.family.name,
        "denoiser": known.class_name,
    }
    write_json({"metrics": metrics, **about}, job.output_dir / "metrics.json")
    say(
        *summary(plans, metrics),
        f"files: {path}, {job.output_dir / 'layers.csv'}, {job.output_dir / 'metrics.json'}",
    )
    return metrics


def streamable(spec: RunSpec) -> OutlierMethod:
    """The outlier method, if this job needs no more than the weights.

    Raises:
        ConfigError: for what needs the model to run, or another task.
    """
    if spec.save is None:
        raise ConfigError("task=quantize writes a checkpoint; set save=<file.safetensors> or save=<folder>")
    drawn = {
        f"outlier={spec.outlier.name}": spec.outlier.needs_calibration,
        f"rounding={spec.rounding.name}": spec.rounding.needs_calibration,
        "model_type.keep_float=auto": spec.model_type.keep_float == "auto",
    }
    for setting, needed in drawn.items():
        if needed:
            raise ConfigError(
                f"{setting} needs calibration pictures, and task=quantize looks at weights alone; set task=run save={spec.save}, which "
                "draws them"
            )
    if spec.clip.quantizes:
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


def chosen(location: Any, component: str | None) -> tuple[str, str | None]:
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


def recognise(
    files: TensorFiles,
    stored: Mapping[str, StoredLayer],
    prefix: str,
    located: Located,
    asked: ModelFamily | AutoFamily,
) -> Recognised:
    """The family and the class of a checkpoint: told by its config, else by its names."""
    keys = [key.removeprefix(prefix) for key in own_names(files, stored) if key.startswith(prefix)]
    automatic = isinstance(asked, AutoFamily)
    families = (
        [asked] if isinstance(asked, ModelFamily) else [*(asked.families or shipped_families()).values()]
    )
    known = real_shapes(files, stored)
    shapes = {key: known[prefix + key] for key in keys}
    found = None if located.class_name else denoiser_of(keys, families, shapes if automatic else None)
    fallback = asked.denoisers[0] if isinstance(asked, ModelFamily) and len(asked.denoisers) == 1 else ""
    class_name = located.class_name or (found[1] if found else fallback)
    native = is_native(shapes, class_name)
    rules = names_of(class_name)
    parameters = (
        targets(keys, class_name)
        if native
        else {key: () if why_dropped(key, rules) else (key,) for key in keys}
    )
    linears = {
        name.removesuffix(WEIGHT): stored[(prefix + key).removesuffix(WEIGHT)].columns
        for key, names in parameters.items()
        if (prefix + key).removesuffix(WEIGHT) in stored and key.endswith(WEIGHT)
        for name in names
        if name.endswith(WEIGHT)
    }
    if automatic and found:
        return Recognised(found[0], class_name, prefix, parameters, native)
    family = asked.for_denoiser(class_name or f"what {located.path.name} holds", repeated(linears), linears)
    return Recognised(family, class_name, prefix, parameters, native)


def is_native(keys: Iterable[str], class_name: str) -> bool:
    """Whether names are those of a model's authors: more of them have another name in diffusers than are such names.

    A few names of one side may look like names of the other.
    """
    names = names_of(class_name)
    rules = (*names.parameters, *names.names)
    authors = diffusers = 0
    for key in keys:
        authors += any(captures(rule.native, rule.subject(key)) is not None for rule in rules)
        diffusers += any(
            captures(target, rule.subject(key)) is not None for rule in rules for target in rule.targets
        )
    return authors > diffusers


def repeated(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Prefixes of the repeated blocks (`transformer_blocks.0.`) in the order of the names; a list of one is none."""
    found = list(dict.fromkeys(match[0] for name in names if (match := BLOCK.match(name))))
    lists = Counter(BLOCK.fullmatch(prefix)[1] for prefix in found)  # type: ignore[index] # each was made by a match
    return [prefix for prefix in found if lists[BLOCK.fullmatch(prefix)[1]] > 1]  # type: ignore[index]


def new_file(save: str, files: TensorFiles) -> Path:
    """The file to write.

    Raises:
        ConfigError: when it would replace what is read.
    """
    path = Path(save).expanduser().absolute()
    if any(path == file.absolute() or (path.exists() and path.samefile(file)) for file in files.files):
        raise ConfigError(f"save={save} is the source itself; choose another name")
    return path


def file_in_folder(save: str, located: Located, known: Recognised, files: TensorFiles) -> Path:
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
            f"save={save} is a folder, and there is no {CONFIG} beside {located.path} to go with it; save to a .safetensors file"
        )
    others = (
        [file.name for file in sorted(path.glob("*.safetensors*")) if file.name != FILE]
        if path.is_dir()
        else []
    )
    if others or any(file.parent.absolute() == path for file in files.files):
        held = f"{others[0]}, another checkpoint" if others else "the source itself"
        raise ConfigError(f"save={save} holds {held}; choose another folder")
    return path / FILE


def write_config(config: Mapping[str, Any] | None, path: Path) -> None:
    """The config of the class, which stays as it was.

    Raises:
        FileError: when it cannot be written.
    """
    try:
        path.write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def new_names(
    files: TensorFiles, stored: Mapping[str, StoredLayer], known: Recognised, to_folder: bool
) -> Names:
    """What the tensors are called in the new file: as in the source, or for one of diffusers saved to a file, as by its authors."""
    own = own_names(files, stored)
    if known.native or (not known.class_name and not to_folder):
        return own
    shapes = real_shapes(files, stored)
    prefix, inside = known.prefix, [key for key in own if key.startswith(known.prefix)]
    rest = {key: parts for key, parts in own.items() if not key.startswith(prefix)}
    if to_folder:
        return {key.removeprefix(prefix): (Part(key),) for key in inside}
    native = to_native({key.removeprefix(prefix): shapes[key] for key in inside}, known.class_name)
    return {
        key: tuple(replace(part, key=prefix + part.key) for part in parts) for key, parts in native.items()
    } | rest


def check_plans(
    plans: Sequence[LayerPlan], planned: Sequence[Target], known: Recognised, outlier: OutlierMethod
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
        check_outlier(outlier, chosen)
    if not chosen and not copied:
        counted = (
            "; ".join(f"{n} × {why}" for why, n in reasons(plans).items())
            or "it has no weight with two dimensions"
        )
        raise ConfigError(f"no layer becomes INT8 ({counted}); choose another model_type=")


def reasons(plans: Sequence[LayerPlan]) -> Counter[str]:
    """Why layers stay float, by count; the name of a part, which differs from layer to layer, left out."""
    return Counter(plan.keep_float.split(" (")[0] for plan in plans if plan.keep_float is not None)


def header_metadata(
    files: TensorFiles, spec: RunSpec, known: Recognised, plans: Sequence[LayerPlan]
) -> dict[str, str]:
    """What the source's header says, without a description of quantized layers that is none any more, and how the file was made."""
    choices: dict[str, Any] = {"outlier": spec.outlier, "rounding": spec.rounding}
    note: dict[str, Any] = {
        "int8run": importlib.metadata.version("int8run"),
        "model": spec.model.location,
        "revision": spec.model.revision,
        "source": {
            "files": [file.name for file in files.files],
            "sha256": fingerprint(files),
            "sha256_of": f"keys, dtypes, shapes and the first {SAMPLED} bytes of every tensor",
        },
        "family": known.family.name,
        "denoiser": known.class_name,
        "outlier": spec.outlier.name,
        "rounding": spec.rounding.name,
        "settings": {name: asdict(choice) for name, choice in choices.items()},
        "seed": spec.seed,
        "loras": [],
        "kept_float": {plan.name: plan.keep_float for plan in plans if plan.keep_float is not None},
    }
    kept = {key: text for key, text in files.metadata.items() if key not in (NOTE, "_quantization_metadata")}
    return {"format": "pt", **kept, NOTE: json.dumps(note)}


def fingerprint(files: TensorFiles) -> str:
    """A hash that tells checkpoints apart without reading all of them."""
    digest, buffer = hashlib.sha256(), torch.empty(SAMPLED, dtype=torch.uint8)
    for key, info in files.items():
        digest.update(json.dumps([key, info.dtype, info.shape]).encode())
        part = buffer[: min(SAMPLED, info.nbytes)]
        files.fill(info.file, info.start, part)
        digest.update(part.numpy().data)
    return digest.hexdigest()


class Steps:
    """Bytes for a bar that counts megabytes."""

    def __init__(self, advance: Any):
        self.advance, self.left = advance, 0

    def __call__(self, count: int) -> None:
        whole, self.left = divmod(self.left + count, 10**6)
        self.advance(whole)


def measured(
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
    int8 = [plan for plan in plans if plan.keep_float is None]
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
        "memory/peak_bytes": peak_bytes(torch.device("cpu")),
    }


def summary(plans: Sequence[LayerPlan], metrics: Mapping[str, float], name: str = "INT8") -> list[str]:
    """What was done, in a few lines.

    Args:
        name: what layers became.
    """
    read, written = metrics["build/read_bytes"], metrics["build/written_bytes"]
    kept = "; ".join(f"{n} × {why}" for why, n in reasons(plans).items())
    made = sum(plan.keep_float is None for plan in plans)
    layers: list[tuple[str, object]] = [
        (name, f"{made} layers"),
        ("float", f"{len(plans) - made}{f' ({kept})' if kept else ''}"),
    ]
    sqnr = {key.rpartition("_")[2]: value for key, value in metrics.items() if "weight_sqnr_db" in key}
    if sqnr:
        layers.append(("SQNR, mean / min", f"{sqnr['mean']:.1f} / {sqnr['min']:.1f} dB"))
    size = f"{megabytes(read)} → {megabytes(written)}, {written / read:.2f}×" if read else megabytes(written)
    speed = f"{metrics['build/quantize_s']:.1f} s, {megabytes(metrics['build/read_bytes_per_s'])}/s read"
    return [
        pairs_line(layers),
        pairs_line(
            [("size", size), ("time", speed), ("peak memory", megabytes(metrics["memory/peak_bytes"]))]
        ),
    ]
