"""The parts of a run on a GPU that measure INT8 attention and convolutions; `parts.py` starts them."""

from collections.abc import Sequence
from functools import partial
from math import log10
from typing import Any

from part_report import ROWS, TIMED_ROUNDS, Report, choose_dtype, shrink

# name, heads, queries, keys and channels of a head
ATTENTIONS = (
    ("FLUX", 24, ROWS, ROWS, 128),
    ("SDXL", 10, 4096, 4096, 64),
    ("SDXL, text", 10, 4096, 77, 64),
    ("Wan, 4 of 40 heads", 4, 32760, 32760, 128),
)
# name, channels in and out, height and width, kernel and stride
CONVOLUTIONS = (
    ("SDXL 320, 128x128", 320, 320, 128, 3, 1),
    ("SDXL 640, 64x64", 640, 640, 64, 3, 1),
    ("SDXL 1280, 32x32", 1280, 1280, 32, 3, 1),
    ("SDXL 1280 to 640, 1x1", 1280, 640, 64, 1, 1),
)


def measure_attention(device: str, report: Report, words: Sequence[str]) -> None:
    """INT8 attention against torch's in bfloat16: times, and the error of both against float32."""
    import torch
    import torch.nn.functional as F
    from gpu_clock import make_clock

    from int8run.backends.attention import ReferenceAttention, TritonAttention, choose_attention_method
    from int8run.utils.hardware import get_gpu_architecture

    place, dtype = torch.device(device), choose_dtype()
    clock = make_clock(place)
    backend = ReferenceAttention() if device == "cpu" else TritonAttention(get_gpu_architecture(place))
    for name, heads, queries, keys, width in ATTENTIONS:
        lengths = (shrink(queries, device), shrink(keys, device), shrink(keys, device))
        q, k, v = (torch.randn(1, heads, length, width, device=place, dtype=dtype) for length in lengths)
        k[..., ::16] *= 4  # channels that stand out, as those of trained models do
        method = choose_attention_method(width)
        int8 = partial(attend_once, backend, (q, k, v), method)
        base = partial(attend_by_torch, (q, k, v))
        exact = F.scaled_dot_product_attention(q[:, :1].float(), k[:, :1].float(), v[:, :1].float())
        times = clock.time_medians({"int8": int8, "bf16": base}, TIMED_ROUNDS)
        report.add_row(
            attention=name,
            method=method.label,
            int8_us=1e6 * times["int8"],
            bf16_us=1e6 * times["bf16"],
            ratio=times["bf16"] / times["int8"],
            int8_sqnr_db=measure_sqnr(int8(0)[:, :1], exact),
            bf16_sqnr_db=measure_sqnr(base(0)[:, :1], exact),
        )


def attend_once(backend: Any, heads: tuple[Any, Any, Any], method: Any, number: int) -> Any:
    """INT8 attention, as a model's module calls it."""
    from int8run.utils.attention_call import AttentionCall

    return backend.attend(AttentionCall(*heads), method)


def attend_by_torch(heads: tuple[Any, Any, Any], number: int) -> Any:
    """torch's own attention."""
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(*heads)


def measure_convolutions(device: str, report: Report, words: Sequence[str]) -> None:
    """INT8 convolutions, quantization of pixels included, against cuDNN in bfloat16, channels-last."""
    import torch
    from gpu_clock import make_clock

    from int8run.backends.convolution import ReferenceConv, TritonConv, read_geometry
    from int8run.quant.weight import quantize_weight
    from int8run.utils.hardware import get_gpu_architecture

    place, dtype = torch.device(device), choose_dtype()
    clock = make_clock(place)
    backend = ReferenceConv() if device == "cpu" else TritonConv(get_gpu_architecture(place))
    for name, channels, channels_out, side, kernel, stride in CONVOLUTIONS:
        sizes = (shrink(channels, device), shrink(channels_out, device))
        layer = torch.nn.Conv2d(*sizes, kernel, stride, padding=kernel // 2).to(place)
        x = torch.randn(2, sizes[0], shrink(side, device), shrink(side, device), device=place)
        exact = layer(x).detach()
        weight = quantize_weight(layer.weight.detach().flatten(1))
        packed = backend.pack_weight(weight, tuple(layer.weight.shape), 1)
        arguments = (packed, weight.scale[:, 0].contiguous(), layer.bias.detach().float())
        x = x.to(dtype, memory_format=torch.channels_last)
        layer = layer.to(dtype, memory_format=torch.channels_last).requires_grad_(False)
        int8 = partial(convolve_once, backend, x, arguments, read_geometry(layer))
        base = partial(call_layer, layer, x)
        times = clock.time_medians({"int8": int8, "bf16": base}, TIMED_ROUNDS)
        report.add_row(
            convolution=name,
            int8_us=1e6 * times["int8"],
            bf16_us=1e6 * times["bf16"],
            ratio=times["bf16"] / times["int8"],
            int8_sqnr_db=measure_sqnr(int8(0), exact),
            bf16_sqnr_db=measure_sqnr(base(0), exact),
        )


def convolve_once(backend: Any, x: Any, arguments: tuple[Any, Any, Any], geometry: Any, number: int) -> Any:
    """An INT8 convolution, as its layer calls it."""
    from int8run.backends.convolution import ConvCall

    return backend.convolve(ConvCall(x, *arguments, geometry))


def call_layer(layer: Any, x: Any, number: int) -> Any:
    """A float layer."""
    return layer(x)


def measure_sqnr(y: Any, exact: Any) -> float:
    """How far the error is below the signal, in decibels."""
    error = (y.float() - exact).square().mean().item()
    return 10 * log10(exact.square().mean().item() / max(error, 1e-30))
