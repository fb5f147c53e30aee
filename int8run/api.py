"""int8run as a library: three lines on a model that a program has already.

from int8run import LoraStack, quantize_

quantize_(pipe.transformer, outlier="convrot")
stack = LoraStack(pipe.transformer).add("style.safetensors", 0.8)
stack.set_strength("style", 0.4)
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_module, version
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from int8run.config.compose import create_run_spec, int8run_options
from int8run.config.error_messages import explain_error
from int8run.config.renamed import rename_overrides, report_once
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, check_range
from int8run.layers.assemble import assemble_int8_model
from int8run.layers.int8_conv import Int8Layer, get_layer
from int8run.layers.plan import FLOAT, LayerPlan, plan_layers
from int8run.layers.plan_summary import describe_skip_reasons, select_int8_plans, warn_without_convolutions
from int8run.lora.installed import find_marks, format_names
from int8run.lora.stack import LoraStack
from int8run.models.dual_denoisers import split_denoiser
from int8run.models.given_model import GivenModel, take_denoiser
from int8run.models.loader import pick_device
from int8run.outlier.base import OutlierMethod
from int8run.pipeline.load import resolve_family
from int8run.pipeline.loaded_model import make_skip_rule
from int8run.pipeline.offload import has_group_offloading
from int8run.pipeline.outlier_choice import choose_fixed_method
from int8run.ptq.bits import assign_bits
from int8run.ptq.convolutions import ConvolutionBinder
from int8run.ptq.quantize import build_int8_layers, check_backend, keep_faster_layers, quantize_layers
from int8run.utils.dtypes import FLOAT_DTYPES

WEIGHT_DTYPES = {torch.float64, *(getattr(torch, name) for name in FLOAT_DTYPES)}
log = logging.getLogger(__name__)
__all__ = ["LoraStack", "quantize_"]


@torch.no_grad()
def quantize_(  # noqa: PLR0913  # the contract of the library: each is an option of the command line
    model: GivenModel,
    outlier: str = "none",
    backend: str = "auto",
    rounding: str = "absmax",
    model_type: str = "auto",
    rows: int = 1024,
    overrides: Sequence[str] = (),
    device: str | None = None,
) -> list[LayerPlan]:
    """Replace the Linears of a denoiser by INT8 layers, with options named as on the command line.

    With `int8.convolutions=int8` or `auto` in `overrides` its convolutions as well; none is timed here.

    Args:
        model: a diffusers denoiser, compiled or not, or its pipeline. It is changed in place, and its float
            weights are dropped.
        outlier: option of `outlier=`; those that need a calibration need the command.
        backend: option of `backend=`; with `auto`, layers that are faster in float stay float, see
            `int8.only_if_faster`.
        rounding: option of `rounding=`; those that need a calibration need the command.
        model_type: option of `model_type=`.
        rows: tokens that a layer sees in one call, which `backend=auto` measures with.
        overrides: further settings, such as `int8.small_batch_fallback=never`.
        device: where the INT8 model will run (`cpu`, `cuda`, `cuda:1`, ...). Layers are quantized there one
            at a time, and the model ends up there: it never has to fit as floats. None: where it is, or
            where diffusers' model offloading brings it.

    Returns:
        What happened to each Linear and, where these may be INT8, to each convolution.

    Raises:
        ConfigError: for an option that does not exist or needs a calibration, for a model that has LoRAs on
            it, or when no layer becomes INT8.
        BackendError: for a backend that cannot run here.
    """
    check_range("rows", rows, 1, 2**31, whole=True)
    options = {"outlier": outlier, "backend": backend, "rounding": rounding, "model_type": model_type}
    chosen_options = [f"{group}={option}" for group, option in options.items()]
    spec = compose_run_spec([*chosen_options, *overrides])
    check_settings(spec, options)
    denoiser = take_denoiser(model, "quantize_")
    check_no_loras(denoiser)

    parts = split_denoiser(denoiser)
    family = resolve_family(spec.model_type, next(iter(parts.values())))
    skip_rule = make_skip_rule(family, denoiser)
    plans = plan_layers(denoiser, skip_rule, convolutions=spec.int8.convolutions)
    warn_without_convolutions(plans, spec.int8.convolutions)
    chosen = select_int8_plans(plans)
    check_model(denoiser, plans, chosen)

    placement = find_placement(denoiser, device)
    check_backend(spec.backend, placement.device, chosen)
    assign_bits(chosen, spec.int8.fixed_layout)
    methods = choose_fixed_method(chosen, spec.outlier)
    layers = make_int8_layers(denoiser, chosen, spec, placement, methods=methods, rows=rows)
    int8_parts = split_denoiser(assemble_int8_model(denoiser, layers, family))
    warn_compiled_blocks(denoiser)
    for prefix, part in parts.items():
        for name, child in int8_parts[prefix].named_children():  # into the object that the caller holds
            setattr(part, name, child)
    denoiser.to(placement.offload_device)
    log.info("%d of %d layers are INT8", len(layers), len(plans))
    return plans


@dataclass(frozen=True)
class Placement:
    """Where an INT8 model runs, and where it waits until then."""

    device: torch.device
    offload_device: torch.device


def make_int8_layers(
    denoiser: nn.Module,
    chosen: Sequence[LayerPlan],
    spec: RunSpec,
    placement: Placement,
    *,
    methods: Mapping[str, OutlierMethod],
    rows: int,
) -> dict[str, Int8Layer]:
    """The INT8 layers of a denoiser, by name, without those that are faster in float.

    Args:
        denoiser: float; it stays as it is.
        chosen: the plans of its layers that may become INT8, where what happens to each is noted.
        spec: all settings.
        placement: where each layer is made, and where it waits then.
        methods: against outliers, by name of the layer.
        rows: tokens that a layer sees in one call.
    """

    def put_away(layer: Int8Layer) -> None:
        layer.to(placement.offload_device)

    # quantized one at a time, as `build_int8_layers` asks for them
    quantized = quantize_layers(
        denoiser,
        chosen,
        methods=methods,
        rounding=spec.rounding,
        statistics={},
        group_size=spec.int8.group_size,
        read=lambda name: get_layer(denoiser, name).weight.detach().to(placement.device),
    )
    # no call is seen here, so that no convolution is timed: `auto` makes all of them INT8
    binder = ConvolutionBinder(spec.backend, placement.device, spec.int8, inputs={})
    linears = build_int8_layers(
        denoiser,
        binder.take_convolutions(denoiser, quantized, on_layer=put_away),
        backend=spec.backend,
        settings=spec.int8,
        rows=dict.fromkeys((plan.name for plan in chosen), rows),
        on_layer=put_away,
        device=placement.device,
    )
    return keep_faster_layers(chosen, {**linears, **binder.made})


def find_placement(model: nn.Module, device: str | None) -> Placement:
    """Where a model will run and where it waits.

    Args:
        model: the denoiser, with its hook if accelerate moves it to a GPU for its turn.
        device: as it was asked for; None: not.

    Raises:
        ConfigError: for a name that torch does not know.
        BackendError: for a device that is not there.
    """
    now = next(model.parameters()).device
    hook = getattr(model, "_hf_hook", None)
    offloaded_to = getattr(hook, "execution_device", None)
    if offloaded_to is None:
        target = now if device is None else pick_device(device)
        return Placement(target, offload_device=target)
    target = torch.device(offloaded_to) if device is None else pick_device(device)
    return Placement(target, offload_device=now)


def check_settings(spec: RunSpec, options: Mapping[str, str]) -> None:
    """Check that the settings are those of a model alone, without files, images or LoRAs.

    Args:
        spec: all settings.
        options: by group, for the message.

    Raises:
        ConfigError: when they need the command.
    """
    needs_command = (
        spec.save is not None
        or spec.int8.checkpoint is not None
        or not spec.int8.enable
        or spec.int8.attention != FLOAT
        or spec.int8.vae != FLOAT
        or spec.int8.steps is not None
        or spec.quality_db is not None
        or bool(spec.lora.adapters)
        or spec.clip.is_quantized
    )
    if needs_command:
        raise ConfigError(
            "quantize_ takes no save, int8.checkpoint, int8.enable=false, int8.attention, int8.vae, "
            "int8.steps, quality_db, lora or clip; the command `int8run` does"
        )
    for group, choice in (("outlier", spec.outlier), ("rounding", spec.rounding)):
        if choice.needs_calibration:
            option = options[group]
            raise ConfigError(
                f"{group}={option} is fitted to activations, which quantize_ does not see; use the command "
                f"`int8run {group}={option} save=FILE`, or another option"
            )


def check_no_loras(model: nn.Module) -> None:
    """Check that a model has no LoRAs on it: they would be in its integers for ever, or lose their layers.

    Args:
        model: the denoiser.

    Raises:
        ConfigError: when it has.
    """
    name = type(model).__name__
    marks = find_marks([model])
    if marks:
        raise ConfigError(
            f"{name} has LoRAs on it ({format_names(marks)}); call clear() of their LoraStack first, or "
            "LoraStack(model).clear() if it is gone, and put them on after quantize_"
        )
    if any("base_layer" in module._modules for module in model.modules()):
        raise ConfigError(
            f"{name} has adapters of PEFT in it (load_lora_weights, add_adapter); take them off first "
            "(unload_lora_weights, delete_adapters), and put LoRAs on with a LoraStack after quantize_"
        )


def warn_compiled_blocks(model: nn.Module) -> None:
    """Warn where blocks were compiled one by one: the INT8 blocks that take their place are not."""
    parts = {*split_denoiser(model).values(), model}
    if any(module._compiled_call_impl is not None for module in model.modules() if module not in parts):
        log.warning(
            "the compiled blocks of %s are replaced by INT8 blocks that are not compiled; call "
            "compile_repeated_blocks() after quantize_",
            type(model).__name__,
        )


def check_model(model: nn.Module, plans: Sequence[LayerPlan], chosen: Sequence[LayerPlan]) -> None:
    """Check that a model has layers to quantize, and none that are quantized.

    Args:
        model: the denoiser.
        plans: of every Linear.
        chosen: those that become INT8.

    Raises:
        ConfigError: when it does not.
    """
    check_weights(model)
    name = type(model).__name__
    if any(isinstance(module, Int8Layer) for module in model.modules()):
        raise ConfigError(f"{name} has INT8 layers already; load it anew to quantize it otherwise")
    if not chosen:
        reasons = describe_skip_reasons(plans)
        raise ConfigError(f"{name}: no layer became INT8 ({reasons}); choose another model_type")


def check_weights(model: nn.Module) -> None:
    """Check that the weights of a model are in memory, and floats.

    Args:
        model: the denoiser.

    Raises:
        ConfigError: when they are not.
    """
    name = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"{name} has weights that are not in memory, but on the meta device; call quantize_ before "
            "enable_sequential_cpu_offload, or use another offloading"
        )
    if has_group_offloading(model):
        raise ConfigError(f"{name} has group offloading on; call quantize_ before enable_group_offload")
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype not in WEIGHT_DTYPES:
            dtype = str(module.weight.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} has weights of {dtype}, so another program has quantized it, or its layerwise "
                f"casting is on; quantize_ takes a model of {', '.join(FLOAT_DTYPES)}"
            )


def compose_run_spec(overrides: Sequence[str]) -> Any:
    """Make the RunSpec of a command line; a hydra application of the caller's is left as it is.

    Raises:
        ConfigError: for settings that do not exist or cannot work.
    """
    global_hydra = GlobalHydra.instance()
    callers_hydra, callers_version = global_hydra.hydra, version.VersionBase.instance().getbase()
    global_hydra.clear()
    try:
        overrides = rename_overrides(overrides, report_once())
        with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
            return create_run_spec(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(error)[0]) from error
    finally:
        GlobalHydra.instance().hydra = callers_hydra
        version.VersionBase.instance().version_base = callers_version
