"""Cases for test_triton_backend.py, which runs this file in a process of its own."""

from dataclasses import replace

import pytest
import torch
from support.compare import assert_close
from support.helpers import randn
from support.triton_process import case_device
from torch import nn

from int8run.backends.attention import AttentionMethod, TritonAttention
from int8run.backends.base import run_plain_layer
from int8run.backends.convolution import ConvCall, ConvGeometry, TritonConv
from int8run.backends.grouped_tuning import GroupedProbe, find_difference
from int8run.backends.reference import Reference
from int8run.backends.triton import Triton
from int8run.kernels.grouped_weight.reference import pack_codes
from int8run.kernels.hadamard.reference import Rotation, sylvester_hadamard
from int8run.kernels.int8_linear.tile import BUCKETS, Tile
from int8run.layers.fusion import share_inputs
from int8run.layers.grouped_int8_linear import make_int8_linear
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.weight import quantize_weight
from int8run.utils.attention_call import AttentionCall
from int8run.utils.hardware import get_gpu_architecture

DEVICE = case_device()
BACKEND = Triton(tile=Tile(32, 32, 64, 1, 4, 2))
ARCHITECTURE = "sm_90" if DEVICE.type == "cpu" else get_gpu_architecture(DEVICE)
K, N = 384, 72  # ConvRot takes groups of 64, QuaRot of 128


def layer(backend, outlier):
    weight = randn(N, K, seed=1).to(DEVICE)
    transform = outlier.fit(weight).to(DEVICE)
    quantized = QuantizedLayer(
        quantize_weight(transform.transform_weight(weight)), transform, randn(N, seed=2).to(DEVICE)
    )
    return Int8Linear(quantized, backend, torch.float32)


def branch_on(module, rank, strengths):
    parts = [
        (randn(rank, K, seed=s) / K**0.5, 0.5 * randn(N, rank, seed=s + 1))
        for s in range(3, 3 + 2 * len(strengths), 2)
    ]
    branch = LowRankBranch(parts, torch.float32, DEVICE)
    branch.fuse_into_backend(module.backend, module.transform)
    branch.set_strengths(strengths)
    module.adapter = branch
    return module


@pytest.mark.parametrize("gelu_from", [None, 0, 100])
@pytest.mark.parametrize("outlier", [NoOutlier(), ConvRot(), QuaRot()], ids=lambda m: m.name)
def test_the_layer_is_the_reference_layer(outlier, gelu_from):
    x, ours, theirs = randn(2, 9, K).to(DEVICE), layer(BACKEND, outlier), layer(Reference(), outlier)
    ours.gelu_from = theirs.gelu_from = gelu_from
    assert_close("layer", ours(x), theirs(x), 2e-3)


def test_gelu_factor_and_sylvesters_rotation_together():
    x, factor = randn(9, K).to(DEVICE), (randn(K, seed=1).abs() + 0.5).to(DEVICE)
    rotation = Rotation(sylvester_hadamard(128).to(DEVICE), sylvester=True)
    ours, theirs = (
        backend.quantize(x, factor=factor, rotation=rotation, gelu_from=100)
        for backend in (BACKEND, Reference())
    )

    assert_close("rows", ours.q * ours.scale, theirs.q * theirs.scale, 2e-3)


@pytest.mark.parametrize("outlier", [NoOutlier(), ConvRot(), QuaRot()], ids=lambda m: m.name)
def test_a_fused_branch_is_the_branch_beside_the_product(outlier):
    x = randn(9, K).to(DEVICE)
    ours, theirs = (branch_on(layer(b, outlier), 5, [0.8, -0.3]) for b in (BACKEND, Reference()))

    assert ours.adapter.fused is not None and theirs.adapter.fused is None
    assert ours.adapter.fused.down.shape == (16, K), "ranks are filled up to 16"
    assert_close("layer", ours(x), theirs(x), 2e-3)


def test_strength_0_is_no_branch_to_the_bit_in_compiled_code_too():
    x = randn(9, K).to(DEVICE)
    adapted = branch_on(layer(BACKEND, NoOutlier()), 5, [1.0])
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert_close("compiled", compiled(x), adapted(x), 1e-6)
        adapted.adapter.set_strengths([0.0])
        assert torch.equal(compiled(x), layer(BACKEND, NoOutlier())(x))
        adapted.adapter.set_strengths([-2.0])
        assert_close("another strength", compiled(x), adapted(x), 1e-6)


