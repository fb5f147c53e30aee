"""What INT8 layers were made of: as provenance for the header of a file, and as the key of the cache.

build.py calls it. Files of earlier versions have the same keys, which is why they do not follow today's
names.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from int8run.layers.plan import LayerPlan
from int8run.lora.config import LoraSettings
from int8run.lora.stack import Entry
from int8run.models.family import ModelSource
from int8run.pipeline.load import LoadedModel, hash_model_files, list_safetensors
from int8run.pipeline.prequantized import BakedLoras, PrequantizedLayers
from int8run.pipeline.quantize_denoiser import QuantizationSettings
from int8run.utils.disk_cache import DiskCache, hash_parts


def list_baked_loras(lora: LoraSettings) -> BakedLoras:
    """Name and strength of each LoRA that is added to the float weights."""
    if not lora.is_baked:
        return []
    pairs = zip(lora.adapters, lora.strengths, strict=True)
    return [[adapter.name, strength] for adapter, strength in pairs if strength]


def list_weight_files(loaded: LoadedModel) -> list[Path]:
    """The files that the denoisers' float weights come from."""
    if loaded.checkpoint is not None:
        return loaded.checkpoint.paths
    return [path for denoiser in loaded.source.denoisers for path in list_safetensors(denoiser.weights)]


def build_cache_key(
    loaded: LoadedModel,
    settings: QuantizationSettings,
    *,
    model: ModelSource,
    lora: LoraSettings,
    entries: Sequence[Entry],
    needs_calibration: bool,
    cache: DiskCache,
) -> str:
    """The key of the INT8 layers in the cache, from everything that they depend on.

    Args:
        loaded: the model.
        settings: how layers become INT8.
        model: for the dtype of the float model.
        lora: the stack, whose strengths count where they are baked in.
        entries: the files of the stack, in its order.
        needs_calibration: whether something is fitted to activations.
        cache: remembers the hashes of files that did not change.
    """
    baked = []
    if lora.is_baked:
        for entry, strength in zip(entries, lora.strengths, strict=True):
            # not its identity, which is equal for files with other names of layers
            file_hash = cache.hash_file(entry.file.path)
            baked.append((file_hash, entry.file.outside, entry.components, strength))
    sources: list[tuple[str, str]] = []
    calibration: tuple[object, ...] | None = None
    if needs_calibration:
        # what is generated for a calibration depends on the whole pipeline
        sources = hash_model_files(loaded.source, cache)
        calibration = (
            settings.calibration,
            loaded.sampling,
            settings.quality_db,
            settings.backend,
            str(loaded.device),
        )
    if not sources:
        sources = [("", cache.hash_file(path)) for path in list_weight_files(loaded)]
    configs = []
    for denoiser in loaded.source.denoisers:
        configs.append((denoiser.class_name, sorted(denoiser.config.items(), key=lambda item: item[0])))
    return hash_parts(
        [
            importlib.metadata.version("int8run"),
            sources,
            configs,
            model.dtype,
            model.quant_format,
            model.sdnq,
            loaded.family,
            settings.outlier,
            settings.rounding,
            calibration,
            baked,
        ]
    )


def build_provenance(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    settings: QuantizationSettings,
    *,
    model: ModelSource,
    lora: LoraSettings,
    seed: int,
    needs_calibration: bool,
    prequantized: PrequantizedLayers | None,
    cache: DiskCache,
) -> dict[str, Any]:
    """How the INT8 layers were made, for the header of a file.

    Args:
        loaded: the model.
        plans: of every Linear, after the quantization.
        settings: how layers became INT8.
        model: where the model is.
        lora: the stack.
        seed: of the run.
        needs_calibration: whether something was fitted to activations.
        prequantized: a file that some layers come from; None: all were quantized in this run.
        cache: remembers the hashes of files that did not change.
    """
    version = importlib.metadata.version("int8run")
    if prequantized is not None and prequantized.is_cached:
        return {**prequantized.provenance, "int8run": version}
    method_settings: dict[str, Any] = {}
    if prequantized is None:
        choices: dict[str, Any] = {"outlier": settings.outlier, "rounding": settings.rounding}
        method_settings = {name: asdict(choice) for name, choice in choices.items()}
    int8_plans = [plan for plan in plans if plan.skip_reason is None]
    return {
        "int8run": version,
        "model": str(model.location),
        "revision": model.revision,
        "source_sha256": {path.name: cache.hash_file(path) for path in list_weight_files(loaded)},
        "family": loaded.family.name,
        "denoiser": loaded.source.denoisers[0].class_name,
        "outlier": settings.outlier.name,
        "rounding": int8_plans[0].rounding if int8_plans else None,
        "checkpoint": None if prequantized is None else prequantized.source,
        "settings": method_settings,
        "calibration": asdict(settings.calibration) if needs_calibration else None,
        "quality_db": settings.quality_db,
        "seed": seed,
        "loras": list_baked_loras(lora),
        "kept_float": {plan.name: plan.skip_reason for plan in plans if plan.skip_reason is not None},
        "layers": {plan.name: describe_layer(plan) for plan in int8_plans},
    }


def describe_layer(plan: LayerPlan) -> dict[str, Any]:
    """What the provenance says of one INT8 layer."""
    return {**plan.measured, "outlier": plan.outlier, "outlier_why_not": plan.outlier_skip_reason}
