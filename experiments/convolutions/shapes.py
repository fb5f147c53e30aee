"""The convolutions that are measured: of UNets at full size, and the trained ones of the tiny model's VAE."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from int8run.utils.paths import to_local_path

MODELS = Path(__file__).parents[1] / "families" / "models.yaml"
UNETS = ("SD1.5", "SDXL")
FEWEST_CHANNELS = 16  # in and out: the first and the last layer of a UNet stay float
AFTER_SILU = ("conv1", "conv2", "conv_out")  # names of modules that follow GroupNorm and SiLU
PROMPTS = ("red apple", "fox")
NORM_GROUPS = 32


@dataclass(frozen=True)
class ConvShape:
    """A convolution of one image."""

    channels: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    after_silu: bool

    @property
    def multiply_adds(self) -> int:
        """Of one image."""
        rows = (self.height + 2 * self.padding[0] - self.kernel[0]) // self.stride[0] + 1
        columns = (self.width + 2 * self.padding[1] - self.kernel[1]) // self.stride[1] + 1
        return rows * columns * self.outputs * self.channels * math.prod(self.kernel)

    @property
    def name(self) -> str:
        """In a word or two."""
        text = (
            f"{self.kernel[0]}x{self.kernel[1]} {self.channels} to {self.outputs}, {self.height}x{self.width}"
        )
        if self.stride[0] > 1:
            text += f", stride {self.stride[0]}"
        return text if self.after_silu else f"{text}, no SiLU"


@dataclass(frozen=True)
class ConvCase:
    """A convolution with what it receives."""

    source: str
    name: str
    x: Tensor  # [B, C, H, W]
    weight: Tensor  # [O, C, kH, kW]
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float convolution of another input by another weight."""
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def list_shapes(model: str) -> Counter[ConvShape]:
    """Every convolution of one step of a UNet but the first and the last, with how often it occurs.

    Of one image; nothing is computed.
    """
    found = next(entry for entry in yaml.safe_load(MODELS.read_text()) if entry["model"] == model)
    shapes: Counter[ConvShape] = Counter()
    with torch.device("meta"):
        unet = getattr(diffusers, found["class"])(**found["config"])

        def watch(name: str, conv: nn.Conv2d) -> None:
            def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if min(conv.in_channels, conv.out_channels) < FEWEST_CHANNELS:
                    return
                shapes[describe(name, conv, inputs[0])] += 1

            conv.register_forward_hook(count)

        for name, module in unet.named_modules():
            if isinstance(module, nn.Conv2d):
                watch(name, module)
        unet(**make_inputs(found["inputs"]))
    return shapes


def describe(name: str, conv: nn.Conv2d, x: Tensor) -> ConvShape:
    """The shape of a module that receives x: [B, C, H, W]."""
    return ConvShape(
        channels=conv.in_channels,
        outputs=conv.out_channels,
        height=x.shape[2],
        width=x.shape[3],
        kernel=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=tuple(conv.padding),
        after_silu=name.rpartition(".")[2] in AFTER_SILU,
    )


def make_inputs(entries: dict[str, Any]) -> dict[str, Any]:
    """Tensors of the sizes that models.yaml gives as `1x4x64x64`."""
    made: dict[str, Any] = {}
    for name, size in entries.items():
        if isinstance(size, dict):
            made[name] = make_inputs(size)
        else:
            made[name] = torch.empty([int(length) for length in size.split("x")])
    return made


def make_case(source: str, shape: ConvShape, seed: int = 0) -> ConvCase:
    """A convolution with random weights, and an input like those that UNets have there.

    Channels differ in size, as those of trained models do: by a factor of e up or down in most of them.
    GroupNorm with random scales and shifts follows, and then SiLU where the shape says so.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    channels = shape.channels
    x = draw(1, channels, shape.height, shape.width) * draw(1, channels, 1, 1).exp()
    if channels % NORM_GROUPS == 0:
        x = F.group_norm(x, NORM_GROUPS, 0.5 + draw(channels).abs(), 0.3 * draw(channels))
    if shape.after_silu:
        x = F.silu(x)
    inputs = channels * math.prod(shape.kernel)
    weight = draw(shape.outputs, channels, *shape.kernel) / inputs**0.5
    return ConvCase(source, shape.name, x, weight, draw(shape.outputs), shape.stride, shape.padding)


@torch.no_grad()
def read_tiny_vae(steps: int = 8) -> Iterator[ConvCase]:
    """Every convolution of the shipped tiny model's decoder, with what it receives from two drawings."""
    pipe = diffusers.FluxPipeline.from_pretrained(to_local_path("shipped:tiny"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    received: dict[str, Tensor] = {}
    decoder = pipe.vae.decoder

    def watch(name: str, conv: nn.Conv2d) -> None:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            received[name] = inputs[0].clone()

        conv.register_forward_pre_hook(record)

    convs = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Conv2d)}
    for name, conv in convs.items():
        watch(name, conv)
    generator = torch.Generator().manual_seed(0)
    sizes = {"height": 64, "width": 64, "max_sequence_length": 16}
    pipe(list(PROMPTS), num_inference_steps=steps, generator=generator, **sizes)
    for name, conv in convs.items():
        trained = copy.deepcopy(conv)
        yield ConvCase(
            source="tiny VAE",
            name=name,
            x=received[name],
            weight=trained.weight.data,
            bias=None if trained.bias is None else trained.bias.data,
            stride=tuple(conv.stride),
            padding=tuple(conv.padding),
        )
