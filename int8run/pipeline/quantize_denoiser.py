"""From a float denoiser to an INT8 one: quantized here or taken from a file, within a quality budget, and saved."""

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.export.save_denoiser import find_fused_layers, keep_own_names, save_denoiser, write_tensors
from int8run.generate.capture import capture_layers, check_finite
from int8run.layers.fusion import assemble_int8_model, group_by_shared_input
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import LayerPlan
from int8run.lora.stack import Entry, LoraStack
from int8run.models.dual_denoisers import split_denoiser
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import LayerStatistics, OutlierMethod
from int8run.pipeline.load import LoadedModel, SkeletonLinear, hash_model_files
from int8run.pipeline.prequantized import PrequantizedLayers, list_baked_loras, read_prequantized_layers
from int8run.ptq.calibration import capture_calibration_calls, collect_layer_statistics
from int8run.ptq.layer_costs import TransformCosts
from int8run.ptq.mixed_precision import MixedPrecisionResult, meet_budget
from int8run.ptq.quantize import build_int8_layers, check_backend, check_outlier_method, quantize_layers
from int8run.report.console import Progress
from int8run.utils.disk_cache import hash_parts

log = logging.getLogger(__name__)


def quantize_denoiser(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    rows: Mapping[str, int],
    spec: RunSpec,
    taken: PrequantizedLayers | None,
    loras: LoraStack,
    key: str | None,
    progress: Progress,
) -> tuple[nn.Module, MixedPrecisionResult | None]:
    """The INT8 denoiser, a copy of the module tree that shares every float tensor; and what a quality budget did to it.

    Args:
        rows: that each layer which becomes INT8 sees in one step.
        taken: layers that are there already.
        loras: adds baked LoRAs to weights that are read here.
        key: of the cache; None: nothing is kept.

    Raises:
        ConfigError: when no layer became INT8, with the reasons by count; or when the float model computes NaN.
        BackendError: when the backend cannot run here or cannot take a layer.
        FileError: when `int8.checkpoint` does not fit.
    """
    denoiser, family = loaded.denoiser, loaded.family
    chosen = [p for p in plans if p.skip_reason is None]
    if not chosen:
        reasons = Counter(plan.skip_reason for plan in plans)
        counted = "; ".join(f"{n} × {why}" for why, n in reasons.items()) or "it has no Linear at all"
        raise ConfigError(
            f"{loaded.source.denoisers[0].class_name}: no layer became INT8 ({counted}); choose another model_type= or set "
            "int8.enable=false"
        )
    check_backend(spec.backend, loaded.device, chosen)
    there = taken.layers if taken else {}
    old, new = [p for p in chosen if p.name in there], [p for p in chosen if p.name not in there]
    if new and not isinstance(spec.outlier, AutoOutlier):
        check_outlier_method(spec.outlier, new)
    groups = group_by_shared_input([p.name for p in new], family.same_input)
    seen: dict[str, LayerStatistics] = {}
    pictures: Sequence[Mapping[str, Any]] = []
    automatic = (
        family.mixed_precision == "auto"
        and spec.quality_db is not None
        and not (taken is not None and taken.is_cached)
    )
    fitted = bool(new) and (spec.outlier.needs_calibration or spec.rounding.needs_calibration)
    if automatic or fitted:
        pictures = capture_calibration_calls(
            loaded.pipe, loaded.component, denoiser, spec.calibration, loaded.sampling, progress
        )
    if fitted:
        seen = collect_layer_statistics(denoiser, new, groups, pictures, spec.calibration)

    read = lambda name: loras.merge_weight(name, loaded.read_weight(name))  # noqa: E731
    layers = iter(read_prequantized_layers(loaded, old, taken, read) if taken else ())
    if new:
        methods = choose_outlier_methods(loaded, new, spec, rows, groups, seen, progress)
        layers = chain(layers, quantize_layers(denoiser, new, methods, spec.rounding, seen, read))
    with progress.track_loop("take INT8 layers" if taken else "quantize", len(chosen)) as advance:
        made = build_int8_layers(
            denoiser, layers, spec.backend, spec.int8, rows, lambda plan: advance(1), loaded.device
        )
    budget = None
    if automatic:
        target, budget = meet_budget(
            denoiser,
            made,
            {p.name: rows[p.name] * p.in_features * p.out_features for p in chosen},
            lambda names: assemble_int8_model(denoiser, {name: made[name] for name in names}, family),
            loaded.pipe,
            loaded.component,
            spec.calibration.samples,
            loaded.sampling,
            pictures,
            spec.quality_db or 0.0,
            progress,
        )
        for plan in chosen:
            if plan.name in budget.kept:
                plan.skip(f"quality budget: alone it makes {budget.kept[plan.name]:.1%} of all layers' error")
    else:
        target = assemble_int8_model(denoiser, made, family)
        if taken is not None and taken.is_cached and taken.provenance.get("budget"):
            budget = MixedPrecisionResult(**taken.provenance["budget"])
    written = {p.name: made[p.name] for p in chosen if p.skip_reason is None}
    if taken is None and key is not None:
        size = sum(p.in_features * p.out_features + 4 * p.out_features + 512 for p in chosen)
        note = build_provenance(spec, loaded, plans, taken) | {
            "budget": None if budget is None else asdict(budget)
        }
        spec.cache.put(
            "int8",
            key,
            size,
            lambda path: write_tensors(
                path, keep_own_names(f"{name}.weight" for name in written), written, {}, note
            ),
        )
    if spec.save is not None:  # after the cache: what was fitted is not lost where it cannot be written
        save_int8_denoisers(spec, loaded, written, plans, taken)
    return target, budget


