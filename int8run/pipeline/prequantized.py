"""INT8 layers that need not be made: those of a file, or of an earlier run with the same settings."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from int8run.checkpoints.layer import CheckpointLayer
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, FileError
from int8run.layers.int8_linear import QuantizedLayer, get_linear
from int8run.layers.plan import LayerPlan
from int8run.models.dual_denoisers import split_denoiser
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import NONE
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.load import LoadedModel
from int8run.ptq.quantize import check_weight
from int8run.quant.weight import QuantizedWeight, quantize_weight, sqnr_db

log = logging.getLogger(__name__)
# an INT8 weight has 30 dB and more; another model's weight 0
MIN_SQNR_DB = 15.0
# a rounding that looks at the layer's output may be so much worse than the nearest integers
MAX_ROUNDING_LOSS_DB = 6.0


@dataclass(frozen=True)
class PrequantizedLayers:
    """INT8 layers that are there already.

    Args:
        layers: what the file says of each, by module name.
        note: how int8run made the file; empty when another program did.
        cached: the file is of int8run's own cache, whose key says what is in it.
    """

    weights: DenoiserWeights
    layers: Mapping[str, CheckpointLayer]
    provenance: Mapping[str, Any]
    is_cached: bool = False

    @property
    def source(self) -> str:
        """The files, for people."""
        return ", ".join(str(file.path) for file in self.weights.parts.values())

    @property
    def rounding(self) -> str:
        """How the weights were rounded, as far as the file says."""
        return str(self.provenance.get("rounding", "unknown"))


def find_prequantized(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    spec: RunSpec,
    key: str | None,
    changed: Collection[str] = (),
) -> PrequantizedLayers | None:
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
        taken = open_checkpoint(loaded, resolve_checkpoint_paths(location, names))
        if not taken.layers:
            raise FileError(
                f"{location} holds no INT8 layer that can be taken as it is; set model.location to it, or quantize anew"
            )
    elif loaded.files is not None and (own := loaded.files.find_int8_layers()):
        taken = PrequantizedLayers(loaded.files, own, loaded.files.read_provenance())
        if spec.metrics.baseline != "none":
            log.warning(
                "the float model is what the INT8 numbers of %s stand for: what they lost when they were made is not measured",
                taken.source,
            )
        if taken.provenance.get("loras"):
            log.info("baked in there: %s", describe_loras(taken.provenance["loras"]))
        if list_baked_loras(spec) and (lost := set(changed) & set(taken.layers)):
            raise ConfigError(
                f"lora.mode=bake adds LoRAs to float weights, and {len(lost)} of the layers that they change are INT8 in {taken.source}; "
                "set lora.mode=dynamic or stochastic"
            )
    else:
        path = None if key is None else spec.cache.get("int8", key)
        if path is None:
            return None
        try:
            taken = open_cached_layers(loaded, path)
        except FileError as error:
            spec.cache.remove(path, error)
            return None
    apply_to_plans(taken, plans, spec)
    held = taken.provenance.get("loras", [])
    baked = list_baked_loras(spec)
    if location is not None and taken.provenance and held != baked:
        raise FileError(
            f"{taken.source} was made with {describe_loras(held)} baked in, this run bakes {describe_loras(baked)}; for LoRAs on top of it set "
            "lora.mode=dynamic or stochastic, to take all from it model.location in place of int8.checkpoint"
        )
    said = (
        "%d INT8 layers from %s, kept by an earlier run"
        if taken.is_cached
        else "%d INT8 layers from %s; rounding= has no say"
    )
    log.info(said, len(taken.layers), taken.source)
    return taken


def resolve_checkpoint_paths(location: str | Mapping[str, str], components: Sequence[str]) -> dict[str, Path]:
    """The file or folder of each denoiser's INT8 layers.

    Raises:
        ConfigError: when it is not said which file is whose.
    """
    if isinstance(location, Mapping):
        if set(location) != set(components):
            raise ConfigError(
                f"int8.checkpoint names {', '.join(location)}; the model has {', '.join(components)}"
            )
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


def open_checkpoint(loaded: LoadedModel, paths: Mapping[str, Path]) -> PrequantizedLayers:
    """Open files of INT8 layers; what else is in them is not looked at."""
    parts = split_denoiser(loaded.denoiser)
    files = {
        p: FileWeights(paths[p.removesuffix(".") or next(iter(paths))], model, partial=True)
        for p, model in parts.items()
    }
    weights = DenoiserWeights(files)
    return PrequantizedLayers(weights, weights.find_int8_layers(), weights.read_provenance())


def open_cached_layers(loaded: LoadedModel, path: Path) -> PrequantizedLayers:
    """Open a file of the cache, which has the layers of all denoisers under the names that they have here.

    Raises:
        FileError: when it is damaged, or not all layers are there that it says it has.
    """
    weights = DenoiserWeights({"": FileWeights(path, loaded.denoiser, partial=True)})
    taken = PrequantizedLayers(weights, weights.find_int8_layers(), weights.read_provenance(), is_cached=True)
    if not taken.layers or set(taken.layers) != set(get_layer_facts(taken.provenance, "layers")):
        raise FileError(f"{path} does not have the layers that its note says it has")
    return taken


def apply_to_plans(taken: PrequantizedLayers, plans: Sequence[LayerPlan], spec: RunSpec) -> None:
    """Plan what the file has: its INT8 layers, treated as they are there, and everything else float.

    Raises:
        FileError: when a layer was treated otherwise than by the method that `outlier=` names; `none` and `auto` name none.
    """
    kept = get_layer_facts(taken.provenance, "kept_float")
    again = (
        taken.weights.find_inexact_layers()
    )  # what the file has in another way is quantized as if it were float
    for plan in plans:
        if plan.name in again:
            continue
        plan.skip_reason = (
            None
            if plan.name in taken.layers
            else str(kept.get(plan.name, "")) or plan.skip_reason or "float in the file"
        )
    if taken.is_cached or isinstance(spec.outlier, AutoOutlier) or spec.outlier.name == NONE:
        return
    wrong = []
    for plan in plans:
        if plan.name in taken.layers:
            plan.outlier_skip_reason = spec.outlier.unsupported_reason(plan.in_features) or ""
            plain: tuple[str, Mapping[str, float]] = (NONE, {})
            wanted = (
                plain
                if plan.outlier_skip_reason
                else (spec.outlier.name, spec.outlier.get_settings(plan.in_features))
            )
            layer = taken.layers[plan.name]
            if (layer.outlier_method, layer.outlier_settings) != wanted:
                wrong.append(
                    f"{plan.name} is {layer.label!r} there, {' '.join(map(str, [wanted[0], *wanted[1].values()]))!r} was asked for"
                )
    if wrong:
        raise FileError(
            f"{taken.source} contradicts outlier={spec.outlier.name} in {len(wrong)} of {len(taken.layers)} layers ({wrong[0]}); set "
            "outlier=auto to take what the file has, or quantize again"
        )


def describe_loras(loras: object) -> str:
    """LoRAs of a note for people: `ink 0.8, gloss 0.4`; a note that somebody changed may hold anything."""
    named = (
        [lora for lora in loras if isinstance(lora, list) and len(lora) == 2]
        if isinstance(loras, list)
        else []
    )
    return ", ".join(f"{name} {strength}" for name, strength in named) or "no LoRA"


def read_prequantized_layers(
    loaded: LoadedModel, plans: Sequence[LayerPlan], taken: PrequantizedLayers, read: Callable[[str], Tensor]
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """The layers of a file, each compared with the float weight that it stands for, where that comes from elsewhere.

    Args:
        read: gives the float weight of a Linear by its name.

    Raises:
        FileError: when a layer was made from another weight.
    """
    measured = get_layer_facts(taken.provenance, "layers")
    for plan in plans:
        layer = taken.weights.read_int8_layer(plan.name)
        layer.transform.to(loaded.device)
        weight = QuantizedWeight(layer.weight.qdata.to(loaded.device), layer.weight.scale.to(loaded.device))
        layer = QuantizedLayer(weight, layer.transform, get_linear(loaded.denoiser, plan.name).bias)
        plan.outlier, plan.rounding = layer.transform.label, taken.rounding
        if isinstance(known := measured.get(plan.name), Mapping):
            plan.outlier_skip_reason = str(known.get("outlier_why_not", ""))
            plan.measured |= {name: v for name, v in known.items() if isinstance(v, float)}
        if not taken.is_cached and taken.weights is not loaded.files:
            check_against_float(plan, layer, read(plan.name), taken)
        plan.measured.setdefault("saturated_share", weight.saturated_share)
        yield plan, layer


def get_layer_facts(note: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a note says of layers, by name; a note that somebody changed may say nothing."""
    found = note.get(key)
    return found if isinstance(found, Mapping) else {}


