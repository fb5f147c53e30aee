"""GroupNorm and SiLU inside INT8 convolutions: which move, and that blocks compute what they did."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from support.helpers import CPU, randn
from torch import nn

from int8run.backends.base import Limits
from int8run.backends.convolution import ConvBackend, CpuConv, ReferenceConv
from int8run.layers.fused_group_norm import DeferredGroupNorm, NormWithSilu, SiluOfVectors, defer_norms
from int8run.layers.int8_conv import Int8Conv
from int8run.layers.int8_linear import QuantizedLayer
from int8run.models.family import load_families
from int8run.models.vae_layers import load_vae_layers
from int8run.outlier.base import fit_convolution
from int8run.outlier.none import NoOutlier
from int8run.quant.weight import quantize_weight, sqnr_db

RULES = load_vae_layers().deferred_norms


@dataclass(frozen=True)
class WithSilu(ReferenceConv):
    """Computes a SiLU and no norm, as on a GPU."""

    limits: ClassVar[Limits] = Limits(fuses_silu=True)


@dataclass(frozen=True)
class WithNorm(ReferenceConv):
    """Computes both, as on a CPU."""

    limits: ClassVar[Limits] = Limits(fuses_silu=True, fuses_norm=True)


REFUSED = CpuConv.limits.unsupported_reasons(CPU)
BACKENDS = [
    pytest.param(WithSilu(), id="a SiLU"),
    pytest.param(WithNorm(), id="both"),
    pytest.param(
        CpuConv(),
        id="the CPU's",
        marks=pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
    ),
]


def make_int8(conv: nn.Conv2d, backend: ConvBackend) -> Int8Conv:
    weight = conv.weight.detach().flatten(1)
    transform = fit_convolution(NoOutlier(), weight, conv.weight[0, 0].numel())
    return Int8Conv(
        QuantizedLayer(quantize_weight(weight), transform, conv.bias), backend, conv, torch.float32
    )


def make_block(backend: ConvBackend, names=("conv1", "conv2"), **options) -> ResnetBlock2D:
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=6, groups=4, **options)
    block.requires_grad_(False).eval()
    for norm in (block.norm1, block.norm2):
        norm.weight.normal_()
        norm.bias.normal_()
    for name in names:
        setattr(block, name, make_int8(getattr(block, name), backend))
    return block


def call(block: ResnetBlock2D) -> torch.Tensor:
    # an image and an embedding of the time, which go through the same activation
    return block(2 * randn(2, 8, 6, 5) + 1, randn(2, 6, seed=1))


def wrap(block: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"block": block})


@pytest.mark.parametrize("names", [("conv1", "conv2"), ("conv1",), ("conv2",)], ids=" ".join)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_block_computes_what_it_did(backend, names):
    block = make_block(backend, names)
    expected, state = call(block), set(block.state_dict())

    assert defer_norms(wrap(block), RULES) == len(names)

    assert sqnr_db(expected, call(block)) > 45
    assert set(block.state_dict()) == state
    assert isinstance(block.nonlinearity, SiluOfVectors)
    for norm, conv in ((block.norm1, "conv1"), (block.norm2, "conv2")):
        if conv not in names:
            assert type(norm) is NormWithSilu
        elif backend.limits.fuses_norm:
            assert type(norm) is DeferredGroupNorm
        else:
            assert type(norm) is nn.GroupNorm


@torch.no_grad()
def test_a_copy_of_a_block_reads_its_own_norm():
    block = make_block(WithNorm())
    defer_norms(wrap(block), RULES)
    expected, copied = call(block), copy.deepcopy(block)

    copied.norm1.weight.zero_()

    assert torch.equal(call(block), expected)
    assert copied.conv1.deferred.norm is copied.norm1


@torch.no_grad()
def test_a_branch_reads_what_the_convolution_reads():
    blocks = [make_block(WithNorm()) for _ in range(2)]
    for block in blocks:
        branch = block.conv1.make_branch([(randn(3, 72, seed=1), randn(12, 3, seed=2))])
        branch.set_strengths([0.5])
        block.conv1.set_adapter(branch)
    defer_norms(wrap(blocks[1]), RULES)

    assert sqnr_db(*map(call, blocks)) > 45


@torch.no_grad()
def test_a_layer_that_is_measured_alone_gets_what_the_float_one_got():
    block = make_block(WithNorm())
    x = randn(1, 8, 4, 4)
    expected = block.conv1(x)
    defer_norms(wrap(block), RULES)

    assert torch.equal(block.conv1.forward_isolated(x), expected)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        (ReferenceConv(), {}),
        (WithNorm(), {"non_linearity": "gelu"}),
        (WithNorm(), {"up": True}),
        (WithNorm(), {"down": True}),
        (WithNorm(), {"time_embedding_norm": "scale_shift"}),
    ],
    ids=["a backend without", "another activation", "up", "down", "between"],
)
@torch.no_grad()
def test_blocks_that_differ_stay_as_they_are(backend, options):
    block = make_block(backend, **options)
    before = [type(module) for module in block.modules()]

    assert defer_norms(wrap(block), RULES) == 0
    assert [type(module) for module in block.modules()] == before


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_residual_block_of_a_unet_is_named(family):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
        )
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        for name in ("conv1", "conv2"):
            setattr(block, name, make_int8(nn.Conv2d(1, 1, 1), WithNorm()))

    assert defer_norms(unet, load_families()[family].deferred_norms) == 2 * len(blocks)
