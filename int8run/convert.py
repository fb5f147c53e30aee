"""From a float denoiser to an INT8 one: quantized here or read from a checkpoint, within a quality budget, and saved."""

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.budget import Budget, meet_budget
from int8run.calibrate import layer_statistics, record_calibration
from int8run.checkpoints.stored import StoredLayer
from int8run.costs import TransformCosts
from int8run.errors import ConfigError, FileError
from int8run.generate.probe import check_finite, watch_layers
from int8run.layers.linear import Int8Linear, QuantizedLayer, linear_at
from int8run.load import Blank, Loaded, file_hashes, with_blanks
from int8run.lora.stack import Entry, LoraStack
from int8run.models.experts import denoiser_parts
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import NONE, LayerStatistics, OutlierMethod
from int8run.quant.weight import QuantizedWeight, quantize_weight, sqnr_db
from int8run.quantize import (
    LayerPlan,
    assemble,
    check_backend,
    check_outlier,
    check_weight,
    int8_layers,
    quantized_layers,
    same_input_groups,
)
from int8run.report.terminal import Progress
from int8run.save import own_names, save_denoiser, write_tensors
from int8run.spec import RunSpec
from int8run.store import key_of
from int8run.weights import DenoiserWeights, FileWeights

log = logging.getLogger(__name__)
# an INT8 weight has 30 dB and more; another model's weight 0
LEAST_SQNR_DB = 15.0
# a rounding that looks at the layer's output may be so much worse than the nearest integers
MOST_LOST_DB = 6.0


@dataclass(frozen=True)
class Taken:
    """INT8 layers that are there already.

    Args:
        layers: what the file says of each, by module name.
        note: how int8run made the file; empty when another program did.
        cached: the file is of int8run's own cache, whose key says what is in it.
    """

    weights: DenoiserWeights
    layers: Mapping[str, StoredLayer]
    note: Mapping[str, Any]
    cached: bool = False

    @property
    def where(self) -> str:
        """The files, for people."""
        return ", ".join(str(file.path) for file in self.weights.parts.values())

    @property
    def rounding(self) -> str:
        """How the weights were rounded, as far as the file says."""
        return str(self.note.get("rounding", "unknown"))


def find_taken(loaded: Loaded, plans: Sequence[LayerPlan], spec: RunSpec, key: str | None, changed: Collection[str] = ()) -> Taken | None:
    """The INT8 layers that need not be made, and the plans as that file has them: of `int8.checkpoint`, of the model's own file, or of
    an earlier run with the same settings.

    Args:
        key: of the cache.
        changed: layers that a LoRA changes.

    Raises:
        FileError: when the file does not fit the model, or contradicts the settings.
        ConfigError: when LoRAs are to be baked into integers that are there already.
    """
    if not spec.int8.enable:
        return None
    location, names = spec.int8.checkpoint, [d.component for d in loaded.source.denoisers]
    if location is not None:
        taken = open_taken(loaded, checkpoint_paths(location, names))
        if not taken.layers:
            raise FileError(f"{location} holds no INT8 layer that can be taken as it is; set model.location to it, or quantize anew")
    elif loaded.files is not None and loaded.files.int8_layers():
        taken = Taken(loaded.files, loaded.files.int8_layers(), loaded.files.note())
        if baked_loras(spec) and (lost := set(changed) & set(taken.layers)):
            raise ConfigError(
                f"lora.mode=bake adds LoRAs to float weights, and {len(lost)} of the layers that they change are INT8 in {taken.where}; "
                "set lora.mode=dynamic or stochastic"
            )
    else:
        path = None if key is None else spec.cache.find("int8", key)
        if path is None:
            return None
        try:
            taken = open_cached(loaded, path)
        except FileError as error:
            spec.cache.drop(path, error)
            return None
    follow(taken, plans, spec)
    held = taken.note.get("loras", [])
    baked = baked_loras(spec)
    if location is not None and taken.note and held != baked:
        raise FileError(
            f"{taken.where} was made with these LoRAs baked in: {held}, this run bakes {baked}; set the same lora= and lora.mode=bake, or "
            "quantize again"
        )
    said = "%d INT8 layers from %s, kept by an earlier run" if taken.cached else "%d INT8 layers from %s; rounding= has no say"
    log.info(said, len(taken.layers), taken.where)
    return taken


