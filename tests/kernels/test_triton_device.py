"""On which GPU the Triton kernels are launched: the tensors', whichever one is current.

The current device is mocked, and so are the kernels; tensors on `cuda:1` have no memory.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")
from int8run.kernels.dequantize import kernel as dequantize
from int8run.kernels.grouped_weight import kernel as grouped_weight
from int8run.kernels.grouped_weight.layout import PackedCodes
from int8run.kernels.int8_attention import kernel as int8_attention
from int8run.kernels.int8_attention.tile import AttentionTile
from int8run.kernels.int8_conv import kernel as int8_conv
from int8run.kernels.int8_linear import kernel as int8_linear
from int8run.kernels.int8_linear.tile import Tile
from int8run.kernels.quantize_rowwise import kernel as quantize_rowwise

SECOND_GPU = torch.device("cuda:1")


class CurrentDevice:
    """Takes the place of CUDA's current device."""

    def __init__(self):
        self.index = 0

    def exchange(self, index):
        previous, self.index = self.index, index
        return previous


class LaunchRecorder:
    """Takes the place of a kernel and notes which device is current at a launch."""

    def __init__(self, current):
        self.current = current
        self.devices = []

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        self.devices.append(self.current.index)


@pytest.fixture
def current(monkeypatch):
    device = CurrentDevice()
    for name in ("_accelerator_exchangeDevice", "_accelerator_maybeExchangeDevice"):
        monkeypatch.setattr(torch._C, name, device.exchange)
    return device


def record_launches(monkeypatch, module, name, current):
    recorder = LaunchRecorder(current)
    monkeypatch.setattr(module, name, recorder)
    return recorder


def make_empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device=SECOND_GPU)


def test_the_product_runs_where_its_tensors_are(monkeypatch, current):
    recorder = record_launches(monkeypatch, int8_linear, "int8_linear_kernel", current)
    with FakeTensorMode():
        y = int8_linear._launch_int8_linear(
            q=make_empty(5, 64, dtype=torch.int8),
            x_scale=make_empty(5, 1, dtype=torch.float32),
            qdata=make_empty(48, 64, dtype=torch.int8),
            w_scale=make_empty(48, dtype=torch.float32),
            group=0,
            bias=None,
            h=None,
            up=None,
            strengths=None,
            out_dtype=torch.bfloat16,
            tile=Tile(16, 32, 64, warps=4),
        )

    assert y.device == SECOND_GPU
    assert recorder.devices == [1]
    assert current.index == 0


def test_a_product_with_few_bits_runs_where_its_tensors_are(monkeypatch, current):
    product = record_launches(monkeypatch, grouped_weight, "grouped_linear_kernel", current)
    decoding = record_launches(monkeypatch, grouped_weight, "decode_weight_kernel", current)
    with FakeTensorMode():
        weight = PackedCodes(
            codes=make_empty(48, 32, dtype=torch.uint8),
            group_scale=make_empty(256 * 16 + 4 * 48, dtype=torch.uint8),
            codebook=None,
            bits=4,
            group=16,
        )
        y = grouped_weight._launch_grouped_linear(
            q=make_empty(5, 64, dtype=torch.int8),
            x_scale=make_empty(5, 1, dtype=torch.float32),
            weight=weight,
            w_scale=make_empty(48, dtype=torch.float32),
            bias=None,
            h=None,
            up=None,
            strengths=None,
            out_dtype=torch.bfloat16,
            tile=Tile(16, 32, 64, warps=4),
        )
        qdata = grouped_weight._launch_decode_weight(*weight, 64)

    assert y.device == qdata.device == SECOND_GPU
    assert product.devices == decoding.devices == [1]
    assert current.index == 0


@pytest.mark.parametrize(
    ("kernel", "rotation", "columns"),
    [
        ("quantize_row_kernel", 0, 64),
        ("quantize_row_matrix_kernel", 64, 1024),
        ("quantize_row_block_kernel", 64, 64),
    ],
)
def test_quantization_runs_where_its_input_is(monkeypatch, current, kernel, rotation, columns):
    recorder = record_launches(monkeypatch, quantize_rowwise, kernel, current)
    with FakeTensorMode():
        x = make_empty(5, columns, dtype=torch.bfloat16)
        down = make_empty(16, columns, dtype=torch.bfloat16) if "block" in kernel else None
        q, _, _ = quantize_rowwise._launch_quantize_rowwise(
            x, factor=None, rotation=rotation, sylvester=False, gelu_from=-1, down=down
        )

    assert q.device == SECOND_GPU
    assert recorder.devices == [1]
    assert current.index == 0


def test_dequantization_runs_where_its_weight_is(monkeypatch, current):
    recorder = record_launches(monkeypatch, dequantize, "_dequantize_kernel", current)
    with FakeTensorMode():
        dequantize._launch(
            qdata=make_empty(3, 64, dtype=torch.int8),
            scale=make_empty(3, dtype=torch.float32),
            out=make_empty(3, 64, dtype=torch.float32),
            blocks=(1, 64),
            storage=dequantize.Storage("int8", "float32"),
        )

    assert recorder.devices == [1]
    assert current.index == 0


def test_attention_runs_where_its_queries_are(monkeypatch, current):
    rounding = record_launches(monkeypatch, int8_attention, "quantize_heads_kernel", current)
    attention = record_launches(monkeypatch, int8_attention, "attention_kernel", current)
    with FakeTensorMode():
        q, k, v = (make_empty(1, 2, length, 64, dtype=torch.bfloat16) for length in (5, 7, 7))
        y = int8_attention._launch_int8_attention(
            q,
            k,
            v,
            mask=None,
            is_causal=False,
            scale=None,
            rotation=0,
            center_keys=True,
            tile=AttentionTile(16, 32, 1, 2),
        )

    assert y.device == SECOND_GPU
    assert rounding.devices == [1, 1]
    assert attention.devices == [1]
    assert current.index == 0


def test_a_convolution_runs_where_its_input_is(monkeypatch, current):
    rounding = record_launches(monkeypatch, int8_conv, "quantize_pixels_kernel", current)
    product = record_launches(monkeypatch, int8_conv, "conv_kernel", current)
    with FakeTensorMode():
        packed = make_empty(8, 336, dtype=torch.int8)
        y = int8_conv._launch_int8_conv(
            make_empty(1, 32, 5, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
            packed,
            w_scale=make_empty(8, dtype=torch.float32),
            bias=None,
            kernel_shape=[8, 32, 3, 3],
            stride=[1, 1],
            padding=[1, 1],
            groups=1,
            rotation=0,
            sylvester=False,
            silu=False,
            tile=Tile(16, 32, 32, warps=1),
        )

    assert y.device == SECOND_GPU
    assert rounding.devices == [1]
    assert product.devices == [1]
    assert current.index == 0