def test_a_rank_beyond_the_registers_is_left_beside_the_product():
    x, adapted = randn(4, K).to(DEVICE), branch_on(layer(BACKEND, NoOutlier()), 257, [1.0])
    assert adapted.adapter.fused is None
    assert_close("layer", adapted(x), branch_on(layer(Reference(), NoOutlier()), 257, [1.0])(x), 2e-3)


@pytest.mark.parametrize("outlier", [NoOutlier(), ConvRot()], ids=lambda m: m.name)
def test_layers_that_share_an_input_multiply_their_branches_together(outlier):
    # h of each layer is then some columns of a wider matrix
    x, alone, together = randn(9, K).to(DEVICE), [], nn.ModuleDict()
    for i, rank in enumerate((5, 20, 16)):
        alone.append(branch_on(layer(BACKEND, outlier), rank, [0.8 - i]))
        together[f"l{i}"] = branch_on(layer(BACKEND, outlier), rank, [0.8 - i])
    model = nn.ModuleDict({"block": together})

    assert share_inputs(model, [["l0", "l1", "l2"]]) == 2
    assert [joint.get_down().shape[0] for joint in together["l0"].shared.joints] == [16 + 32 + 16]
    for i, plain in enumerate(alone):
        assert_close("layer", together[f"l{i}"](x), plain(x), 1e-5)