def checkpoint_paths(location: str | Mapping[str, str], components: Sequence[str]) -> dict[str, Path]:
    """The file or folder of each denoiser's INT8 layers.

    Raises:
        ConfigError: when it is not said which file is whose.
    """
    if isinstance(location, Mapping):
        if set(location) != set(components):
            raise ConfigError(f"int8.checkpoint names {', '.join(location)}; the model has {', '.join(components)}")
        return {name: Path(path).expanduser() for name, path in location.items()}
    path = Path(location).expanduser()
    if all((path / name).is_dir() for name in components):
        return {name: path / name for name in components}
    if len(components) > 1:
        pair = ", ".join(f"{name}: <file>" for name in components)
        raise ConfigError(
            f"int8.checkpoint={location} is one file, the model has {len(components)} denoisers; set 'int8.checkpoint={{{pair}}}'"
        )
    return {components[0]: path}


def open_taken(loaded: Loaded, paths: Mapping[str, Path]) -> Taken:
    """Open files of INT8 layers; what else is in them is not looked at."""
    parts = denoiser_parts(loaded.denoiser)
    files = {p: FileWeights(paths[p.removesuffix(".") or next(iter(paths))], model, partial=True) for p, model in parts.items()}
    weights = DenoiserWeights(files)
    return Taken(weights, weights.int8_layers(), weights.note())


def open_cached(loaded: Loaded, path: Path) -> Taken:
    """Open a file of the cache, which has the layers of all denoisers under the names that they have here.

    Raises:
        FileError: when it is damaged, or not all layers are there that it says it has.
    """
    weights = DenoiserWeights({"": FileWeights(path, loaded.denoiser, partial=True)})
    taken = Taken(weights, weights.int8_layers(), weights.note(), cached=True)
    if not taken.layers or set(taken.layers) != set(facts_by_layer(taken.note, "layers")):
        raise FileError(f"{path} does not have the layers that its note says it has")
    return taken


def follow(taken: Taken, plans: Sequence[LayerPlan], spec: RunSpec) -> None:
    """Plan what the file has: its INT8 layers, treated as they are there, and everything else float.

    Raises:
        FileError: when a layer was treated otherwise than by the method that `outlier=` names; `none` and `auto` name none.
    """
    kept = facts_by_layer(taken.note, "kept_float")
    again = taken.weights.rounded_layers()  # what the file has in another way is quantized as if it were float
    for plan in plans:
        if plan.name in again:
            continue
        plan.keep_float = None if plan.name in taken.layers else str(kept.get(plan.name, "")) or plan.keep_float or "float in the file"
    if taken.cached or isinstance(spec.outlier, AutoOutlier) or spec.outlier.name == NONE:
        return
    wrong = []
    for plan in plans:
        if plan.name in taken.layers:
            plan.outlier_why_not = spec.outlier.refuse(plan.in_features) or ""
            plain: tuple[str, Mapping[str, float]] = (NONE, {})
            wanted = plain if plan.outlier_why_not else (spec.outlier.name, spec.outlier.settings_for(plan.in_features))
            layer = taken.layers[plan.name]
            if (layer.method, layer.settings) != wanted:
                wrong.append(
                    f"{plan.name} is {layer.label!r} there, {' '.join(map(str, [wanted[0], *wanted[1].values()]))!r} was asked for"
                )
    if wrong:
        raise FileError(
            f"{taken.where} contradicts outlier={spec.outlier.name} in {len(wrong)} of {len(taken.layers)} layers ({wrong[0]}); set "
            "outlier=auto to take what the file has, or quantize again"
        )


