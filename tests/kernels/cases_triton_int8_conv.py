"""Cases for test_triton_int8_conv.py, which runs this file in a process of its own."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_close
from support.helpers import full_range, randn
from support.triton_process import case_device
from torch import Tensor

from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.kernels.int8_conv.kernel import int8_conv, pack_weight, unpack_weight
from int8run.kernels.int8_conv.reference import int8_conv as reference
from int8run.kernels.int8_conv.tile import choose_conv_tile
from int8run.kernels.int8_linear.tile import ARCHITECTURES, BUCKETS, Tile

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = case_device()
ON_GPU = DEVICE.type == "cuda"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SMALL = Tile(16, 32, 32, 1, 1, 2)
ROUNDING = {FULL: 1e-5, HALF: 1e-3, BRAIN: 4e-3}


@dataclass(frozen=True)
class Conv:
    """One convolution.

    Args:
        image: sizes of the input, (T,) H, W.
        kernel: taps in each dimension.
        channels: of the input.
        channels_out: of the output.
        batch: B.
        options: of the call.
    """

    image: tuple[int, ...] = (6, 5)
    kernel: tuple[int, ...] = (3, 3)
    channels: int = 40
    channels_out: int = 33
    batch: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.channels_out, self.channels // self.options.get("groups", 1), *self.kernel)


def make_inputs(conv: Conv, dtype: torch.dtype = FULL) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with pixels of different sizes, weight, its scales, bias."""
    x = randn(conv.batch, conv.channels, *conv.image) * randn(conv.batch, 1, *conv.image, seed=1).exp()
    w_scale = (randn(conv.channels_out, seed=3).abs() + 0.1) / 1000
    tensors = (x, full_range(*conv.kernel_shape, seed=2), w_scale, randn(conv.channels_out, seed=4))
    x, *rest = (tensor.to(DEVICE) for tensor in tensors)
    return x.to(dtype), *rest


def convolve(conv: Conv, inputs: tuple[Tensor, ...], tile: Tile = SMALL) -> Tensor:
    """The Triton version."""
    x, qdata, w_scale, bias = inputs
    packed = pack_weight(qdata)
    return int8_conv(x, packed, w_scale, bias, kernel_shape=conv.kernel_shape, tile=tile, **conv.options)


def assert_right(conv: Conv, dtype: torch.dtype = FULL) -> None:
    """Compare with the definition."""
    inputs = make_inputs(conv, dtype)
    y = convolve(conv, inputs)
    assert y.dtype == dtype
    assert_close("y", y, reference(*inputs, **conv.options), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
def test_a_convolution_equals_the_definition_in_every_dtype(dtype: torch.dtype) -> None:
    assert_right(Conv(options={"padding": 1}), dtype)


@pytest.mark.parametrize(
    "conv",
    [
        Conv(kernel=(1, 1), batch=2),
        Conv(options={"stride": 2, "padding": 1}),
        Conv(options={"stride": (1, 2), "padding": (2, 0)}),
        Conv(image=(1, 1), options={"padding": 1}),
        Conv(image=(7, 3), kernel=(5, 2), channels=3, channels_out=1),
        Conv(channels=64, channels_out=64, options={"padding": 1, "groups": 2}),
        Conv(channels=6, channels_out=12, options={"groups": 3}),
        Conv(image=(3, 4, 4), kernel=(3, 3, 3), channels=32, options={"padding": 1}),
        Conv(image=(5, 3, 2), kernel=(3, 1, 1), batch=2, options={"padding": (1, 0, 0), "stride": (2, 1, 1)}),
        Conv(channels=300, kernel=(1, 1)),
    ],
    ids=str,
)
def test_windows_groups_and_videos_equal_the_definition(conv: Conv) -> None:
    assert_right(conv)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    "rotation",
    [
        None,
        Rotation(regular_hadamard(16)),
        Rotation(sylvester_hadamard(32), sylvester=True),
        Rotation(sylvester_hadamard(128), sylvester=True),
        Rotation(regular_hadamard(256)),
    ],
    ids=lambda rotation: "none" if rotation is None else str(rotation.group),
)
def test_what_comes_before_rounding_equals_the_definition(rotation: Rotation | None, silu: bool) -> None:
    if rotation is not None:
        rotation = rotation._replace(matrix=rotation.matrix.to(DEVICE))
    assert_right(
        Conv(image=(3, 2), kernel=(1, 1), channels=256, options={"rotation": rotation, "silu": silu})
    )


def test_a_missing_bias_is_zero() -> None:
    conv = Conv()
    x, qdata, w_scale, _ = make_inputs(conv)
    assert_close("y", convolve(conv, (x, qdata, w_scale, None)), reference(x, qdata, w_scale, None), 1e-5)


