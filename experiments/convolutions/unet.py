"""One step of a whole UNet of SD1.5's shape on the CPU: what INT8 reaches, and how fast it is beside float.

    python experiments/convolutions/unet.py              # 512x512
    python experiments/convolutions/unet.py --latent 32  # 256x256, a quarter of the work
    python experiments/convolutions/unet.py --errors     # what outlier methods bring, without times

Weights are random, so that nothing is said about images. Every step is timed in turn with the others.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from int8run import quantize_
from int8run.backends.attention import list_attention_backends
from int8run.backends.cpu import Cpu
from int8run.layers.int8_attention import install_attention
from int8run.layers.plan import LayerPlan
from int8run.metrics.layers import note_macs_shares
from int8run.pipeline.quantize_attention import count_step
from int8run.ptq.attention import give_backend, plan_traced
from int8run.quant.weight import sqnr_db
from int8run.utils.timing import time_in_turns

CPU = torch.device("cpu")
TEXT_TOKENS, TEXT_WIDTH = 77, 768
SMALL_WIDTHS = (32, 64, 64, 64)
METHODS = ("none", "convrot", "quarot")
LINEARS, CONVOLUTIONS, ALL = "INT8 Linears", "+ convolutions", "+ attention"


def build_unet(*, small: bool) -> UNet2DConditionModel:
    """SD1.5's: the defaults of the class but for the text's width, which is CLIP-L's.

    Args:
        small: with few channels.
    """
    torch.manual_seed(0)
    widths = {"block_out_channels": SMALL_WIDTHS} if small else {}
    unet = UNet2DConditionModel(cross_attention_dim=TEXT_WIDTH, sample_size=64, **widths).eval()
    return unet.requires_grad_(requires_grad=False)


def make_call(latent: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The arguments of one step for one image.

    Args:
        latent: pixels on a side of the latents.
        dtype: of latents and text.
    """
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(1, 4, latent, latent, generator=generator).to(dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(dtype),
    }


def quantize(unet: nn.Module, convolutions: str, outlier: str = "none") -> tuple[nn.Module, list[LayerPlan]]:
    """An INT8 copy, every layer INT8 that can be, and its plans.

    Args:
        unet: the float one.
        convolutions: as `int8.convolutions` takes it.
        outlier: method of all layers that it can take.
    """
    int8 = copy.deepcopy(unet)
    overrides = [f"int8.convolutions={convolutions}", "int8.small_batch_fallback=never"]
    plans = quantize_(int8, outlier=outlier, backend="cpu", model_type="sd15", overrides=overrides)
    return int8, plans


def add_attention(unet: nn.Module, int8: nn.Module, call: dict[str, Tensor]) -> list[LayerPlan]:
    """Make the attentions of an INT8 copy INT8.

    Args:
        unet: the float one, whose step shows them.
        int8: is changed.
        call: one step.

    Returns:
        A plan for each.
    """
    _, traced = count_step(unet, [call])
    planned = plan_traced(traced, lambda name: None)
    backend, *_ = list_attention_backends(Cpu(), CPU)
    give_backend(planned, backend, asked="cpu")
    layers = {p.plan.name: p.layer for p in planned if p.layer is not None}
    install_attention(int8, layers)
    return [p.plan for p in planned]


def measure_share(plans: Sequence[LayerPlan], macs: dict[str, int]) -> float:
    """The share of all multiply-adds that is INT8."""
    note_macs_shares(plans, macs)
    return sum(plan.macs_share or 0.0 for plan in plans if plan.skip_reason is None)


@torch.no_grad()
def measure(unet: nn.Module, latent: int, rounds: int) -> None:
    """Print a table of shares and times.

    Args:
        unet: the float one.
        latent: pixels on a side of the latents.
        rounds: timings of each step.
    """
    call = make_call(latent)
    macs, _ = count_step(unet, [call])
    linears, linear_plans = quantize(unet, "float")
    convolutions, conv_plans = quantize(unet, "int8")
    whole = copy.deepcopy(convolutions)
    attention_plans = add_attention(unet, whole, call)
    shares = {
        LINEARS: measure_share(linear_plans, macs),
        CONVOLUTIONS: measure_share(conv_plans, macs),
        ALL: measure_share([*conv_plans, *attention_plans], macs),
    }
    steps = {
        "float32": partial(unet, **call),
        "bfloat16": partial(copy.deepcopy(unet).bfloat16(), **make_call(latent, torch.bfloat16)),
        LINEARS: partial(linears, **call),
        CONVOLUTIONS: partial(convolutions, **call),
        ALL: partial(whole, **call),
    }
    times = time_in_turns(list(steps.values()), CPU, rounds)
    seconds = {name: statistics.median(values) for name, values in zip(steps, times, strict=True)}
    exact = unet(**call).sample
    print(f"{sum(macs.values()) / 1e9:.0f} GMAC, {torch.get_num_threads()} threads, medians of {rounds}")
    print(
        "| step | INT8, % of all multiply-adds | seconds | × float32 | × bfloat16 | SQNR of the output, dB |"
    )
    print("|---|---|---|---|---|---|")
    for name, step in steps.items():
        sqnr = sqnr_db(exact, step().sample)
        cells = [
            name,
            f"{100 * shares.get(name, 0.0):.1f}",
            f"{seconds[name]:.2f}",
            f"{seconds['float32'] / seconds[name]:.2f}",
            f"{seconds['bfloat16'] / seconds[name]:.2f}",
            "" if sqnr == math.inf else f"{sqnr:.1f}",
        ]
        print(f"| {' | '.join(cells)} |")


@torch.no_grad()
def draw_normal_weights(unet: nn.Module, *, scale_channels: bool) -> None:
    """Replace torch's uniform weights, which int8 holds best of all, by normal ones of the same size.

    Args:
        unet: is changed.
        scale_channels: whether GroupNorms scale their channels by a factor of e up or down.
    """
    generator = torch.Generator().manual_seed(2)
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            size = module.weight.std()
            module.weight.normal_(generator=generator).mul_(size)
        elif scale_channels and isinstance(module, nn.GroupNorm):
            module.weight.normal_(generator=generator).exp_()


@torch.no_grad()
def measure_errors(latent: int, *, small: bool) -> None:
    """Print what outlier methods bring: SQNRs of a step whose Linears and convolutions are INT8.

    Args:
        latent: pixels on a side of the latents.
        small: few channels.
    """
    call = make_call(latent)
    print(f"| weights | {' | '.join(METHODS)} |\n|---|---|---|---|")
    for weights in ("uniform", "normal", "normal, channels scaled"):
        unet = build_unet(small=small)
        if weights != "uniform":
            draw_normal_weights(unet, scale_channels="scaled" in weights)
        exact = unet(**call).sample
        cells = []
        for method in METHODS:
            int8, _ = quantize(unet, "int8", method)
            cells.append(f"{sqnr_db(exact, int8(**call).sample):.1f}")
        print(f"| {weights} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latent", type=int, default=64, help="pixels on a side of the latents")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="few channels, to try the script")
    parser.add_argument("--errors", action="store_true", help="SQNRs by outlier method, without times")
    arguments = parser.parse_args()
    if arguments.errors:
        measure_errors(arguments.latent, small=arguments.small)
        return
    measure(build_unet(small=arguments.small), arguments.latent, arguments.rounds)


if __name__ == "__main__":
    main()