def to_int8(
    loaded: Loaded, plans: Sequence[LayerPlan], calls: Sequence[Mapping[str, Any]], spec: RunSpec, taken: Taken | None, loras: LoraStack,
    key: str | None, progress: Progress,
) -> tuple[nn.Module, Budget | None]:  # fmt: skip
    """The INT8 denoiser, a copy of the module tree that shares every float tensor; and what a quality budget did to it.

    Args:
        calls: arguments of the denoiser in one step, of each expert.
        taken: layers that are there already.
        loras: adds baked LoRAs to weights that are read here.
        key: of the cache; None: nothing is kept.

    Raises:
        ConfigError: when no layer became INT8, with the reasons by count; or when the float model computes NaN.
        BackendError: when the backend cannot run here or cannot take a layer.
        FileError: when `int8.checkpoint` does not fit.
    """
    denoiser, family = loaded.denoiser, loaded.family
    chosen = [p for p in plans if p.keep_float is None]
    if not chosen:
        reasons = Counter(plan.keep_float for plan in plans)
        counted = "; ".join(f"{n} × {why}" for why, n in reasons.items()) or "it has no Linear at all"
        raise ConfigError(
            f"{loaded.source.denoisers[0].class_name}: no layer became INT8 ({counted}); choose another model_type= or set "
            "int8.enable=false"
        )
    check_backend(spec.backend, loaded.device, chosen)
    there = taken.layers if taken else {}
    old, new = [p for p in chosen if p.name in there], [p for p in chosen if p.name not in there]
    if new and not isinstance(spec.outlier, AutoOutlier):
        check_outlier(spec.outlier, new)
    rows = layer_rows(with_blanks(denoiser), chosen, calls)
    groups = same_input_groups([p.name for p in new], family.same_input)
    seen: dict[str, LayerStatistics] = {}
    pictures: Sequence[Mapping[str, Any]] = []
    automatic = family.keep_float == "auto" and spec.quality_db is not None and not (taken is not None and taken.cached)
    fitted = bool(new) and (spec.outlier.needs_calibration or spec.rounding.needs_calibration)
    if automatic or fitted:
        pictures = record_calibration(loaded.pipe, loaded.component, denoiser, spec.calibration, loaded.sampling, progress)
    if fitted:
        seen = layer_statistics(denoiser, new, groups, pictures, spec.calibration)

    read = lambda name: loras.merged(name, loaded.weight(name))  # noqa: E731
    layers = iter(taken_layers(loaded, old, taken, read) if taken else ())
    if new:
        methods = outlier_methods(loaded, new, spec, rows, groups, seen, progress)
        layers = chain(layers, quantized_layers(denoiser, new, methods, spec.rounding, seen, read))
    with progress.count("take INT8 layers" if taken else "quantize", len(chosen)) as advance:
        made = int8_layers(denoiser, layers, spec.backend, spec.int8, rows, lambda plan: advance(1), loaded.device)
    budget = None
    if automatic:
        target, budget = meet_budget(
            denoiser, made, {p.name: rows[p.name] * p.in_features * p.out_features for p in chosen},
            lambda names: assemble(denoiser, {name: made[name] for name in names}, family),
            loaded.pipe, loaded.component, spec.calibration.samples, loaded.sampling, pictures, spec.quality_db or 0.0, progress,
        )  # fmt: skip
        for plan in chosen:
            if plan.name in budget.kept:
                plan.keep(f"quality budget: alone it makes {budget.kept[plan.name]:.1%} of all layers' error")
    else:
        target = assemble(denoiser, made, family)
        if taken is not None and taken.cached and taken.note.get("budget"):
            budget = Budget(**taken.note["budget"])
    written = {p.name: made[p.name] for p in chosen if p.keep_float is None}
    if spec.save is not None:
        save_int8(spec, loaded, written, plans, taken)
    if taken is None and key is not None:
        size = sum(p.in_features * p.out_features + 4 * p.out_features + 512 for p in chosen)
        note = note_of(spec, loaded, plans, taken) | {"budget": None if budget is None else asdict(budget)}
        spec.cache.put(
            "int8", key, size, lambda path: write_tensors(path, own_names(f"{name}.weight" for name in written), written, {}, note)
        )
    return target, budget


