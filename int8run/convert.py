"""From a float denoiser to an INT8 one: quantized here or read from a checkpoint, within a quality budget, and saved."""

import importlib.metadata
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from int8run.budget import Budget, meet_budget
from int8run.calibrate import layer_statistics, record_calibration
from int8run.checkpoints.native import Checkpoint, open_checkpoint, prepare_folder, write_checkpoint
from int8run.costs import TransformCosts
from int8run.errors import ConfigError, FileError
from int8run.generate.probe import check_finite, watch_layers
from int8run.layers.linear import QuantizedLayer, linear_at
from int8run.models.loader import Loaded
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import NONE, LayerStatistics, OutlierMethod
from int8run.quant.weight import quantize_weight, sqnr_db
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
from int8run.spec import RunSpec

log = logging.getLogger(__name__)
# an INT8 weight has 30 dB and more; another model's weight 0
LEAST_SQNR_DB = 15.0
# a rounding that looks at the layer's output may be so much worse than the nearest integers
MOST_LOST_DB = 6.0


def to_int8(
    loaded: Loaded, plans: Sequence[LayerPlan], call: Mapping[str, Any], spec: RunSpec, progress: Progress
) -> tuple[nn.Module, Budget | None]:
    """The INT8 denoiser, a copy of the module tree that shares every float tensor; and what a quality budget did to it.

    Raises:
        ConfigError: when no layer became INT8, with the reasons by count; or when the float model computes NaN.
        BackendError: when the backend cannot run here or cannot take a layer.
        FileError: when `int8.checkpoint` does not fit.
    """
    denoiser, family = loaded.denoiser, loaded.family
    if spec.save is not None:
        prepare_folder(spec.save)  # before the work whose result it is to hold
    checkpoint = None
    if spec.int8.checkpoint is not None:
        checkpoint = open_checkpoint(spec.int8.checkpoint, {p.name: (p.out_features, p.in_features) for p in plans})
        follow_checkpoint(checkpoint, plans, spec.outlier)
        check_loras(checkpoint, baked_loras(spec))
        log.info(
            "%d INT8 layers from %s, rounded by %s there; rounding= has no say",
            len(checkpoint.markers),
            checkpoint.path,
            checkpoint.rounding,
        )
    chosen = [p for p in plans if p.keep_float is None]
    if not chosen:
        reasons = Counter(plan.keep_float for plan in plans)
        counted = "; ".join(f"{n} × {why}" for why, n in reasons.items()) or "it has no Linear at all"
        raise ConfigError(
            f"{type(denoiser).__name__}: no layer became INT8 ({counted}); choose another model_type= or set int8.enable=false"
        )
    check_backend(spec.backend, next(denoiser.parameters()).device, chosen)
    if checkpoint is None and not isinstance(spec.outlier, AutoOutlier):
        check_outlier(spec.outlier, chosen)
    rows = layer_rows(denoiser, chosen, call)
    groups = same_input_groups([p.name for p in chosen], family.same_input)
    calls: Sequence[Mapping[str, Any]] = []
    seen: dict[str, LayerStatistics] = {}
    if spec.needs_calibration:
        calls = record_calibration(loaded.pipe, loaded.component, denoiser, spec.calibration, loaded.sampling, progress)
    if checkpoint is None and (spec.outlier.needs_calibration or spec.rounding.needs_calibration):
        seen = layer_statistics(denoiser, chosen, groups, calls, spec.calibration)

    kept: dict[str, QuantizedLayer] = {}  # for `save`: a backend holds the weight in a layout of its own
    if checkpoint is None:
        methods = outlier_methods(denoiser, chosen, spec, rows, groups, seen, progress)
        layers = quantized_layers(denoiser, chosen, methods, spec.rounding, seen)
    else:
        layers = checkpoint_layers(denoiser, chosen, checkpoint)
    if spec.save is not None:
        layers = remembered(layers, kept)
    with progress.count("quantize", len(chosen)) as advance:
        made = int8_layers(denoiser, layers, spec.backend, spec.int8, rows, lambda plan: advance(1))
    budget = None
    if family.keep_float == "auto" and spec.quality_db is not None:
        target, budget = meet_budget(
            denoiser, made, {p.name: rows[p.name] * p.in_features * p.out_features for p in chosen},
            lambda names: assemble(denoiser, {name: made[name] for name in names}, family),
            loaded.pipe, loaded.component, spec.calibration.samples, loaded.sampling, calls, spec.quality_db, progress,
        )  # fmt: skip
        for plan in chosen:
            if plan.name in budget.kept:
                plan.keep(f"quality budget: alone it makes {budget.kept[plan.name]:.1%} of all layers' error")
    else:
        target = assemble(denoiser, made, family)
    if spec.save is not None:
        save_checkpoint(spec, denoiser, {p.name: kept[p.name] for p in chosen if p.keep_float is None}, family.name, plans)
    return target, budget


