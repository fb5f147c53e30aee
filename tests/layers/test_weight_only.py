"""Layers with packed weights, compared with float64 products of the numbers that they stand for."""

import copy
from dataclasses import dataclass
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_close
from support.helpers import CPU, randn, shipped, usable
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from int8run.backends.reference import Reference
from int8run.kernels.dequantize.reference import E2M1, compute_swizzled_offsets
from int8run.layers import weight_only
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.block_int8_linear import BlockInt8Linear
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.weight_only import (
    PackedLayer,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    get_operators,
    is_rowwise,
    quantize_fp8,
    scaled_mm_unsupported_reason,
    to_quantized_weight,
)
from int8run.outlier.base import OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.outlier.quarot import QuaRot
from int8run.quant.packed_weight import PackedWeight

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
N, K = 35, 48
ABLE = [
    backend
    for backend in shipped("backend").values()
    if usable(backend, CPU) and hasattr(backend, "pack_weight")
]


@dataclass(frozen=True)
class Case:
    """A weight and what it stands for."""

    weight: PackedWeight
    numbers: torch.Tensor  # float64 [N, K]


def int_codes(rows, columns, low, high, seed=0):
    return torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=1):
    """Scales between 0.01 and 0.02."""
    return 0.01 + 0.01 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def fp8_codes(rows, columns, dtype):
    return randn(rows, columns, seed=2).to(dtype)


def times_scale(values, scale, height, width):
    """Each number times the scale of its block, in float64, by its own reading of `height` and `width`."""
    grid = scale.double().reshape(ceil(values.shape[0] / height), ceil(values.shape[1] / width))
    return (
        values.double()
        * grid.repeat_interleave(height, 0)[: values.shape[0]].repeat_interleave(width, 1)[
            :, : values.shape[1]
        ]
    )


def scaled(qdata, scale_shape, height, width, block=0, dtype=torch.float32):
    """An int8 or fp8 weight, its scales of some shape."""
    scale = positive(*scale_shape).to(dtype)
    return Case(
        PackedWeight(qdata, scale, tuple(qdata.shape), block_size=block),
        times_scale(qdata.float(), scale, height, width),
    )


def swizzle(scale):
    """Scales in rows -> in cuBLAS's tiles; the padding is NaN."""
    rows, columns = scale.shape
    padded = torch.full((ceil(rows / 128) * 128, ceil(columns / 4) * 4), 255, dtype=torch.uint8)
    padded.view(-1)[compute_swizzled_offsets(rows, columns)] = scale.view(torch.uint8)
    return padded