def choose_outlier_methods(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    spec: RunSpec,
    rows: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    seen: Mapping[str, LayerStatistics],
    progress: Progress,
) -> dict[str, OutlierMethod]:
    """The outlier method of each layer that gets one: the one asked for, or what `outlier=auto` finds."""
    if not isinstance(spec.outlier, AutoOutlier):
        return {p.name: spec.outlier for p in plans if not p.outlier_skip_reason}
    auto, dtype = spec.outlier, getattr(torch, spec.model.dtype)
    costs = TransformCosts(spec.backend, loaded.device, dtype)
    sharing = {name: len(group) for group in groups for name in group}
    scores: dict[str, dict[str, float]] = {}
    with progress.track_loop("compare outlier methods", len(plans)) as advance:
        for plan in plans:
            shape = (rows[plan.name], plan.in_features, plan.out_features)
            if plan.name in seen:
                weight = loaded.read_weight(plan.name)
                scores[plan.name] = auto.score_candidates(
                    weight, seen[plan.name], partial(costs.get_ratio, shape=shape, sharing=sharing[plan.name])
                )
            advance(1)
    compared = [[name for name in group if name in scores] for group in groups]
    joined: list[list[str]] = []
    if spec.save is not None and Path(spec.save).suffix:  # a file with the authors' names
        fused = [
            [prefix + n for n in names]
            for prefix, part in split_denoiser(loaded.denoiser).items()
            for names in find_fused_layers(part)
        ]
        joined = [names for group in fused if (names := [name for name in group if name in scores])]
    chosen = auto.choose_methods(scores, [group for group in compared if group], joined)
    for plan in plans:
        candidate = chosen.get(plan.name)
        if candidate is None:
            plan.outlier_skip_reason = (
                "no candidate of outlier=auto takes it at that cost"
                if plan.name in scores
                else "not seen in the calibration"
            )
    return {name: auto.candidates[candidate] for name, candidate in chosen.items() if candidate is not None}


def save_int8_denoisers(
    spec: RunSpec,
    loaded: LoadedModel,
    layers: Mapping[str, Int8Linear],
    plans: Sequence[LayerPlan],
    taken: PrequantizedLayers | None,
) -> None:
    """Write every denoiser with its INT8 layers to `save`, and how it was made."""
    note, parts = build_provenance(spec, loaded, plans, taken), split_denoiser(loaded.denoiser)
    for denoiser in loaded.source.denoisers:
        prefix = "" if "" in parts else f"{denoiser.component}."
        place = get_save_location(str(spec.save), "" if "" in parts else denoiser.component)
        own = {name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)}
        path = save_denoiser(place, parts[prefix], own, note, denoiser.config)
        log.info(
            "saved %d INT8 layers of %d Linears to %s (%.1f MB)",
            len(own),
            len(plans),
            path,
            path.stat().st_size / 1e6,
        )


