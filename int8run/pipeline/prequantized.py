"""INT8 layers that need not be made: those of a file, or of an earlier run with the same settings.

build.py calls `find_prequantized` before anything is quantized, and quantize_denoiser.py reads the layers.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from int8run.checkpoints.declared_format import UNDECLARED, DeclaredFormat
from int8run.checkpoints.layer import CheckpointLayer
from int8run.errors import ConfigError, FileError
from int8run.layers.int8_linear import QuantizedLayer, get_linear
from int8run.layers.plan import LayerPlan
from int8run.models.dual_denoisers import split_denoiser
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import NONE, OutlierMethod
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.loaded_model import LoadedModel
from int8run.ptq.quantize import check_weight
from int8run.quant.weight import QuantizedWeight, quantize_weight, sqnr_db
from int8run.text_encoders.detect import find_encoders
from int8run.utils.disk_cache import DiskCache
from int8run.utils.paths import expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
# an INT8 weight has 30 dB and more; another model's weight 0
MIN_SQNR_DB = 15.0
# by how much a rounding that fits the layer's output may be worse than the nearest integers
MAX_ROUNDING_LOSS_DB = 6.0
# name and strength of each LoRA that is baked in, as the provenance of a file has them
BakedLoras = list[list[Any]]


@dataclass(frozen=True)
class PrequantizedLayers:
    """INT8 layers that exist already.

    Args:
        weights: the files.
        layers: what a file says of each layer, by module name.
        provenance: how int8run made the (first) file; empty when another program did.
        is_cached: whether the file is of int8run's own cache, whose key says what is in it.
    """

    weights: DenoiserWeights
    layers: Mapping[str, CheckpointLayer]
    provenance: Mapping[str, Any]
    is_cached: bool = False

    @property
    def source(self) -> str:
        """The files, for messages."""
        return ", ".join(str(file.path) for file in self.weights.parts.values())

    @property
    def rounding(self) -> str:
        """How the weights were rounded, as far as the file says."""
        return str(self.provenance.get("rounding", "unknown"))


@dataclass(frozen=True)
class PrequantizedRequest:
    """What decides whether INT8 layers that exist can be used.

    Args:
        checkpoint: `int8.checkpoint`: file or folder, or one for each denoiser; None: none is given.
        outlier: the outlier method that the layers should have.
        baked_loras: that the layers should have.
        declared: what the user says of the file of `checkpoint`; it decides what the file leaves open.
        cache: of earlier runs.
        cache_key: of these settings; None: the cache is not used.
    """

    checkpoint: str | Mapping[str, str] | None
    outlier: OutlierMethod | AutoOutlier
    baked_loras: BakedLoras
    cache: DiskCache
    cache_key: str | None
    declared: DeclaredFormat = UNDECLARED


# -- finding them ----------------------------------------------------------------------------------


def find_prequantized(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    request: PrequantizedRequest,
    changed_layers: Collection[str] = (),
) -> PrequantizedLayers | None:
    """Find INT8 layers in `int8.checkpoint`, in the model's own file, or of an earlier run of these settings.

    Args:
        loaded: the model.
        plans: changed to what the file has.
        request: what they should be.
        changed_layers: names of the layers that a LoRA changes.

    Returns:
        None where all layers are to be quantized here.

    Raises:
        FileError: when the file does not fit the model, or contradicts the settings.
        ConfigError: when LoRAs are to be baked into integers.
    """
    found: PrequantizedLayers | None
    if request.checkpoint is not None:
        found = open_given_checkpoint(loaded, request.checkpoint, request)
    elif loaded.checkpoint is not None and loaded.checkpoint.find_int8_layers():
        found = open_own_layers(loaded.checkpoint, request, changed_layers)
    else:
        found = find_cached_layers(loaded, request)
    if found is None:
        return None
    apply_to_plans(found, plans, request.outlier)
    if request.checkpoint is not None:
        check_baked_loras(found, request.baked_loras)
    layers = count_noun(len(found.layers), "INT8 layer", "come")
    if found.is_cached:
        log.info("%s from %s, which an earlier run wrote", layers, found.source)
    else:
        log.info("%s from %s; rounding= is ignored", layers, found.source)
    return found


def open_given_checkpoint(
    loaded: LoadedModel, checkpoint: str | Mapping[str, str], request: PrequantizedRequest
) -> PrequantizedLayers:
    """Open the layers of `int8.checkpoint`.

    Args:
        loaded: the model.
        checkpoint: a file or folder, or one for each denoiser.
        request: says what the file leaves open.

    Raises:
        FileError: when there are none.
    """
    components = [denoiser.component for denoiser in loaded.source.denoisers]
    found = open_checkpoint(loaded, resolve_checkpoint_paths(checkpoint, components), request)
    check_has_int8_layers(found.weights, checkpoint)
    return found


def check_has_int8_layers(weights: DenoiserWeights, checkpoint: str | Mapping[str, str]) -> None:
    """Check that the files of `int8.checkpoint` hold INT8 layers of the model.

    Args:
        weights: the files, opened.
        checkpoint: as it was given, for the message.

    Raises:
        FileError: when they hold none; it says what they hold, where that is known.
    """
    if weights.find_int8_layers():
        return
    check_is_no_text_encoder(weights)
    for file in weights.parts.values():
        other = file.describe_other_model()
        if other:
            raise FileError(f"int8.checkpoint={checkpoint} is no checkpoint of a {file.class_name}{other}")
    raise FileError(
        f"{checkpoint} holds no INT8 layer that can be used as it is; set model.location to it, or "
        "quantize anew"
    )


def check_is_no_text_encoder(weights: DenoiserWeights) -> None:
    """Check that files without an INT8 layer of the denoiser are not text encoders.

    Raises:
        FileError: naming the setting that takes the file.
    """
    for file in weights.parts.values():
        shapes = {key: info.shape for key, info in file.files.items()}
        encoders = find_encoders(shapes)
        if encoders:
            names = " and ".join(encoder.name for encoder in encoders.values())
            raise FileError(
                f"int8.checkpoint={file.path} is a text encoder ({names}), and int8.checkpoint takes layers "
                f"of the denoiser; set clip=auto clip.path={file.path}"
            )


def resolve_checkpoint_paths(
    checkpoint: str | Mapping[str, str], components: Sequence[str]
) -> dict[str, Path]:
    """The file or folder of each denoiser's INT8 layers.

    Args:
        checkpoint: a file, a folder, a folder with one for each component, or a mapping from components.
        components: names of the pipeline's denoisers.

    Raises:
        ConfigError: when it is not clear which file belongs to which denoiser.
    """
    if isinstance(checkpoint, Mapping):
        if set(checkpoint) != set(components):
            raise ConfigError(
                f"int8.checkpoint names {', '.join(checkpoint)}; the model has {', '.join(components)}"
            )
        return {name: expand_path(path) for name, path in checkpoint.items()}
    path = expand_path(checkpoint)
    if all((path / name).is_dir() for name in components):
        return {name: path / name for name in components}
    if len(components) > 1:
        example = ", ".join(f"{name}: <file>" for name in components)
        raise ConfigError(
            f"int8.checkpoint={checkpoint} is one file, the model has {len(components)} denoisers; set "
            f"'int8.checkpoint={{{example}}}'"
        )
    return {components[0]: path}


def open_checkpoint(
    loaded: LoadedModel, paths: Mapping[str, Path], request: PrequantizedRequest
) -> PrequantizedLayers:
    """Open files of INT8 layers; nothing else in them is used.

    Args:
        loaded: the model.
        paths: by component.
        request: says what the files leave open.
    """
    files = {}
    for prefix, denoiser in split_denoiser(loaded.denoiser).items():
        component = prefix.removesuffix(".") or next(iter(paths))
        files[prefix] = FileWeights(
            paths[component],
            denoiser,
            is_partial=True,
            declared=request.declared,
        )
    weights = DenoiserWeights(files)
    return PrequantizedLayers(weights, weights.find_int8_layers(), weights.read_provenance())


def open_own_layers(
    weights: DenoiserWeights, request: PrequantizedRequest, changed_layers: Collection[str]
) -> PrequantizedLayers:
    """The INT8 layers of the model's own file, which has no float weights for them.

    Raises:
        ConfigError: when LoRAs are to be baked into them.
    """
    found = PrequantizedLayers(weights, weights.find_int8_layers(), weights.read_provenance())
    if found.provenance.get("loras"):
        log.info("LoRAs baked into it: %s", describe_loras(found.provenance["loras"]))
    integers = set(changed_layers) & set(found.layers)
    if request.baked_loras and integers:
        raise ConfigError(
            f"lora.mode=bake adds LoRAs to float weights, and {len(integers)} of the layers that they change "
            f"are INT8 in {found.source}; set lora.mode=dynamic or stochastic"
        )
    return found


def find_cached_layers(loaded: LoadedModel, request: PrequantizedRequest) -> PrequantizedLayers | None:
    """The layers of an earlier run with the same settings; a damaged file is removed."""
    if request.cache_key is None:
        return None
    path = request.cache.get("int8", request.cache_key)
    if path is None:
        return None
    try:
        return open_cached_layers(loaded, path)
    except FileError as error:
        request.cache.remove(path, error)
        return None


def open_cached_layers(loaded: LoadedModel, path: Path) -> PrequantizedLayers:
    """Open a file of the cache, which has the layers of all denoisers under their names in the model.

    Raises:
        FileError: when it is damaged, or lacks layers that it should have.
    """
    weights = DenoiserWeights({"": FileWeights(path, loaded.denoiser, is_partial=True)})
    layers, provenance = weights.find_int8_layers(), weights.read_provenance()
    expected = get_layer_facts(provenance, "layers")
    if not layers or set(layers) != set(expected):
        raise FileError(f"{path} does not have the layers that its provenance lists")
    return PrequantizedLayers(weights, layers, provenance, is_cached=True)


def check_baked_loras(found: PrequantizedLayers, wanted: BakedLoras) -> None:
    """Check that a checkpoint has the LoRAs baked in that the run bakes.

    Raises:
        FileError: when it has others; a checkpoint of another program does not say.
    """
    held = found.provenance.get("loras", [])
    if found.provenance and held != wanted:
        raise FileError(
            f"{found.source} was made with {describe_loras(held)} baked in, this run bakes "
            f"{describe_loras(wanted)}; for LoRAs on top of it set lora.mode=dynamic or stochastic, or use "
            "it as model.location in place of int8.checkpoint"
        )


def describe_loras(loras: object) -> str:
    """LoRAs of a provenance for messages: `ink 0.8, gloss 0.4`; somebody may have put anything there."""
    if not isinstance(loras, list):
        return "no LoRA"
    pairs = [lora for lora in loras if isinstance(lora, list) and len(lora) == 2]
    return ", ".join(f"{name} {strength}" for name, strength in pairs) or "no LoRA"


# -- planning with them ----------------------------------------------------------------------------


def apply_to_plans(
    found: PrequantizedLayers, plans: Sequence[LayerPlan], outlier: OutlierMethod | AutoOutlier
) -> None:
    """Change the plans to what the file has: its INT8 layers, and everything else float.

    Args:
        found: the file.
        plans: of every Linear; they are changed.
        outlier: the method that the layers should have; `none` and `auto` leave it to the file.

    Raises:
        FileError: when a layer has another method.
    """
    skip_reasons = get_layer_facts(found.provenance, "kept_float")
    inexact = found.weights.find_inexact_layers()  # quantized again, as if they were float
    for plan in plans:
        if plan.name in found.layers:
            plan.skip_reason = None
        elif plan.name not in inexact:
            known_reason = str(skip_reasons.get(plan.name, ""))
            plan.skip_reason = known_reason or plan.skip_reason or "float in the file"
    if not found.is_cached and not isinstance(outlier, AutoOutlier) and outlier.name != NONE:
        check_outlier_methods(found, plans, outlier)


def check_outlier_methods(
    found: PrequantizedLayers, plans: Sequence[LayerPlan], outlier: OutlierMethod
) -> None:
    """Check that the layers of a file have an outlier method, where it can take them.

    Raises:
        FileError: when some have another.
    """
    contradictions = []
    for plan in plans:
        layer = found.layers.get(plan.name)
        if layer is None:
            continue
        plan.outlier_skip_reason = outlier.unsupported_reason(plan.in_features) or ""
        method: str = NONE
        settings: Mapping[str, float] = {}
        if not plan.outlier_skip_reason:
            method, settings = outlier.name, outlier.get_settings(plan.in_features)
        if (layer.outlier_method, layer.outlier_settings) != (method, settings):
            expected = " ".join(map(str, [method, *settings.values()]))
            contradictions.append(f"{plan.name} has {layer.label!r}, not {expected!r}")
    if contradictions:
        raise FileError(
            f"{found.source} contradicts outlier={outlier.name} in {len(contradictions)} of "
            f"{len(found.layers)} layers ({contradictions[0]}); set outlier=auto to use what the file has, "
            "or quantize again"
        )


# -- reading them ----------------------------------------------------------------------------------


def read_prequantized_layers(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    found: PrequantizedLayers,
    read_weight: Callable[[str], Tensor],
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """Read the layers of a file, each compared with the float weight where that comes from elsewhere.

    Args:
        loaded: the model.
        plans: of the layers; what is known of each is put there.
        found: the file.
        read_weight: gives the float weight of a Linear by its name.

    Raises:
        FileError: when a layer was made from another weight.
    """
    facts_by_layer = get_layer_facts(found.provenance, "layers")
    for plan in plans:
        layer = read_prequantized_layer(loaded, plan, found)
        facts = facts_by_layer.get(plan.name)
        if isinstance(facts, Mapping):
            plan.outlier_skip_reason = str(facts.get("outlier_why_not", ""))
            plan.measured |= {name: value for name, value in facts.items() if isinstance(value, float)}
        if not found.is_cached and found.weights is not loaded.checkpoint:
            check_against_float(plan, layer, read_weight(plan.name), found.source)
        plan.measured.setdefault("saturated_share", layer.weight.saturated_share)
        yield plan, layer


def read_prequantized_layer(
    loaded: LoadedModel, plan: LayerPlan, found: PrequantizedLayers
) -> QuantizedLayer:
    """Read one layer of a file, with the bias of the float model, on the device."""
    layer = found.weights.read_int8_layer(plan.name)
    layer.transform.to(loaded.device)
    weight = QuantizedWeight(layer.weight.qdata.to(loaded.device), layer.weight.scale.to(loaded.device))
    plan.outlier = layer.transform.label
    plan.rounding = found.rounding
    return QuantizedLayer(weight, layer.transform, get_linear(loaded.denoiser, plan.name).bias)


def get_layer_facts(provenance: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a provenance says of layers, by name; nothing where somebody has put something else there."""
    facts = provenance.get(key)
    return facts if isinstance(facts, Mapping) else {}