def make_grouped_weight(bits, scale_dtype, codebook=None):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    largest = 1 if codebook is not None else 2 ** (bits - 1)
    group_scale = (torch.rand(N, K // 16, generator=generator) * 127 / largest).to(scale_dtype)
    weight = GroupedWeight(
        codes=pack_codes(codes, bits).to(DEVICE),
        group_scale=group_scale.to(DEVICE),
        scale=(randn(N, 1, seed=5).abs() / 100).to(DEVICE),
        bits=bits,
        codebook=None if codebook is None else codebook.to(DEVICE),
    )
    assert BACKEND.unsupported_group_reasons(weight) == []
    return weight


@pytest.mark.parametrize("scale_dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [4, 6])
def test_a_grouped_weight_is_multiplied_as_the_int8_weight_that_it_decodes_to(bits, scale_dtype):
    codebook = torch.linspace(-0.98, 0.97, 16) ** 3 if bits == 4 else None
    weight = make_grouped_weight(bits, scale_dtype, codebook)
    packed, decoded = BACKEND.pack_grouped_weight(weight), BACKEND.pack_weight(weight.decode())
    w_scale, bias = weight.scale[:, 0].contiguous(), randn(N, seed=2).to(DEVICE)
    branch = BACKEND.fuse_branch(randn(5, K, seed=3), randn(N, 5, seed=4), torch.float32)
    branch = branch._replace(down=branch.down.to(DEVICE), up=branch.up.to(DEVICE))
    strengths = torch.full((5,), 0.5, device=DEVICE)
    for rows in (1, 40):
        x = BACKEND.quantize(randn(rows, K).to(DEVICE), down=branch.down)
        options = {"dtype": torch.float32, "bias": bias, "branch": branch, "strengths": strengths}
        ours = BACKEND.grouped_linear(x, packed, w_scale, **options)
        expected = BACKEND.linear(x, decoded, w_scale, **options)
        assert_close("y", ours, expected, 1e-6)
        # what a tuner may choose: decoded first
        ahead = replace(BACKEND)
        ahead.pack_grouped_weight(weight)
        ahead.grouped_tiles.update(dict.fromkeys(ahead.grouped_tiles, (None,) * len(BUCKETS)))
        assert torch.equal(ahead.grouped_linear(x, packed, w_scale, **options), expected)


def test_a_layer_whose_tiles_are_looked_up_compiles_to_one_graph(monkeypatch, tmp_path):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    adapted = layer(Triton(table=str(tmp_path / "choices.json")), NoOutlier())
    if DEVICE.type == "cpu":
        _ = adapted.backend.kernels  # on a GPU they are imported when a weight is packed
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True, dynamic=True)

    for rows in (9, 40):
        x = randn(rows, K).to(DEVICE)
        with torch.no_grad():
            assert_close("compiled", compiled(x), adapted(x), 1e-6)


@pytest.mark.parametrize("bits", [4, 6])
def test_a_layer_of_few_bits_decodes_in_its_product_in_compiled_code_too(bits):
    weight = make_grouped_weight(bits, torch.float8_e4m3fn)
    transform = NoOutlier().fit(randn(N, K)).to(DEVICE)
    ours, theirs = (
        make_int8_linear(
            QuantizedLayer(weight, transform, randn(N, seed=2).to(DEVICE)), backend, torch.float32
        )
        for backend in (BACKEND, Reference())
    )
    branch_on(ours, 5, [0.8])
    branch_on(theirs, 5, [0.8])
    assert ours.multiplier is BACKEND and ours.adapter.fused is not None
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)

    for rows in (9, 40):
        x = randn(rows, K).to(DEVICE)
        assert_close("layer", ours(x), theirs(x), 2e-3)
        with torch.no_grad():
            assert_close("compiled", compiled(x), ours(x), 1e-6)
    assert torch.equal(ours.read_qdata(), weight.decode().qdata)


@pytest.mark.parametrize("choice", [Tile(16, 32, 128, 1, 4, 2), None], ids=["tile", "ahead"])
@pytest.mark.parametrize("bits", [4, 6])
def test_a_choice_of_the_tuner_computes_what_the_definition_does(bits, choice):
    probe = GroupedProbe(Triton(tile=Tile(16, 32, 128, 1, 4, 2)), choice, bits)
    assert find_difference(probe, (5, 160, 40), DEVICE) is None


@pytest.mark.parametrize("scale_dtype", [torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [4, 6])
def test_a_grouped_weight_comes_back_to_the_bit(bits, scale_dtype):
    weight = make_grouped_weight(bits, scale_dtype)
    codes, group_scale = BACKEND.unpack_grouped_weight(BACKEND.pack_grouped_weight(weight), (N, K))

    assert torch.equal(codes, weight.codes)
    assert group_scale.dtype == scale_dtype
    assert torch.equal(group_scale.float(), weight.group_scale.float())


def test_no_rows():
    assert layer(BACKEND, NoOutlier())(torch.zeros(0, K, device=DEVICE)).shape == (0, N)
    weight = make_grouped_weight(4, torch.float8_e4m3fn)
    x, packed = BACKEND.quantize(torch.zeros(0, K, device=DEVICE)), BACKEND.pack_grouped_weight(weight)
    assert BACKEND.grouped_linear(x, packed, weight.scale[:, 0], dtype=torch.float16).shape == (0, N)


def test_one_input_column():
    weight = quantize_weight(randn(5, 1).to(DEVICE))
    x, scale = randn(3, 1).to(DEVICE), weight.scale[:, 0].contiguous()
    assert_close(
        "y",
        run_plain_layer(BACKEND, x, BACKEND.pack_weight(weight), scale, None),
        run_plain_layer(Reference(), x, weight.qdata, scale, None),
        1e-6,
    )


def test_an_input_in_another_dtype_than_the_model():
    x, adapted = randn(9, K).to(DEVICE), branch_on(layer(BACKEND, NoOutlier()), 5, [1.0])
    half = adapted(x.to(torch.float16))

    assert half.dtype == torch.float16
    assert_close("layer", half.float(), adapted(x), 5e-3)


def test_compiled_attention_and_convolutions_are_the_eager_ones():
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups=1)
    weight = quantize_weight(randn(16, 8 * 9, seed=1).to(DEVICE))
    convolution, attention = TritonConv(ARCHITECTURE), TritonAttention(ARCHITECTURE)
    packed = convolution.pack_weight(weight, (16, 8, 3, 3), 1)

    def run(x):
        call = ConvCall(x, packed, weight.scale[:, 0].contiguous(), None, geometry)
        tokens = convolution.convolve(call).flatten(2)
        heads = tokens.mT.unflatten(2, (1, 16)).transpose(1, 2)  # [B, 1, pixels, 16]
        return attention.attend(AttentionCall(heads, heads, heads), AttentionMethod(rotation=16))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for height in (5, 7):
        x = randn(1, 8, height, 4, seed=2).to(DEVICE)
        assert torch.equal(compiled(x), run(x))