def outlier_methods(
    loaded: Loaded, plans: Sequence[LayerPlan], spec: RunSpec, rows: Mapping[str, int], groups: Sequence[Sequence[str]],
    seen: Mapping[str, LayerStatistics], progress: Progress,
) -> dict[str, OutlierMethod]:  # fmt: skip
    """The outlier method of each layer that gets one: the one asked for, or what `outlier=auto` finds."""
    if not isinstance(spec.outlier, AutoOutlier):
        return {p.name: spec.outlier for p in plans if not p.outlier_why_not}
    auto, dtype = spec.outlier, getattr(torch, spec.model.dtype)
    costs = TransformCosts(spec.backend, loaded.device, dtype)
    sharing = {name: len(group) for group in groups for name in group}
    scores: dict[str, dict[str, float]] = {}
    with progress.count("compare outlier methods", len(plans)) as advance:
        for plan in plans:
            shape = (rows[plan.name], plan.in_features, plan.out_features)
            if plan.name in seen:
                weight = loaded.weight(plan.name)
                scores[plan.name] = auto.score(weight, seen[plan.name], partial(costs.of, shape=shape, sharing=sharing[plan.name]))
            advance(1)
    compared = [[name for name in group if name in scores] for group in groups]
    chosen = auto.choose(scores, [group for group in compared if group])
    for plan in plans:
        candidate = chosen.get(plan.name)
        if candidate is None:
            plan.outlier_why_not = (
                "no candidate of outlier=auto takes it at that cost" if plan.name in scores else "not seen in the calibration"
            )
    return {name: auto.candidates[candidate] for name, candidate in chosen.items() if candidate is not None}


def baked_loras(spec: RunSpec) -> list[list[Any]]:
    """Name and strength of each LoRA that is added to the float weights."""
    pairs = zip(spec.lora.adapters, spec.lora.strengths, strict=True)
    return [[a.name, strength] for a, strength in pairs if strength] if spec.lora.bakes else []


