"""int8run in a program of one's own: three lines on a model that is there already.

from int8run import LoraStack, quantize_

quantize_(pipe.transformer, outlier="convrot")
stack = LoraStack(pipe.transformer).add("style.safetensors", 0.8)
stack.set_strength("style", 0.4)
"""

import logging
from collections.abc import Sequence
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
from int8run.errors import ConfigError, check_range
from int8run.layers.fusion import assemble_int8_model
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import LayerPlan, plan_layers
from int8run.lora.stack import LoraStack
from int8run.models.loader import list_block_prefixes
from int8run.ptq.quantize import build_int8_layers, check_backend, check_outlier_method, quantize_layers

log = logging.getLogger(__name__)
__all__ = ["LoraStack", "quantize_"]


@torch.no_grad()
def quantize_(
    model: nn.Module,
    outlier: str = "none",
    backend: str = "auto",
    rounding: str = "absmax",
    model_type: str = "auto",
    rows: int = 1024,
    overrides: Sequence[str] = (),
) -> list[LayerPlan]:
    """Put INT8 layers in the place of a denoiser's Linears, by the words of the command line.

    Args:
        model: a diffusers denoiser, changed in place; its float weights are given up.
        outlier, backend, rounding, model_type: options of `int8run`; those that need a calibration need the command.
        rows: tokens that a layer sees in a call, which backend="auto" measures with.
        overrides: further words of the command line, such as "int8.small_batch_fallback=never".

    Returns:
        What happened to each Linear.

    Raises:
        ConfigError: for an option that is not there or needs a calibration, or a model of which no layer becomes INT8.
        BackendError: for a backend that cannot run here.
    """
    check_range("rows", rows, 1, 2**31, whole=True)
    words = {"outlier": outlier, "backend": backend, "rounding": rounding, "model_type": model_type}
    spec = compose_spec([f"{group}={option}" for group, option in words.items()] + list(overrides))
    if (
        spec.save
        or spec.int8.checkpoint
        or not spec.int8.enable
        or spec.quality_db is not None
        or spec.lora.adapters
        or spec.clip.is_quantized
    ):
        raise ConfigError(
            "quantize_ takes no save, int8.checkpoint, int8.enable=false, quality_db, lora or clip; the command `int8run` does"
        )
    for name, choice in (("outlier", spec.outlier), ("rounding", spec.rounding)):
        if choice.needs_calibration:
            raise ConfigError(
                f"{name}={words[name]} is fitted to activations, which quantize_ does not see; use the command `int8run {name}="
                f"{words[name]} save=FILE`, or another option"
            )
    linears = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    family = spec.model_type.resolve_family(type(model).__name__, list_block_prefixes(model), linears)
    plans = plan_layers(model, family.find_skip_reason)
    chosen = [plan for plan in plans if plan.skip_reason is None]
    if any(isinstance(m, Int8Linear) for m in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} has INT8 layers already; load it anew to quantize it otherwise"
        )
    if not chosen:
        raise ConfigError(f"{type(model).__name__}: no layer became INT8; choose another model_type")
    check_backend(spec.backend, next(model.parameters()).device, chosen)
    check_outlier_method(spec.outlier, chosen)
    methods = {plan.name: spec.outlier for plan in chosen if not plan.outlier_skip_reason}
    layers = quantize_layers(model, chosen, methods, spec.rounding, {})
    made = build_int8_layers(model, layers, spec.backend, spec.int8, {plan.name: rows for plan in chosen})
    int8 = assemble_int8_model(model, made, family)
    for (
        name,
        child,
    ) in int8.named_children():  # the tree that was assembled, in the object that the caller holds
        setattr(model, name, child)
    log.info("%d of %d Linears are INT8", len(chosen), len(plans))
    return plans


def compose_spec(overrides: list[str]) -> Any:
    """The RunSpec of a command line; a hydra application of the caller's own is left as it is."""
    held, base = GlobalHydra.instance().hydra, version.VersionBase.instance().getbase()
    GlobalHydra.instance().clear()
    try:
        with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
            return create_run_spec(compose("config", rename_overrides(overrides, report_once())))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(error)[0]) from error
    finally:
        GlobalHydra.instance().hydra = held
        version.VersionBase.instance().version_base = base