def mxfp8(rows, columns, swizzled, dtype=torch.uint8):
    """N and K padded to 32, the scales exponents of a power of two."""
    n, k = ceil(rows / 32) * 32, ceil(columns / 32) * 32
    qdata, exponents = fp8_codes(n, k, E4M3), int_codes(n, k // 32, 120, 126).to(torch.uint8)
    numbers = times_scale(qdata.float(), 2.0 ** (exponents.double() - 127), 1, 32)[:rows, :columns]
    scale = (swizzle(exponents) if swizzled else exponents).view(dtype)
    return Case(PackedWeight(qdata, scale, (rows, columns), is_swizzled=swizzled), numbers)


def nvfp4(rows, columns, swizzled, high_first, dtype=E4M3):
    """N and K padded to 16, two codes in a byte, scales of scales."""
    n, k = ceil(rows / 16) * 16, ceil(columns / 16) * 16
    qdata, scale, global_scale = (
        int_codes(n, k, 0, 16),
        randn(n, k // 16, seed=3).abs().to(E4M3),
        torch.tensor(0.037),
    )
    values = torch.tensor(E2M1, dtype=torch.float64)[qdata]
    even, odd = qdata[:, 0::2], qdata[:, 1::2]
    packed = ((even << 4 | odd) if high_first else (odd << 4 | even)).to(torch.uint8)
    numbers = times_scale(values, scale.double(), 1, 16)[:rows, :columns] * global_scale.double()
    kept = (swizzle(scale) if swizzled else scale.view(torch.uint8)).view(dtype)
    return Case(PackedWeight(packed, kept, (rows, columns), global_scale, 16, swizzled, high_first), numbers)


def int8(rows=N, columns=K):
    return int_codes(rows, columns, -128, 128).to(torch.int8)


CASES = {
    "int8 tensor": lambda: scaled(int8(), (), N, K),
    "int8 rows": lambda: scaled(int8(), (N, 1), 1, K),
    "int8 rows [N], bf16": lambda: scaled(int8(), (N,), 1, K, dtype=torch.bfloat16),
    "int8 grid": lambda: scaled(int8(48, K), (3, 3), 16, 16),
    "int8 grid, partial": lambda: scaled(int8(), (2, 3), 20, 20, block=20),
    "int8 grid, one column": lambda: scaled(int8(96, K), (2, 1), K, K),
    "int8 block3d": lambda: scaled(int8(), (N, 3, 1), 1, 16),
    "int8 groups, partial": lambda: scaled(int8(), (N, 3), 1, 20, block=20),
    "e4m3 tensor": lambda: scaled(fp8_codes(N, K, E4M3), (1,), N, K),
    "e4m3 rows": lambda: scaled(fp8_codes(N, K, E4M3), (N,), 1, K),
    "e4m3 grid": lambda: scaled(fp8_codes(N, K, E4M3), (3, 3), 16, 16, block=16),
    "e4m3 block3d": lambda: scaled(fp8_codes(N, K, E4M3), (N, 3, 1), 1, 16),
    "e5m2 rows": lambda: scaled(fp8_codes(N, K, E5M2), (N, 1), 1, K),
    "e4m3 cast": lambda: Case(
        PackedWeight(fp8_codes(N, K, E4M3), None, (N, K)), fp8_codes(N, K, E4M3).double()
    ),
    "e5m2 cast": lambda: Case(
        PackedWeight(fp8_codes(N, K, E5M2), None, (N, K)), fp8_codes(N, K, E5M2).double()
    ),
    "mxfp8": lambda: mxfp8(N, K, True),
    "mxfp8 in rows": lambda: mxfp8(N, K, False, torch.float8_e8m0fnu),
    "nvfp4": lambda: nvfp4(N, K - 2, True, True),
    "nvfp4 of modelopt": lambda: nvfp4(N, K, False, False, torch.uint8),
}
every_format = pytest.mark.parametrize("name", CASES)
# columns that share a scale
INT8_WIDTHS = {
    "int8 tensor": K,
    "int8 rows": K,
    "int8 rows [N], bf16": K,
    "int8 grid": 16,
    "int8 grid, partial": 20,
    "int8 grid, one column": K,
    "int8 block3d": 16,
    "int8 groups, partial": 20,
}
ROWWISE_FP8 = ["e4m3 tensor", "e4m3 rows", "e5m2 rows", "e4m3 cast", "e5m2 cast"]


def layer_of(case, bias=True, transform=None):
    return PackedLayer(
        case.weight, transform or OutlierTransform(), randn(case.weight.shape[0], seed=4) if bias else None
    )


def factor_of(columns):
    return OutlierTransform("smoothquant", factor=randn(columns, seed=5).abs() + 0.5)


class Largest(TorchDispatchMode):
    """Notes the most numbers that an operation made in a dtype of 2 bytes or more."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.itemsize > 1:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@every_format
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_product_is_that_of_the_numbers(name, bias):
    case = CASES[name]()
    layer, x = layer_of(case, bias), randn(2, 5, case.weight.shape[1])
    made = WeightOnlyLinear(layer, torch.float32)
    expected = x.double() @ case.numbers.T + (layer.bias.double() if bias else 0)

    assert_close(name, made(x), expected, 1e-6)
    assert torch.equal(WeightOnlyLinear(layer, torch.float32, "reference")(x), made(x))
    assert (made.out_features, made.in_features) == case.weight.shape == tuple(made.dequantize_weight().shape)


@every_format
def test_some_rows_at_a_time_give_the_same_numbers(name, monkeypatch):
    case = CASES[name]()
    whole, x = WeightOnlyLinear(layer_of(case), torch.float32), randn(3, case.weight.shape[1])
    numbers, y = whole.dequantize_weight(), whole(x)

    # what the file says, bit for bit: each number is rounded once
    assert torch.equal(numbers, case.numbers.float())

    monkeypatch.setitem(weight_only.MAX_FLOAT_NUMBERS, "cpu", 7 * K)
    pieces = [len(rows) for rows in whole.iter_float_rows(torch.float32)]

    assert sum(pieces) == len(numbers) and len(pieces) > 1
    assert torch.equal(whole.dequantize_weight(), numbers)
    assert_close(name, whole(x), y, 1e-6)


@pytest.mark.parametrize("name", ["int8 rows", "e4m3 grid", "e4m3 cast", "mxfp8", "nvfp4"])
def test_a_call_makes_floats_of_some_rows_only(name, monkeypatch):
    case = CASES[name]()
    layer, x = WeightOnlyLinear(layer_of(case), torch.bfloat16), randn(1, case.weight.shape[1])
    monkeypatch.setitem(weight_only.MAX_FLOAT_NUMBERS, "cpu", 4 * K)
    with Largest() as seen:
        layer(x)
    padded_columns = 64

    assert seen.numbers <= max(16 * padded_columns, 512), (
        "16 rows share a scale in a grid, 512 are a table of fp8 pairs"
    )

    with Largest() as seen:
        layer.dequantize_weight()

    assert seen.numbers == case.numbers.numel()


@every_format
def test_memory_is_that_of_the_file(name):
    case = CASES[name]()
    held = case.weight.unswizzle_scales().nbytes

    assert (
        sum(b.nbytes for b in WeightOnlyLinear(layer_of(case, bias=False), torch.bfloat16).buffers()) == held
    )
    assert (
        sum(b.nbytes for b in WeightOnlyEmbedding(case.weight, OutlierTransform(), torch.bfloat16).buffers())
        == held
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int8 rows", "e4m3 cast", "nvfp4"])
def test_half_precision(name, dtype):
    case = CASES[name]()
    layer = layer_of(case)
    made, x = WeightOnlyLinear(layer, dtype), randn(2, 3, case.weight.shape[1], dtype=dtype)

    assert torch.equal(made(x), F.linear(x, case.numbers.float().to(dtype), layer.bias.to(dtype)))
    # an input in another dtype is rounded to the layer's, and the result comes back in the input's
    assert made(x.float()).dtype == torch.float32 and torch.equal(made(x.float()), made(x).float())


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 1, 3, K)], ids=str)
@pytest.mark.parametrize("kind", ["dequantize", "scaled_mm", "blocks"])
def test_leading_dimensions(kind, shape):
    case = CASES["e4m3 rows" if kind == "scaled_mm" else "int8 block3d"]()
    layer = layer_of(case)
    made = (
        BlockInt8Linear(layer, Reference())
        if kind == "blocks"
        else WeightOnlyLinear(layer, torch.float32, "scaled_mm" if kind == "scaled_mm" else "eager")
    )
    x = randn(*shape)

    assert made(x).shape == (*shape[:-1], N)

    assert_close(kind, made(x), F.linear(x, case.numbers.float(), layer.bias), 0.05) if x.numel() else None


def test_no_rows_with_one_scale_for_all():
    assert WeightOnlyLinear(layer_of(CASES["e4m3 tensor"]()), torch.float32, "scaled_mm")(
        torch.zeros(0, K)
    ).shape == (0, N)


def test_rows_of_a_transposed_input_are_only_rows():
    layer, x = WeightOnlyLinear(layer_of(CASES["int8 rows"]()), torch.float32), randn(2, 3, K)
    # products of several threads may differ in their last bits
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int8 rows", "int8 block3d", "e4m3 rows"])
@pytest.mark.parametrize("method", ["convrot", "quarot", "factor"])
def test_transforms(name, method):
    case = CASES[name]()
    transform = {"convrot": ConvRot(16).fit, "quarot": QuaRot(16).fit, "factor": lambda w, s: factor_of(K)}[
        method
    ](case.numbers, None)
    plain = transform.restore_weight(case.numbers.float())

    assert not torch.allclose(plain, case.numbers.float())

    layer, x = layer_of(case, transform=transform), randn(3, K)
    expected = F.linear(x, plain, layer.bias)
    made = [
        WeightOnlyLinear(layer, torch.float32),
        *([BlockInt8Linear(layer, Reference())] if name.startswith("int8") else []),
    ]
    for module, limit in zip(made, (1e-5, 0.02), strict=False):
        assert_close(method, module(x), expected, limit)
        assert_close(method, module.dequantize_weight(), plain, 1e-6)
    embedding = WeightOnlyEmbedding(case.weight, transform, torch.float32)

    assert_close(method, embedding(torch.tensor([3, 0])), plain[[3, 0]], 1e-6)


def modules_of_each_kind():
    rows, blocks, fp8 = CASES["int8 rows"](), CASES["int8 grid"](), CASES["e4m3 grid"]()
    return [
        WeightOnlyLinear(layer_of(fp8, transform=factor_of(K)), torch.float32),
        WeightOnlyLinear(layer_of(CASES["e4m3 rows"]()), torch.float32, "scaled_mm"),
        WeightOnlyEmbedding(rows.weight, ConvRot(16).fit(rows.numbers), torch.float32),
        BlockInt8Linear(layer_of(blocks), Reference()),
    ]


def inputs_of(module):
    return torch.tensor([[3, 0], [3, 34]]) if isinstance(module, WeightOnlyEmbedding) else randn(2, K)


@pytest.mark.parametrize("which", range(4))
def test_moved_and_never_converted(which):
    layer = modules_of_each_kind()[which]
    x = inputs_of(layer)
    before, y = {name: b.clone() for name, b in layer.named_buffers()}, layer(x)
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(CPU, torch.float16),
    ):
        convert(nn.Sequential(layer))
        assert {n: b.dtype for n, b in layer.named_buffers()} == {n: b.dtype for n, b in before.items()}
        assert torch.equal(layer(x), y)
    moved = copy.deepcopy(layer).to(torch.device("meta"), torch.float16)

    assert {n: (b.device.type, b.dtype) for n, b in moved.named_buffers()} == {
        n: ("meta", b.dtype) for n, b in before.items()
    }


@pytest.mark.parametrize("which", range(4))
def test_copies(which):
    layer = modules_of_each_kind()[which]
    x = inputs_of(layer)
    shared = copy_sharing_tensors(layer)

    assert [b.data_ptr() for b in shared.buffers()] == [b.data_ptr() for b in layer.buffers()]
    assert torch.equal(shared(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("which", range(4))
def test_compiled_whole(which):
    layer = modules_of_each_kind()[which]
    x = inputs_of(layer)
    counter = CompileCounter()
    with torch.inference_mode():
        assert torch.equal(torch.compile(layer, backend=counter, fullgraph=True)(x), layer(x))

    assert counter.frame_count == 1

    torch._dynamo.reset()


def test_the_weight_has_no_dtype_for_those_who_ask():
    for module in modules_of_each_kind():
        assert module.weight is None and not isinstance(module.weight, torch.Tensor)
        assert "weight" not in dict(module.named_parameters()) and not list(module.parameters())


def test_they_say_what_they_are():
    assert [repr(m).split("\n")[1 if "\n" in repr(m) else 0].strip() for m in modules_of_each_kind()] == [
        "in_features=48, out_features=35, fp8, kernels=eager",
        "in_features=48, out_features=35, fp8, kernels=scaled_mm",
        "35, 48, int8",
        "in_features=48, out_features=48, block=16, backend=reference",
    ]


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_an_embedding(name, dtype):
    case = CASES[name]()
    table = nn.Embedding.from_pretrained(case.numbers.float().to(dtype), padding_idx=2)
    made = WeightOnlyEmbedding(case.weight, OutlierTransform(), dtype, padding_idx=2)

    assert (made.num_embeddings, made.embedding_dim, made.padding_idx) == (*case.weight.shape, 2)

    for index in (
        torch.tensor(34),
        torch.tensor([0]),
        torch.tensor([[34, 2, 2], [17, 0, 33]]),
        torch.tensor([1, 31], dtype=torch.int32),
    ):
        assert torch.equal(made(index), table(index)) and made(index).dtype == dtype


def test_an_embedding_makes_floats_of_the_rows_that_are_asked_for():
    case = scaled(int8(500, K), (500, 1), 1, K)
    layer = WeightOnlyEmbedding(case.weight, OutlierTransform(), torch.float32)
    with Largest() as seen:
        layer(torch.tensor([7, 7, 499]))

    assert seen.numbers == 3 * K


def test_an_embedding_with_a_factor():
    case = CASES["int8 rows"]()
    made = WeightOnlyEmbedding(case.weight, OutlierTransform(), torch.bfloat16, embed_scale=K**0.5)
    expected = case.numbers[[4, 9]].to(torch.bfloat16) * torch.tensor(K**0.5).to(torch.bfloat16)

    assert torch.equal(made(torch.tensor([4, 9])), expected)


def rounded_in_blocks(x, width):
    """Each row and block of columns rounded to 127 steps, in float64."""
    blocks = []
    for block in x.double().split(width, dim=1):
        scale = (block.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        blocks.append((block / scale).round() * scale)
    return torch.cat(blocks, dim=1)


@pytest.mark.parametrize("backend", ABLE, ids=lambda b: b.name)
@pytest.mark.parametrize("name", INT8_WIDTHS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_int8_in_blocks(name, backend, bias):
    case = CASES[name]()
    width = INT8_WIDTHS[name]
    layer, x = layer_of(case, bias), randn(2, 5, K) * torch.linspace(0.1, 30, K)
    made = BlockInt8Linear(layer, backend)
    expected = rounded_in_blocks(x.flatten(0, 1), width) @ case.numbers.T + (
        layer.bias.double() if bias else 0
    )

    assert_close(name, made(x).flatten(0, 1), expected, 1e-5)
    assert (made.block, made.in_features, made.out_features) == (width, *reversed(case.weight.shape))
    assert torch.equal(made.dequantize_weight(), case.numbers.float())

    y = made(x.to(torch.bfloat16))

    assert y.dtype == torch.bfloat16
    assert_close("bfloat16", y, made(x.to(torch.bfloat16).float()), 0.005)


def test_a_call_leaves_the_bias_as_it_is():
    layer = BlockInt8Linear(layer_of(CASES["int8 grid"]()), Reference())
    before = layer.bias.clone()
    for x in (randn(1, K), randn(K)):
        assert torch.equal(layer(x), layer(x))

    assert torch.equal(layer.bias, before)


def test_blocks_are_summed_in_float32():
    """Products of blocks that cancel up to a rest, which half precision does not hold beside them."""
    weight = PackedWeight(torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 2), (2, 8))
    layer = BlockInt8Linear(PackedLayer(weight, OutlierTransform(), None), Reference())
    assert layer(torch.tensor([[127, 127, 3, 0, -127, -127, -2, 0]], dtype=torch.bfloat16)).tolist() == [
        [1, 1]
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: WeightOnlyLinear(layer, torch.bfloat16),
        lambda layer: BlockInt8Linear(layer, Reference()),
    ],
)
def test_the_bias_of_a_half_precision_model_is_kept_in_float32(make):
    case = CASES["int8 rows"]()
    bias = nn.Parameter(randn(N, dtype=torch.bfloat16))
    made = make(PackedLayer(case.weight, OutlierTransform(), bias))

    assert (
        made.bias.dtype == torch.float32
        and torch.equal(made.bias, bias.float())
        and not made.bias.requires_grad
    )


@pytest.mark.parametrize("name", ["int8 tensor", "int8 rows", "int8 rows [N], bf16"])
def test_int8_weights_for_the_layer_with_a_scale_per_row(name):
    case = CASES[name]()
    weight = to_quantized_weight(case.weight)

    assert (
        weight.scale.shape == (N, 1) and weight.scale.dtype == torch.float32 and weight.scale.is_contiguous()
    )
    assert torch.equal(weight.dequantize(), case.numbers.float())

    layer, x = layer_of(case), randn(3, K)
    old = Int8Linear(QuantizedLayer(weight, layer.transform, layer.bias), Reference(), torch.float32)

    assert_close(name, BlockInt8Linear(layer, Reference())(x), old(x), 1e-6)


def test_block3d_with_one_block_is_rowwise():
    for shape, block in (((N, 1, 1), 0), ((N, 1, 1), 128), ((N, 1), 128)):
        weight = PackedWeight(int8(), positive(*shape), (N, K), block_size=block)
        assert is_rowwise(weight) and torch.equal(to_quantized_weight(weight).scale, positive(N, 1))


def test_one_block_scale_per_row_is_not_rowwise():
    assert not is_rowwise(mxfp8(N, 32, False).weight), "its scales are exponents"


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (lambda: CASES["int8 grid"]().weight, r"int8 with scales \[3, 3\]"),
        (lambda: CASES["int8 grid, one column"]().weight, r"int8 with scales \[2, 1\]"),
        # as many scales as rows, and yet a grid
        (lambda: scaled(int8(8, 16), (2, 4), 4, 4).weight, r"int8 with scales \[2, 4\]"),
        (lambda: PackedWeight(int8(), None, (N, K)), "int8 with scales None"),
        (lambda: CASES["e4m3 rows"]().weight, r"fp8 with scales \[35\]"),
        (lambda: CASES["e4m3 cast"]().weight, "fp8 with scales None"),
        (lambda: CASES["mxfp8"]().weight, "mxfp8 with scales"),
    ],
)
def test_other_weights_are_rejected_there(weight, found):
    with pytest.raises(
        ValueError, match=f"the weight is {found}.*; an INT8 layer takes int8 with one scale or one per row"
    ):
        to_quantized_weight(weight())


@pytest.mark.parametrize("name", ROWWISE_FP8)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_scaled_mm_is_the_product_of_two_fp8_matrices(name, bias):
    case = CASES[name]()

    assert scaled_mm_unsupported_reason(case.weight, CPU) is None

    layer, x = layer_of(case, bias), randn(6, K) * torch.linspace(0.01, 5, 6)[:, None]
    made = WeightOnlyLinear(layer, torch.float32, "scaled_mm")
    absmax = x.abs().amax(1, keepdim=True) if "rows" in name else x.abs().amax()
    steps = absmax / 448
    expected = (x / steps).to(E4M3).double() * steps.double() @ case.numbers.T + (
        layer.bias.double() if bias else 0
    )

    assert_close(name, made(x), expected, 1e-5)
    assert_close(name, made(x), F.linear(x, case.numbers.float(), layer.bias), 0.06)
    assert made(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(made.dequantize_weight(), case.numbers.float())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 32), (17, 31)])
def test_scaled_mm_fills_up_what_is_no_multiple_of_16(rows, columns, monkeypatch):
    seen = []
    product = torch._scaled_mm
    monkeypatch.setattr(
        torch,
        "_scaled_mm",
        lambda a, b, *rest, **options: seen.extend((a.shape, b.shape)) or product(a, b, *rest, **options),
    )
    case = scaled(fp8_codes(rows, columns, E4M3), (rows, 1), 1, columns)
    y = WeightOnlyLinear(layer_of(case), torch.float32, "scaled_mm")(randn(3, columns))

    assert y.shape == (3, rows)
    assert seen == [(3, ceil(columns / 16) * 16), (ceil(columns / 16) * 16, ceil(rows / 16) * 16)]


def test_rounding_to_e4m3():
    x = torch.tensor([[448.0, -17, 0.01, 0], [0, 0, 0, 0], [1e-30, 0, 0, 0], [3e38, -3e38, 1e38, 0]])
    q, scale = quantize_fp8(x, per_row=True)

    assert q[:2].float().tolist() == [[448, -16, 0.009765625, 0], [0, 0, 0, 0]] and scale[:2].tolist()[0] == [
        1
    ]
    assert (scale > 0).all() and q.float().isfinite().all() and (q.float() * scale).isfinite().all()

    q, scale = quantize_fp8(x[:2].to(torch.bfloat16), per_row=False)

    assert scale.shape == (1, 1) and q.float()[1].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("name", "device", "why"),
    [
        (
            "int8 rows",
            "cpu",
            "scaled_mm takes fp8 weights with one scale or one per output row, this one is int8",
        ),
        ("mxfp8", "cpu", "this one is mxfp8"),
        ("e4m3 grid", "cpu", "this one is fp8 with scales per block"),
        ("e4m3 block3d", "cpu", "this one is fp8 with scales per block"),
        ("e4m3 rows", "mps", "scaled_mm runs on cpu and cuda, not on mps"),
        ("e4m3 rows", "cuda", "scaled_mm needs compute capability 8.9, this GPU has 8.6"),
    ],
)
def test_what_scaled_mm_rejects(name, device, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert scaled_mm_unsupported_reason(CASES[name]().weight, torch.device(device)).endswith(why)


def test_scaled_mm_runs_on_gpus_with_fp8(monkeypatch):
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=capability: have)
        assert scaled_mm_unsupported_reason(CASES["e4m3 rows"]().weight, torch.device("cuda")) is None


def test_kernels_by_name():
    assert get_operators("eager").__name__.endswith("dequantize.eager") and get_operators(
        "scaled_mm"
    ) is get_operators("eager")
    assert get_operators("reference").__name__.endswith("dequantize.reference")

    pytest.importorskip("triton")

    assert get_operators("triton").__name__.endswith("dequantize.kernel")


def test_files_are_not_written_to():
    """Codes of a file may be pages of it: a layer holds them, and no call changes them."""
    for module in modules_of_each_kind():
        before = {name: b.clone() for name, b in module.named_buffers()}
        module(inputs_of(module)), module.dequantize_weight()
        assert all(
            torch.equal(b.view(torch.uint8), before[n].view(torch.uint8))
            for n, b in module.named_buffers()
            if b.dim()
        )