def taken_layers(
    loaded: Loaded, plans: Sequence[LayerPlan], taken: Taken, read: Callable[[str], Tensor]
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """The layers of a file, each compared with the float weight that it stands for, where that comes from elsewhere.

    Args:
        read: gives the float weight of a Linear by its name.

    Raises:
        FileError: when a layer was made from another weight.
    """
    measured = facts_by_layer(taken.note, "layers")
    for plan in plans:
        layer = taken.weights.int8(plan.name)
        layer.transform.to(loaded.device)
        weight = QuantizedWeight(layer.weight.qdata.to(loaded.device), layer.weight.scale.to(loaded.device))
        layer = QuantizedLayer(weight, layer.transform, linear_at(loaded.denoiser, plan.name).bias)
        plan.outlier, plan.rounding = layer.transform.label, taken.rounding
        if isinstance(known := measured.get(plan.name), Mapping):
            plan.outlier_why_not = str(known.get("outlier_why_not", ""))
            plan.measured |= {name: v for name, v in known.items() if isinstance(v, float)}
        if not taken.cached and taken.weights is not loaded.files:
            compare(plan, layer, read(plan.name), taken)
        plan.measured["saturated_share"] = weight.saturated_share
        yield plan, layer


def facts_by_layer(note: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a note says of layers, by name; a note that somebody changed may say nothing."""
    found = note.get(key)
    return found if isinstance(found, Mapping) else {}


def compare(plan: LayerPlan, layer: QuantizedLayer, original: Tensor, taken: Taken) -> None:
    """Note how near a layer of a file is to the model's own float weight.

    Raises:
        FileError: when it was made from another weight.
    """
    check_weight(plan, original)
    # as when it was quantized: undone, a factor would make a good weight look bad in columns that the input hardly uses
    transformed = layer.transform.transform_weight(original.float())
    sqnr = sqnr_db(transformed, layer.weight.dequantize())
    # in a wide layer one huge weight per row leaves so few integers to the others that no rounding has more
    least = min(LEAST_SQNR_DB, sqnr_db(transformed, quantize_weight(transformed).dequantize()) - MOST_LOST_DB)
    if not sqnr >= least:
        raise FileError(
            f"{taken.where}: {plan.name} does not hold this model's weight (SQNR {sqnr:.1f} dB, at least {least:.0f} "
            "expected); it was made from another checkpoint, or with LoRAs baked in"
        )
    plan.measured["weight_sqnr_db"] = sqnr


def save_int8(spec: RunSpec, loaded: Loaded, layers: Mapping[str, Int8Linear], plans: Sequence[LayerPlan], taken: Taken | None) -> None:
    """Write every denoiser with its INT8 layers to `save`, and how it was made."""
    note, parts = note_of(spec, loaded, plans, taken), denoiser_parts(loaded.denoiser)
    for denoiser in loaded.source.denoisers:
        prefix = "" if "" in parts else f"{denoiser.component}."
        place = place_of(str(spec.save), "" if "" in parts else denoiser.component)
        own = {name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)}
        path = save_denoiser(place, parts[prefix], own, note, denoiser.config)
        log.info("saved %d INT8 layers of %d Linears to %s (%.1f MB)", len(own), len(plans), path, path.stat().st_size / 1e6)


def place_of(save: str, component: str) -> str:
    """Where one denoiser is written; of two each has its own file (`x_transformer_2.safetensors`) or folder (`x/transformer_2`)."""
    path = Path(save)
    if not component:
        return save
    return str(path.with_name(f"{path.stem}_{component}{path.suffix}") if path.suffix else path / component)


def note_of(spec: RunSpec, loaded: Loaded, plans: Sequence[LayerPlan], taken: Taken | None) -> dict[str, Any]:
    """How the INT8 layers were made, for the header of a file."""
    if taken is not None and taken.cached:
        return {**taken.note, "int8run": importlib.metadata.version("int8run")}
    choices: dict[str, Any] = {"outlier": spec.outlier, "rounding": spec.rounding}
    int8 = [p for p in plans if p.keep_float is None]
    return {
        "int8run": importlib.metadata.version("int8run"), "model": str(spec.model.location), "revision": spec.model.revision,
        "source_sha256": {path.name: spec.cache.content_hash(path) for path in weight_files(loaded)}, "family": loaded.family.name,
        "denoiser": loaded.source.denoisers[0].class_name,
        "outlier": spec.outlier.name, "rounding": int8[0].rounding if int8 else None, "checkpoint": None if taken is None else taken.where,
        "settings": {} if taken else {name: asdict(choice) for name, choice in choices.items()},
        "calibration": asdict(spec.calibration) if spec.needs_calibration else None, "quality_db": spec.quality_db, "seed": spec.seed,
        "loras": baked_loras(spec),
        "kept_float": {p.name: p.keep_float for p in plans if p.keep_float is not None},
        "layers": {p.name: {**p.measured, "outlier": p.outlier, "outlier_why_not": p.outlier_why_not} for p in int8},
    }  # fmt: skip


def weight_files(loaded: Loaded) -> list[Path]:
    """The files that the denoisers' float weights come from."""
    if loaded.files is not None:
        return loaded.files.paths
    return [file for d in loaded.source.denoisers for file in sorted(d.weights.glob("*.safetensors"))]


def cache_key(spec: RunSpec, loaded: Loaded, entries: Sequence[Entry]) -> str | None:
    """What the INT8 layers of a build depend on, as the key of the cache; None where nothing is kept."""
    if not spec.cache.limit_gb or spec.int8.checkpoint is not None:
        return None
    baked = [(e.file.identity, e.components, s) for e, s in zip(entries, spec.lora.strengths, strict=True)] if spec.lora.bakes else []
    # what a calibration draws depends on all of the pipeline
    drawn = file_hashes(loaded.source, spec.cache) if spec.needs_calibration else []
    sources = drawn or [("", spec.cache.content_hash(path)) for path in weight_files(loaded)]
    configs = [(d.class_name, sorted(d.config.items(), key=lambda item: item[0])) for d in loaded.source.denoisers]
    calibration = (spec.calibration, loaded.sampling, spec.quality_db, spec.backend, str(loaded.device)) if spec.needs_calibration else None
    version = importlib.metadata.version("int8run")
    return key_of([version, sources, configs, spec.model.dtype, loaded.family, spec.outlier, spec.rounding, calibration, baked])


def layer_rows(denoiser: nn.Module, plans: Sequence[LayerPlan], calls: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many rows each planned layer sees in these calls, in the last that reaches it; 1 where none does.

    Raises:
        ConfigError: when a layer is given NaN or infinity.
    """
    rows = {p.name: 1 for p in plans}
    real = not any(isinstance(module, Blank) for module in denoiser.modules())

    def see(name: str, x: Tensor, y: Tensor) -> None:
        rows[name] = x.numel() // x.shape[-1]
        if real:
            check_finite(name, x, "the first step")

    for call in calls:
        watch_layers(denoiser, call, list(rows), see)
    return rows
