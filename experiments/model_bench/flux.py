"""A FluxTransformer2DModel with random weights, its input, and which of its layers become INT8."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from hydra import compose, initialize_config_module
from torch import Tensor, nn

from int8run.config.compose import create_run_spec
from int8run.config.run_spec import RunSpec
from int8run.layers.plan import plan_layers
from int8run.lora.stack import LoraStack
from int8run.models.family import IgnoreRule, ModelFamily
from int8run.models.sampling import Sampling
from int8run.models.source import ResolvedModel
from int8run.pipeline.build import select_quantization_settings
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.quantize_denoiser import count_layer_rows, quantize_denoiser
from int8run.report.console import Progress


@dataclass(frozen=True)
class Size:
    """Double and single blocks, heads and their width, image and text tokens."""

    double: int
    single: int
    heads: int
    head: int
    image: int
    text: int
    context: int = 512  # width of the text embedding
    pooled: int = 256
    rope: tuple[int, int, int] = (16, 24, 24)
    guidance: bool = False


SIZES = {
    "tiny": Size(1, 1, 4, 64, 16, 8),
    "mid": Size(4, 8, 12, 64, 256, 64),
    "big": Size(2, 4, 24, 64, 1024, 128),
    "full": Size(
        19, 38, 24, 128, 4096, 512, context=4096, pooled=768, rope=(16, 56, 56), guidance=True
    ),  # FLUX.1-dev, 1024x1024
}


def make_model(
    size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and one call of it, from fixed seeds."""
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = FluxTransformer2DModel(
                num_layers=size.double,
                num_single_layers=size.single,
                num_attention_heads=size.heads,
                attention_head_dim=size.head,
                joint_attention_dim=size.context,
                pooled_projection_dim=size.pooled,
                axes_dims_rope=size.rope,
                guidance_embeds=size.guidance,
            )
        finally:
            torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    side = round(size.image**0.5)
    ids = torch.zeros(size.image, 3)
    ids[:, 1], ids[:, 2] = torch.arange(size.image) // side, torch.arange(size.image) % side
    call = dict(
        hidden_states=draw(1, size.image, model.config.in_channels),
        encoder_hidden_states=draw(1, size.text, size.context),
        pooled_projections=draw(1, size.pooled),
        timestep=torch.tensor([0.5]).to(device, dtype),
        guidance=torch.tensor([3.5]).to(device, dtype) if size.guidance else None,
        img_ids=ids.to(device, dtype),
        txt_ids=torch.zeros(size.text, 3).to(device, dtype),
        return_dict=False,
    )
    assert set(call) <= set(inspect.signature(model.forward).parameters)
    return model.eval().requires_grad_(False), call


def make_spec(backend: str = "auto", outlier: str = "none", *more: str) -> RunSpec:
    """What a user gets who says `int8run model_type=flux backend=… outlier=…`."""
    overrides = [
        "model_type=flux",
        f"backend={backend}",
        f"outlier={outlier}",
        "tracker=none",
        "progress=false",
        *more,
    ]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        return create_run_spec(compose("config", overrides))


def make_family(model: nn.Module, layers: str) -> ModelFamily:
    """`family`: int8run's own rules for FLUX.

    `blocks`: every Linear inside the blocks, the modulation layers too.
    """
    own = make_spec().model_type
    if layers == "family":
        return own
    outside = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks." not in n
    ]
    return replace(own, ignore=[IgnoreRule(n, "outside the blocks") for n in outside])


def list_int8_layers(model: nn.Module, layers: str) -> list[str]:
    """Names of the Linears that become INT8, the same for every variant."""
    return [
        p.name
        for p in plan_layers(model, make_family(model, layers).find_skip_reason)
        if p.skip_reason is None
    ]


def quantize_with_int8run(
    model: nn.Module,
    call: Mapping[str, Any],
    layers: str,
    backend: str,
    outlier: str = "none",
    *more: str,
    without: Sequence[str] = (),
) -> nn.Module:
    """The INT8 copy as the runner makes it; it shares the float tensors.

    `without`: facts of the family that are left out.
    """
    rules = replace(make_family(model, layers), **dict.fromkeys(without, ()))
    plans = plan_layers(model, rules.find_skip_reason)
    loaded = LoadedModel(
        pipe=None,  # generates the images of a calibration; none is asked for here
        component="",
        denoiser=model,
        scheduler=None,
        family=rules,
        sampling=Sampling(),
        device=next(model.parameters()).device,
        source=ResolvedModel(Path(), (), False),
        checkpoint=None,
        encoders={},
    )
    chosen = [plan for plan in plans if plan.skip_reason is None]
    return quantize_denoiser(
        loaded,
        plans,
        select_quantization_settings(make_spec(backend, outlier, *more)),
        rows=count_layer_rows(model, chosen, [call]),
        prequantized=None,
        loras=LoraStack(model),
        progress=Progress(enabled=False),
    ).denoiser


def relative_error(y: Tensor, reference: Tensor) -> float:
    """|y - reference| / |reference|."""
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()