def test_strides_change_nothing() -> None:
    conv = Conv(batch=2, options={"padding": 1})
    x, *rest = make_inputs(conv)
    expected = convolve(conv, (x, *rest))
    last = x.to(memory_format=torch.channels_last)
    part = F.pad(x, (1, 1))[..., 1:-1]

    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(conv, (last, *rest)), expected)
    assert torch.equal(convolve(conv, (part, *rest)), expected)


def test_nan_reaches_the_pixels_that_see_it() -> None:
    conv = Conv(options={"padding": 1})
    x, *rest = make_inputs(conv)
    x[0, 7, 2, 2] = float("nan")
    is_finite = convolve(conv, (x, *rest)).isfinite()

    expected = torch.ones(6, 5, dtype=torch.bool)
    expected[1:4, 1:4] = False
    assert torch.equal(is_finite.all(1)[0].cpu(), expected)
    assert torch.equal(is_finite.any(1)[0].cpu(), expected)


def test_no_batch_has_no_output() -> None:
    conv = Conv(batch=0)
    assert convolve(conv, make_inputs(conv)).shape == (0, 33, 4, 3)


@pytest.mark.parametrize("shape", [(5, 3, 2, 3), (16, 64, 3, 3), (2, 7, 3, 1, 2)], ids=str)
def test_a_packed_weight_comes_back(shape: tuple[int, ...]) -> None:
    qdata = full_range(*shape)
    packed = pack_weight(qdata)

    assert packed.shape[1] % 16 == 0
    assert torch.equal(unpack_weight(packed, shape), qdata)


# -- exact results -----------------------------------------------------------------------------------------


def list_tiles() -> list[Tile]:
    """Every tile that some architecture starts with, each once."""
    tiles = [choose_conv_tile(name, rows) for name in ARCHITECTURES for rows in BUCKETS]
    return list(dict.fromkeys(tiles))


@pytest.mark.parametrize("tile", list_tiles() if ON_GPU else [SMALL], ids=str)
@pytest.mark.parametrize("channels", [320, 200] if ON_GPU else [32, 20])
def test_whole_numbers_give_exact_results(channels: int, tile: Tile) -> None:
    sizes = (31, 33) if ON_GPU else (5, 4)
    conv = Conv(
        image=sizes, channels=channels, channels_out=channels, batch=2, options={"padding": 1, "stride": 2}
    )
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(-127, 128, (2, channels, *sizes), generator=generator).float()
    x[:, 0], x[:, 1] = 127, -127  # so that the scale of each pixel is 1 and its center 0
    qdata = torch.randint(-3, 4, conv.kernel_shape, generator=generator).to(torch.int8)
    w_scale = torch.full((channels,), 0.5)
    expected = F.conv2d(x.double(), qdata.double(), padding=1, stride=2) / 2  # below 2**24: float32 holds it

    y = convolve(conv, (x.to(DEVICE), qdata.to(DEVICE), w_scale.to(DEVICE), None), tile)
    assert torch.equal(y.double().cpu(), expected)


# -- what is refused, and what a compiler sees -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(1, 40, 6, 5, dtype=torch.float64)}, "x must be bfloat16, float16 or float32"),
        ({"packed": torch.zeros(33, 9, dtype=torch.int8)}, "packed must be contiguous int8"),
        ({"w_scale": torch.zeros(3)}, r"w_scale must be contiguous \[33\], not \[3\]"),
        ({"bias": torch.zeros(34)}, r"bias must be contiguous \[33\], not \[34\]"),
        ({"dilation": 2}, "an INT8 convolution has no dilation"),
        ({"rotation": Rotation(torch.eye(64))}, "rotation must be one of .* and divide 40 channels, not 64"),
        ({"groups": 3}, "40 channels in 3 groups do not fit"),
    ],
)
def test_arguments_that_do_not_fit_raise(changed: dict[str, Any], message: str) -> None:
    x, qdata, w_scale, bias = make_inputs(Conv())
    arguments = {"x": x, "packed": pack_weight(qdata), "w_scale": w_scale, "bias": bias}
    with pytest.raises(ValueError, match=message):
        int8_conv(**{**arguments, **changed}, kernel_shape=Conv().kernel_shape, tile=SMALL)


def test_operator_passes_opcheck_and_compiles() -> None:
    conv = Conv(options={"padding": 1})
    x, qdata, w_scale, bias = make_inputs(conv, HALF)
    packed = pack_weight(qdata)
    op = torch.ops.int8run.triton_int8_conv.default
    rest = ([33, 40, 3, 3], [1, 1], [1, 1], 1, 4, False, True, SMALL.as_list())
    torch.library.opcheck(
        op, (x, packed, w_scale, bias, *rest), test_utils=("test_schema", "test_faketensor")
    )

    def layer(x: Tensor) -> Tensor:
        y = int8_conv(x, packed, w_scale, bias, kernel_shape=(33, 40, 3, 3), padding=1, tile=SMALL)
        return y.flatten(2)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)

    for height in (5, 9):
        x, *_ = make_inputs(Conv(image=(height, 5)), HALF)
        assert torch.equal(compiled(x), layer(x))
