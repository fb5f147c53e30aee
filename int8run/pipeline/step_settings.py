"""From the settings of a run to those of its steps: loading, quantizing, and what names their results.

`build.py`, `task=bench` and the experiments ask for them. Below it nothing sees the whole RunSpec.
"""

from dataclasses import replace

import torch

from int8run.checkpoints.declared_format import AUTO
from int8run.config.run_spec import RunSpec
from int8run.pipeline.load_settings import LoadSettings
from int8run.pipeline.provenance import QuantizationOrigin
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.quantize_attention import AttentionSettings


def select_load_settings(spec: RunSpec, *, needs_float_denoiser: bool | None = None) -> LoadSettings:
    """What decides how the model of a run is loaded.

    Args:
        spec: the settings of the run.
        needs_float_denoiser: None: what the run needs.
    """
    if needs_float_denoiser is None:
        needs_float_denoiser = spec.needs_float_denoiser
    model = spec.model
    if spec.int8.checkpoint is not None:
        # they describe the file of int8.checkpoint then, not the model's own
        model = replace(model, quant_format=AUTO, sdnq=None)
    return LoadSettings(
        model=model,
        model_type=spec.model_type,
        sampling=spec.sampling,
        clip=spec.clip,
        device=spec.device,
        attention=spec.attention,
        offload=spec.offload,
        backend=spec.backend if spec.int8.enable else None,
        needs_float_denoiser=needs_float_denoiser,
        needs_float_encoders=spec.needs_float_encoders,
    )


def select_quantization_settings(spec: RunSpec) -> QuantizationSettings:
    """What decides how the layers of a run become INT8."""
    # a single file has its authors' names, which join some layers; a folder has diffusers' own
    has_fused_layers = spec.saves_single_file
    return QuantizationSettings(
        outlier=spec.outlier,
        rounding=spec.rounding,
        backend=spec.backend,
        int8=spec.int8,
        calibration=spec.calibration,
        quality_db=spec.quality_db,
        dtype=getattr(torch, spec.model.dtype),
        needs_calibration=spec.needs_calibration,
        has_fused_layers=has_fused_layers,
    )


def select_attention_settings(spec: RunSpec) -> AttentionSettings:
    """What decides which attentions of a run become INT8."""
    return AttentionSettings(
        int8=spec.int8,
        backend=spec.backend,
        float_attention=spec.attention,
        dtype=getattr(torch, spec.model.dtype),
    )


def select_origin(spec: RunSpec) -> QuantizationOrigin:
    """Model, LoRAs and quantization settings: what names the layers in the cache and in the header."""
    return QuantizationOrigin(spec.model, spec.lora, select_quantization_settings(spec))