def check_against_float(plan: LayerPlan, layer: QuantizedLayer, weight: Tensor, source: str) -> None:
    """Check that a layer of a file was made from the model's float weight; the plan gets how near it is.

    Args:
        plan: of the layer.
        layer: as it is in the file.
        weight: float, [N, K].
        source: the file, for messages.

    Raises:
        FileError: when it was made from another weight.
    """
    check_weight(plan, weight)
    # In the basis in which it was quantized: transformed back, a factor would make a good weight look bad in
    # columns that the input hardly uses.
    transformed = layer.transform.transform_weight(weight.float())
    sqnr = sqnr_db(transformed, layer.weight.dequantize())
    # In a wide layer with one huge weight per row, not even the nearest integers come near the usual SQNR.
    nearest_sqnr = sqnr_db(transformed, quantize_weight(transformed).dequantize())
    min_sqnr = min(MIN_SQNR_DB, nearest_sqnr - MAX_ROUNDING_LOSS_DB)
    if not sqnr >= min_sqnr:  # also for NaN
        raise FileError(
            f"{source}: {plan.name} does not hold this model's weight (SQNR {sqnr:.1f} dB, at least "
            f"{min_sqnr:.0f} expected); it was made from another checkpoint, or with LoRAs baked in"
        )
    plan.measured.setdefault("weight_sqnr_db", sqnr)  # that of the file was summed in another order