def check_against_float(
    plan: LayerPlan, layer: QuantizedLayer, original: Tensor, taken: PrequantizedLayers
) -> None:
    """Note how near a layer of a file is to the model's own float weight.

    Raises:
        FileError: when it was made from another weight.
    """
    check_weight(plan, original)
    # as when it was quantized: undone, a factor would make a good weight look bad in columns that the input hardly uses
    transformed = layer.transform.transform_weight(original.float())
    sqnr = sqnr_db(transformed, layer.weight.dequantize())
    # in a wide layer one huge weight per row leaves so few integers to the others that no rounding has more
    least = min(
        MIN_SQNR_DB, sqnr_db(transformed, quantize_weight(transformed).dequantize()) - MAX_ROUNDING_LOSS_DB
    )
    if not sqnr >= least:
        raise FileError(
            f"{taken.source}: {plan.name} does not hold this model's weight (SQNR {sqnr:.1f} dB, at least {least:.0f} "
            "expected); it was made from another checkpoint, or with LoRAs baked in"
        )
    plan.measured.setdefault("weight_sqnr_db", sqnr)  # the note's own was summed in another order


def list_baked_loras(spec: RunSpec) -> list[list[Any]]:
    """Name and strength of each LoRA that is added to the float weights."""
    pairs = zip(spec.lora.adapters, spec.lora.strengths, strict=True)
    return [[a.name, strength] for a, strength in pairs if strength] if spec.lora.is_baked else []