def get_save_location(save: str, component: str) -> str:
    """Where one denoiser is written; of two each has its own file (`x_transformer_2.safetensors`) or folder (`x/transformer_2`)."""
    path = Path(save)
    if not component:
        return save
    return str(path.with_name(f"{path.stem}_{component}{path.suffix}") if path.suffix else path / component)


def build_provenance(
    spec: RunSpec, loaded: LoadedModel, plans: Sequence[LayerPlan], taken: PrequantizedLayers | None
) -> dict[str, Any]:
    """How the INT8 layers were made, for the header of a file."""
    if taken is not None and taken.is_cached:
        return {**taken.provenance, "int8run": importlib.metadata.version("int8run")}
    choices: dict[str, Any] = {"outlier": spec.outlier, "rounding": spec.rounding}
    int8 = [p for p in plans if p.skip_reason is None]
    return {
        "int8run": importlib.metadata.version("int8run"),
        "model": str(spec.model.location),
        "revision": spec.model.revision,
        "source_sha256": {path.name: spec.cache.hash_file(path) for path in list_weight_files(loaded)},
        "family": loaded.family.name,
        "denoiser": loaded.source.denoisers[0].class_name,
        "outlier": spec.outlier.name,
        "rounding": int8[0].rounding if int8 else None,
        "checkpoint": None if taken is None else taken.source,
        "settings": {} if taken else {name: asdict(choice) for name, choice in choices.items()},
        "calibration": asdict(spec.calibration) if spec.needs_calibration else None,
        "quality_db": spec.quality_db,
        "seed": spec.seed,
        "loras": list_baked_loras(spec),
        "kept_float": {p.name: p.skip_reason for p in plans if p.skip_reason is not None},
        "layers": {
            p.name: {**p.measured, "outlier": p.outlier, "outlier_why_not": p.outlier_skip_reason}
            for p in int8
        },
    }


def list_weight_files(loaded: LoadedModel) -> list[Path]:
    """The files that the denoisers' float weights come from."""
    if loaded.files is not None:
        return loaded.files.paths
    return [file for d in loaded.source.denoisers for file in sorted(d.weights.glob("*.safetensors"))]


def build_cache_key(spec: RunSpec, loaded: LoadedModel, entries: Sequence[Entry]) -> str | None:
    """What the INT8 layers of a build depend on, as the key of the cache; None where nothing is kept."""
    if not spec.cache.limit_gb or spec.int8.checkpoint is not None:
        return None
    baked = (
        [(e.file.identity, e.components, s) for e, s in zip(entries, spec.lora.strengths, strict=True)]
        if spec.lora.is_baked
        else []
    )
    # what a calibration draws depends on all of the pipeline
    drawn = hash_model_files(loaded.source, spec.cache) if spec.needs_calibration else []
    sources = drawn or [("", spec.cache.hash_file(path)) for path in list_weight_files(loaded)]
    configs = [
        (d.class_name, sorted(d.config.items(), key=lambda item: item[0])) for d in loaded.source.denoisers
    ]
    calibration = (
        (spec.calibration, loaded.sampling, spec.quality_db, spec.backend, str(loaded.device))
        if spec.needs_calibration
        else None
    )
    version = importlib.metadata.version("int8run")
    return hash_parts(
        [
            version,
            sources,
            configs,
            spec.model.dtype,
            loaded.family,
            spec.outlier,
            spec.rounding,
            calibration,
            baked,
        ]
    )


def count_layer_rows(
    denoiser: nn.Module, plans: Sequence[LayerPlan], calls: Sequence[Mapping[str, Any]]
) -> dict[str, int]:
    """How many rows each planned layer sees in these calls, in the last that reaches it; 1 where none does.

    Raises:
        ConfigError: when a layer is given NaN or infinity.
    """
    rows = {p.name: 1 for p in plans}
    real = not any(isinstance(module, SkeletonLinear) for module in denoiser.modules())

    def see(name: str, x: Tensor, y: Tensor) -> None:
        rows[name] = x.numel() // x.shape[-1]
        if real:
            check_finite(name, x, "the first step")

    for call in calls:
        capture_layers(denoiser, call, list(rows), see)
    return rows
