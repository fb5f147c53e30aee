"""What INT8 layers were made of: as provenance for the header of a file, and as the key of the cache.

build.py calls it. Files of earlier versions have the same keys, which is why they do not follow today's
names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

from int8run import __version__
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.layers.plan import FLOAT, LayerPlan
from int8run.layers.plan_summary import select_int8_plans
from int8run.lora.config import LoraSettings
from int8run.lora.entries import Entry
from int8run.models.family import ModelSource
from int8run.models.loader import VAE
from int8run.outlier.base import NONE
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.model_files import hash_model_files, list_safetensors
from int8run.pipeline.prequantized import BakedLoras, PrequantizedLayers
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.vae import QuantizedVae
from int8run.utils.disk_cache import DiskCache, hash_parts


@dataclass(frozen=True)
class QuantizationOrigin:
    """The settings that INT8 layers were made with.

    Args:
        model: where the float model is, and its dtype.
        lora: the stack, of which the strengths count where it is baked in.
        settings: how the layers become INT8.
    """

    model: ModelSource
    lora: LoraSettings
    settings: QuantizationSettings


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


# -- the key of the cache --------------------------------------------------------------------------


def build_cache_key(
    loaded: LoadedModel, origin: QuantizationOrigin, entries: Sequence[Entry], cache: DiskCache
) -> str:
    """The key of the INT8 layers in the cache, from everything that they depend on.

    Args:
        loaded: the model.
        origin: the settings of the layers.
        entries: the files of the LoRA stack, in its order.
        cache: remembers the hashes of files that did not change.
    """
    settings, model = origin.settings, origin.model
    configs = []
    for denoiser in loaded.source.denoisers:
        configs.append((denoiser.class_name, sorted(denoiser.config.items(), key=itemgetter(0))))
    # what differs from the default alone, so that the keys of other runs stay
    convolutions = [] if settings.int8.convolutions == FLOAT else ["convolutions with methods by error"]
    bits = [] if settings.int8.bits == 8 else [("bits", settings.int8.bits, settings.int8.group_size)]
    return hash_parts(
        [
            *convolutions,
            *bits,
            __version__,
            hash_sources(loaded, settings, cache),
            configs,
            model.dtype,
            model.quant_format,
            model.sdnq,
            loaded.family,
            settings.outlier,
            settings.rounding,
            select_calibration(loaded, settings, model.parts),
            hash_baked_loras(origin.lora, entries, cache),
        ]
    )


def hash_sources(
    loaded: LoadedModel, settings: QuantizationSettings, cache: DiskCache
) -> list[tuple[str, str]]:
    """Name and hash of the files that the layers are made from; of weights alone the names do not count."""
    sources: list[tuple[str, str]] = []
    if settings.needs_calibration:
        # what is generated for a calibration depends on the whole pipeline
        sources = hash_model_files(loaded.source, cache)
    return sources or [("", cache.hash_file(path)) for path in list_weight_files(loaded)]


def select_calibration(
    loaded: LoadedModel, settings: QuantizationSettings, parts: Mapping[str, Sequence[str]]
) -> tuple[object, ...] | None:
    """Everything that the activations of a calibration and their use depend on; None: there is none.

    Args:
        loaded: the model.
        settings: of the layers.
        parts: components from elsewhere, as `model.parts` names them.
    """
    if not settings.needs_calibration:
        return None
    counts: tuple[object, ...] = (
        settings.calibration,
        loaded.sampling,
        loaded.source.pipeline_class,
        # a ControlNet or a text encoder from elsewhere
        sorted((name, list(part)) for name, part in parts.items()),
        settings.quality_db,
        settings.backend,
        str(loaded.device),
    )
    if settings.quality_db is not None and settings.int8.steps is not None:
        # the search lets the float model compute some steps; elsewhere they change no layer
        counts = (*counts, repr(settings.int8.steps))
    if settings.quality_db is None or settings.int8.attention == FLOAT:
        return counts
    # the search compares denoisers with the INT8 attention in them
    int8 = settings.int8
    return (*counts, int8.attention, int8.attention_min_sqnr_db, int8.only_if_faster)


def hash_baked_loras(
    lora: LoraSettings, entries: Sequence[Entry], cache: DiskCache
) -> list[tuple[object, ...]]:
    """What is added to the float weights: hash, left out keys, components and strength of each LoRA."""
    if not lora.is_baked:
        return []
    baked: list[tuple[object, ...]] = []
    for entry, strength in zip(entries, lora.strengths, strict=True):
        # not its identity, which is equal for files with other names of layers
        file_hash = cache.hash_file(entry.file.path)
        baked.append((file_hash, entry.file.outside, entry.components, strength))
    return baked


# -- the header of a file --------------------------------------------------------------------------


def build_provenance(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    origin: QuantizationOrigin,
    *,
    seed: int,
    prequantized: PrequantizedLayers | None,
    cache: DiskCache,
) -> dict[str, Any]:
    """How the INT8 layers were made, for the header of a file.

    Args:
        loaded: the model.
        plans: of every Linear, after the quantization.
        origin: the settings of the layers.
        seed: of the run.
        prequantized: a file that some layers come from; None: all were quantized in this run.
        cache: remembers the hashes of files that did not change.
    """
    settings = origin.settings
    if prequantized is not None and prequantized.is_cached:
        return renew_provenance(prequantized.provenance, settings)
    checkpoint: str | None = None
    method_settings: dict[str, Any] = {}
    if prequantized is not None:
        checkpoint = prequantized.source
    else:
        methods: dict[str, Any] = {"outlier": settings.outlier, "rounding": settings.rounding}
        method_settings = {name: asdict(method) for name, method in methods.items()}
    int8_plans = select_int8_plans(plans)
    return {
        "int8run": __version__,
        "model": str(origin.model.location),
        "revision": origin.model.revision,
        "source_sha256": {path.name: cache.hash_file(path) for path in list_weight_files(loaded)},
        "family": loaded.family.name,
        "denoiser": loaded.source.denoisers[0].class_name,
        "outlier": settings.outlier.name,
        "rounding": int8_plans[0].rounding if int8_plans else None,
        **settings.int8.describe_bits(),
        "checkpoint": checkpoint,
        "settings": method_settings,
        "calibration": describe_calibration(settings.calibration) if settings.needs_calibration else None,
        "quality_db": settings.quality_db,
        "seed": seed,
        "loras": list_baked_loras(origin.lora),
        "kept_float": {plan.name: plan.skip_reason for plan in plans if plan.skip_reason is not None},
        "layers": {plan.name: describe_layer(plan) for plan in int8_plans},
        **describe_attention(settings),
    }


def build_vae_provenance(
    loaded: LoadedModel, vae: QuantizedVae, model: ModelSource, rounding: str
) -> dict[str, Any]:
    """How the layers of an INT8 VAE were made, for the header of its file.

    Args:
        loaded: the model.
        vae: after the quantization.
        model: where the float model is.
        rounding: of the weights.
    """
    file = loaded.vae
    plans = [plan for plan in vae.plans if plan.name in vae.layers]
    return {
        "int8run": __version__,
        "model": str(model.location),
        "revision": model.revision,
        VAE: type(vae.float_vae).__name__,
        "outlier": NONE,
        "rounding": rounding,
        "checkpoint": None if file is None or not file.layers else file.location,
        "kept_float": {plan.name: plan.skip_reason for plan in vae.plans if plan.name not in vae.layers},
        "layers": {plan.name: dict(plan.measured) for plan in plans},
    }


def renew_provenance(known: Mapping[str, Any], settings: QuantizationSettings) -> dict[str, Any]:
    """What the header says of layers out of the cache, which know nothing of this run's attention.

    Args:
        known: of the layers.
        settings: of this run.
    """
    of_layers = {name: value for name, value in known.items() if name != "attention"}
    return {**of_layers, "int8run": __version__, **describe_attention(settings)}


def describe_attention(settings: QuantizationSettings) -> dict[str, str]:
    """What the provenance says of attention, which has no weights: the setting; nothing where it is float."""
    if settings.int8.attention == FLOAT:
        return {}
    return {"attention": str(settings.int8.attention)}


def describe_calibration(calibration: CalibrationSettings) -> dict[str, Any]:
    """What the provenance says of a calibration: of the images that it begins with the hashes."""
    described = {item.name: getattr(calibration, item.name) for item in fields(calibration)}
    described["inputs"] = [file.sha256 for inputs in calibration.inputs for file in inputs.all_files]
    return described


def describe_layer(plan: LayerPlan) -> dict[str, Any]:
    """What the provenance says of one INT8 layer."""
    facts = {**plan.measured, "outlier": plan.outlier, "outlier_why_not": plan.outlier_skip_reason}
    if plan.bits_reason:
        facts["bits_why_not"] = plan.bits_reason
    return facts
