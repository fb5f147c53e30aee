"""INT8 layers that need not be made: those of a file, or of an earlier run with the same settings.

build.py calls `find_prequantized` before anything is quantized, and quantize_denoiser.py reads the layers.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from int8run.checkpoints.declared_format import UNDECLARED, DeclaredFormat
from int8run.checkpoints.layer import CheckpointLayer
from int8run.errors import ConfigError, FileError
from int8run.layers.int8_conv import find_conv_obstacle, is_convolution
from int8run.layers.plan import AUTO, CONV, INT8, LayerPlan, plan_convolution
from int8run.models.dual_denoisers import split_denoiser
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import NONE, OutlierMethod
from int8run.pipeline.checkpoint_paths import check_has_int8_layers, resolve_checkpoint_paths
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.loaded_model import LoadedModel
from int8run.ptq.quantize import find_outlier_obstacle
from int8run.utils.disk_cache import DiskCache
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
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


def find_prequantized(
    loaded: LoadedModel,
    plans: list[LayerPlan],
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
    add_convolutions(found, plans, loaded.denoiser)
    apply_to_plans(found, plans, request.outlier)
    if request.checkpoint is not None:
        check_baked_loras(found, request.baked_loras)
    layers = count_noun(len(found.layers), "INT8 layer", "come")
    if found.is_cached:
        log.info("%s from %s, which an earlier run wrote", layers, found.source)
    else:
        log.info("%s from %s; rounding= is ignored", layers, found.source)
    return found


def report_float_attention(found: PrequantizedLayers) -> None:
    """Log where a file was made with INT8 attention, in a run whose attention is float.

    The cache is not spoken of: this run's settings say what comes out of it.
    """
    made_with = found.provenance.get("attention")
    # somebody may have put anything there
    if found.is_cached or made_with not in (AUTO, INT8):
        return
    log.info(
        "%s was made with int8.attention=%s; here attention stays float (int8.attention=float)",
        found.source,
        made_with,
    )


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


def add_convolutions(found: PrequantizedLayers, plans: list[LayerPlan], denoiser: nn.Module) -> None:
    """Add plans for the convolutions of a file, whose layers are used as they are; checks all of them.

    Args:
        found: the file.
        plans: get those that they lack, in the model's order.
        denoiser: the float model.

    Raises:
        FileError: for the weight of a convolution that INT8 does not have.
    """
    known = {plan.name: plan for plan in plans}
    for name, module in denoiser.named_modules():
        if name not in found.layers or not is_convolution(module):
            continue
        obstacle = find_conv_obstacle(module)
        if obstacle is not None:
            raise FileError(
                f"{found.source} has INT8 numbers for {name}, which is {obstacle}; the file is for another "
                "model, or its convolutions must stay float: quantize it with int8.convolutions=float"
            )
        if name not in known:
            known[name] = plan_convolution(name, module, None)
            plans.append(known[name])
    order = {name: place for place, (name, _) in enumerate(denoiser.named_modules())}
    plans.sort(key=lambda plan: order[plan.name])


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
        plan.outlier_skip_reason = find_outlier_obstacle(outlier, plan) or ""
        if plan.kind == CONV and layer.outlier_method == NONE:
            # files from before convolutions had methods
            plan.outlier_skip_reason = plan.outlier_skip_reason or "the file has it without a method"
        method: str = NONE
        settings: Mapping[str, float] = {}
        if not plan.outlier_skip_reason:
            method, settings = outlier.name, outlier.get_settings(plan.channels)
        if (layer.outlier_method, layer.outlier_settings) != (method, settings):
            expected = " ".join(map(str, [method, *settings.values()]))
            contradictions.append(f"{plan.name} has {layer.label!r}, not {expected!r}")
    if contradictions:
        raise FileError(
            f"{found.source} contradicts outlier={outlier.name} in {len(contradictions)} of "
            f"{len(found.layers)} layers ({contradictions[0]}); set outlier=auto to use what the file has, "
            "or quantize again"
        )


def get_layer_facts(provenance: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a provenance says of layers, by name; nothing where somebody has put something else there."""
    facts = provenance.get(key)
    return facts if isinstance(facts, Mapping) else {}