def outlier_methods(
    denoiser: nn.Module, plans: Sequence[LayerPlan], spec: RunSpec, rows: Mapping[str, int], groups: Sequence[Sequence[str]],
    seen: Mapping[str, LayerStatistics], progress: Progress,
) -> dict[str, OutlierMethod]:  # fmt: skip
    """The outlier method of each layer that gets one: the one asked for, or what `outlier=auto` finds."""
    if not isinstance(spec.outlier, AutoOutlier):
        return {p.name: spec.outlier for p in plans if not p.outlier_why_not}
    auto, dtype = spec.outlier, getattr(torch, spec.model.dtype)
    costs = TransformCosts(spec.backend, next(denoiser.parameters()).device, dtype)
    sharing = {name: len(group) for group in groups for name in group}
    scores: dict[str, dict[str, float]] = {}
    with progress.count("compare outlier methods", len(plans)) as advance:
        for plan in plans:
            shape = (rows[plan.name], plan.in_features, plan.out_features)
            if plan.name in seen:
                weight = linear_at(denoiser, plan.name).weight.detach()
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


def follow_checkpoint(checkpoint: Checkpoint, plans: Sequence[LayerPlan], outlier: OutlierMethod | AutoOutlier) -> None:
    """Plan what the file has: its INT8 layers, treated as they are there, and everything else float.

    Raises:
        FileError: when a layer was treated otherwise than `outlier` asks for; `outlier=auto` takes what there is.
    """
    found = checkpoint.transforms()
    for plan in plans:
        plan.keep_float = None if plan.name in found else plan.keep_float or "float in int8.checkpoint"
    if isinstance(outlier, AutoOutlier):
        return
    wrong = []
    for plan in plans:
        if plan.keep_float is None:
            plan.outlier_why_not = outlier.refuse(plan.in_features) or ""
            plain: tuple[str, Mapping[str, float]] = (NONE, {})
            wanted = plain if plan.outlier_why_not else (outlier.name, outlier.settings_for(plan.in_features))
            transform = found[plan.name]
            if (transform.method, transform.settings) != wanted:
                wrong.append(f"{plan.name} is {transform.label!r} there")
    if wrong:
        raise FileError(
            f"{checkpoint.path} contradicts outlier={outlier.name} in {len(wrong)} of {len(found)} layers ({wrong[0]}); set outlier=auto "
            "to take what the file has, or quantize again"
        )


def check_loras(checkpoint: Checkpoint, baked: list[list[Any]]) -> None:
    """Refuse a checkpoint whose weights hold other LoRAs than the float model's.

    Raises:
        FileError: when its note says so; a file of another program says nothing.
    """
    held = checkpoint.note.get("loras", baked)
    if held != baked:
        raise FileError(
            f"{checkpoint.path} was made with these LoRAs baked in: {held}, this run bakes {baked}; set the same lora= and lora.mode=bake, "
            "or quantize again"
        )


