"""A FluxTransformer2DModel with random weights, its input, and which of its layers become INT8."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.quantize_attention import count_step, plan_attentions
from int8run.pipeline.quantize_denoiser import quantize_denoiser
from int8run.pipeline.step_settings import select_attention_settings, select_quantization_settings
from int8run.pipeline.trace_layers import trace_layers
from int8run.report.console import Progress

Call = Mapping[str, Any]  # the arguments of the model's forward


@dataclass(frozen=True)
class Size:
    """How large a model and its input are.

    Args:
        double: blocks with streams of their own for image and text.
        single: blocks with one stream.
        heads: of each attention.
        head: width of a head; the hidden width is heads x head.
        image: tokens.
        text: tokens.
        context: width of a text token.
        pooled: width of the text's pooled embedding.
        rope: how a head's width is shared out among the axes of the positions.
        guidance: whether the model takes a guidance scale.
    """

    double: int
    single: int
    heads: int
    head: int
    image: int
    text: int
    context: int = 512
    pooled: int = 256
    rope: tuple[int, int, int] = (16, 24, 24)
    guidance: bool = False


FLUX_DEV = Size(  # FLUX.1-dev at 1024x1024
    double=19,
    single=38,
    heads=24,
    head=128,
    image=4096,
    text=512,
    context=4096,
    pooled=768,
    rope=(16, 56, 56),
    guidance=True,
)
SIZES = {
    "tiny": Size(double=1, single=1, heads=4, head=64, image=16, text=8),
    "mid": Size(double=4, single=8, heads=12, head=64, image=256, text=64),
    "big": Size(double=2, single=4, heads=24, head=64, image=1024, text=128),
    "full": FLUX_DEV,
}


def make_model(
    size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with random weights and one call of it, from fixed seeds."""
    torch.manual_seed(0)
    with torch.device(device), use_default_dtype(dtype):
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
    call = make_call(size, model.config.in_channels)
    assert set(call) <= set(inspect.signature(model.forward).parameters)
    for name, value in call.items():
        if isinstance(value, Tensor):
            call[name] = value.to(device, dtype)
    return model.eval().requires_grad_(False), call


def cast_model(
    model: nn.Module, call: dict[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """The same weights and call in another dtype."""
    cast_call = {}
    for name, value in call.items():
        cast_call[name] = value.to(dtype) if isinstance(value, Tensor) else value
    return model.to(dtype), cast_call


@contextmanager
def use_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let torch make float tensors in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_call(size: Size, channels: int) -> dict[str, Any]:
    """The arguments of one call, in float32 on the CPU, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    guidance = torch.tensor([3.5]) if size.guidance else None
    return dict(
        hidden_states=torch.randn(1, size.image, channels, generator=generator),
        encoder_hidden_states=torch.randn(1, size.text, size.context, generator=generator),
        pooled_projections=torch.randn(1, size.pooled, generator=generator),
        timestep=torch.tensor([0.5]),
        guidance=guidance,
        img_ids=make_image_ids(size.image),
        txt_ids=torch.zeros(size.text, 3),
        return_dict=False,
    )


def make_image_ids(tokens: int) -> Tensor:
    """Row and column of each token of a square image: [tokens, 3], the first axis is unused."""
    side = round(tokens**0.5)
    ids = torch.zeros(tokens, 3)
    ids[:, 1] = torch.arange(tokens) // side
    ids[:, 2] = torch.arange(tokens) % side
    return ids


def make_spec(backend: str = "auto", outlier: str = "none", *overrides: str) -> RunSpec:
    """What a user gets who says `int8run model_type=flux backend=… outlier=…`."""
    command = [
        "model_type=flux",
        f"backend={backend}",
        f"outlier={outlier}",
        "tracker=none",
        "progress=false",
        *overrides,
    ]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        return create_run_spec(compose("config", command))


def make_family(model: nn.Module, layers: str) -> ModelFamily:
    """The rules that say which Linears become INT8.

    Args:
        model: of which the Linears are.
        layers: `family`: int8run's own rules for FLUX; `blocks`: every Linear inside the blocks, the
            modulation layers too.
    """
    family = make_spec().model_type
    if layers == "family":
        return family
    ignore = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks." not in name:
            ignore.append(IgnoreRule(name, "outside the blocks"))
    return replace(family, ignore=ignore)


def list_int8_layers(model: nn.Module, layers: str) -> list[str]:
    """Names of the Linears that become INT8, the same for every variant."""
    plans = plan_layers(model, make_family(model, layers).find_skip_reason)
    return [plan.name for plan in plans if plan.skip_reason is None]


def quantize_with_int8run(
    model: nn.Module,
    call: Call,
    layers: str,
    backend: str,
    outlier: str = "none",
    *overrides: str,
    without: Sequence[str] = (),
) -> nn.Module:
    """The INT8 copy as the runner makes it; it shares the float tensors.

    Args:
        model: in float.
        call: of which each layer's number of rows is taken.
        layers: as `make_family` takes it.
        backend: option of `backend=`.
        outlier: option of `outlier=`.
        overrides: further settings.
        without: facts of the family that are left out, by the names of their fields.
    """
    family = replace(make_family(model, layers), **dict.fromkeys(without, ()))
    plans = plan_layers(model, family.find_skip_reason)
    int8_plans = [plan for plan in plans if plan.skip_reason is None]
    loaded = LoadedModel(
        pipe=None,  # generates the images of a calibration; none is asked for here
        component="",
        denoiser=model,
        scheduler=None,
        family=family,
        sampling=Sampling(),
        device=next(model.parameters()).device,
        source=ResolvedModel(Path(), (), False),
        checkpoint=None,
        encoders={},
    )
    spec = make_spec(backend, outlier, *overrides)
    _, traced_attentions = count_step(model, [call])
    attentions = plan_attentions(loaded, traced_attentions, select_attention_settings(spec), [call])
    quantized = quantize_denoiser(
        loaded,
        plans,
        replace(select_quantization_settings(spec), attentions=attentions.layers),
        traced=trace_layers(model, int8_plans, [call]),
        prequantized=None,
        loras=LoraStack(model),
        progress=Progress(enabled=False),
    )
    return quantized.denoiser


def relative_error(y: Tensor, reference: Tensor) -> float:
    """|y - reference| / |reference|."""
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()