def baked_loras(spec: RunSpec) -> list[list[Any]]:
    """Name and strength of each LoRA that is added to the float weights."""
    pairs = zip(spec.lora.adapters, spec.lora.strengths, strict=True)
    return [[a.name, strength] for a, strength in pairs if strength] if spec.lora.bakes else []


def checkpoint_layers(
    denoiser: nn.Module, plans: Sequence[LayerPlan], checkpoint: Checkpoint
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """The layers of a checkpoint, each compared with the float weight that it stands for.

    Raises:
        FileError: when a layer was made from another weight.
    """
    for plan in plans:
        linear = linear_at(denoiser, plan.name)
        check_weight(plan, linear.weight)
        layer = checkpoint.layer(plan.name, linear.weight.device)
        # as when it was quantized: undone, a factor would make a good weight look bad in columns that the input hardly uses
        transformed = layer.transform.transform_weight(linear.weight.detach().float())
        sqnr = sqnr_db(transformed, layer.weight.dequantize())
        # in a wide layer one huge weight per row leaves so few integers to the others that no rounding has more
        least = min(LEAST_SQNR_DB, sqnr_db(transformed, quantize_weight(transformed).dequantize()) - MOST_LOST_DB)
        if not sqnr >= least:
            raise FileError(
                f"{checkpoint.path}: {plan.name} does not hold this model's weight (SQNR {sqnr:.1f} dB, at least {least:.0f} "
                "expected); it was made from another checkpoint, or with LoRAs baked in"
            )
        plan.outlier, plan.rounding = layer.transform.label, checkpoint.rounding
        plan.measured["weight_sqnr_db"] = sqnr
        plan.measured["saturated_share"] = layer.weight.saturated_share
        yield plan, QuantizedLayer(layer.weight, layer.transform, linear.bias)


def remembered(
    layers: Iterable[tuple[LayerPlan, QuantizedLayer]], into: dict[str, QuantizedLayer]
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """The same layers, kept by name on the way."""
    for plan, layer in layers:
        into[plan.name] = layer
        yield plan, layer


def save_checkpoint(
    spec: RunSpec, denoiser: nn.Module, layers: Mapping[str, QuantizedLayer], family: str, plans: Sequence[LayerPlan]
) -> None:
    """Write the denoiser with its INT8 layers to `save`, and how it was made."""
    held = tuple(f"{name}." for name in layers)
    rest = {name: t for name, t in denoiser.state_dict().items() if not name.startswith(held)}
    choices: dict[str, Any] = {"outlier": spec.outlier, "rounding": spec.rounding}
    note = {
        "int8run": importlib.metadata.version("int8run"), "model": spec.model.location, "revision": spec.model.revision, "family": family,
        "outlier": spec.outlier.name, "rounding": next(p.rounding for p in plans if p.keep_float is None),
        "checkpoint": spec.int8.checkpoint,
        "settings": {} if spec.int8.checkpoint else {name: asdict(choice) for name, choice in choices.items()},
        "calibration": asdict(spec.calibration) if spec.needs_calibration else None, "quality_db": spec.quality_db, "seed": spec.seed,
        "loras": baked_loras(spec),
        "kept_float": {p.name: p.keep_float for p in plans if p.keep_float is not None},
    }  # fmt: skip
    path = write_checkpoint(str(spec.save), layers, rest, note)
    log.info("saved %d INT8 layers and %d float tensors to %s (%.1f MB)", len(layers), len(rest), path, path.stat().st_size / 1e6)


def layer_rows(denoiser: nn.Module, plans: Sequence[LayerPlan], call: Mapping[str, Any]) -> dict[str, int]:
    """How many rows each planned layer sees in one call of the float model; 1 where the call does not reach it.

    Raises:
        ConfigError: when a layer is given NaN or infinity.
    """
    rows = {p.name: 1 for p in plans}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        rows[name] = x.numel() // x.shape[-1]
        check_finite(name, x, "the first step")

    watch_layers(denoiser, call, list(rows), see)
    return rows
