"""The CPU convolution as a torch operator, `int8run::cpu_conv`: quantize the pixels, convolve, scale.

Layers of convolutions call it. The input may lie as it likes; the result is channels-last, as the kernels
are.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from int8run.kernels.cpu.instructions import AUTO
from int8run.kernels.cpu.library import check_status, load_conv_library
from int8run.kernels.cpu.linear import (
    DTYPES,
    FLOAT32,
    INT8,
    PANEL,
    check_rotation,
    pack_weight,
    unpack_weight,
)
from int8run.kernels.cpu.pixels import PixelSteps, measure_norm, quantize_pixels
from int8run.kernels.int8_conv.reference import GroupNorm, Sizes, as_sizes, measure_output

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions
MOST_DIMENSIONS = 3  # of a video: time, height, width
MOST_CHANNELS = 132_104  # of a group: 32-bit sums of 128 * 127, see linear.h

ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "cpu_conv(Tensor x, Tensor packed, Tensor w_scale, Tensor? bias, int[] kernel, int[] stride, "
    "int[] padding, int rotation, bool sylvester, int norm_groups, Tensor? norm_weight, Tensor? norm_bias, "
    "float norm_eps, bool silu, str instructions) -> Tensor"
)


def pack_conv_weight(qdata: Tensor, groups: int = 1) -> Tensor:
    """Lay the weight of a convolution out as conv.h draws it: for each panel of 64 outputs, tap after tap.

    Args:
        qdata: int8 [O, C / groups, (kT,) kH, kW].
        groups: a divisor of O.

    Returns:
        int8 [groups, ceil(O / groups / 64), taps, 1 + ceil(C / groups / 4), 256], one tensor, fit to be
        saved.
    """
    packed = []
    for weight in qdata.flatten(2).chunk(groups):  # [O / groups, C / groups, taps]
        taps = [pack_weight(tap) for tap in weight.unbind(2)]
        packed.append(torch.stack(taps, dim=1))
    return torch.stack(packed)


def unpack_conv_weight(packed: Tensor, outputs: int, channels: int, kernel: Sequence[int]) -> Tensor:
    """The inverse of `pack_conv_weight`: int8 [O, C / groups, (kT,) kH, kW].

    Args:
        packed: from `pack_conv_weight`.
        outputs: O.
        channels: C / groups.
        kernel: (kT,) kH, kW.
    """
    each = outputs // packed.shape[0]
    groups = []
    for group in packed:
        taps = [unpack_weight(tap.contiguous(), each, channels) for tap in group.unbind(1)]
        groups.append(torch.stack(taps, dim=-1))
    return torch.cat(groups).view(outputs, channels, *kernel)


def int8_conv(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    kernel: Sequence[int],
    stride: Sizes = 1,
    padding: Sizes = 0,
    rotation: int = 0,
    sylvester: bool = False,
    norm: GroupNorm | None = None,
    silu: bool = False,
    instructions: str = AUTO,
) -> Tensor:
    """An INT8 convolution on a CPU; arguments and result are those of the reference, `int8_conv.reference`.

    Here `packed`, from `pack_conv_weight`, stands for the weight and its groups, and `kernel` says its taps:
    (kT,) kH, kW. `rotation` is a number of channels (0: none), by Sylvester's matrix or else
    by the regular Hadamard matrix. `instructions` is the name of an instruction set, or `auto`. Channels-last
    and NCHW are read as they are; any other layout is copied first.

    Returns:
        [B, O, (oT,) oH, oW] in x's dtype, channels-last.

    Raises:
        ValueError: for operands that do not fit each other.
        MemoryError: no memory for what threads keep.
    """
    steps, zeros = as_sizes(stride, x), as_sizes(padding, x)
    norm_steps = (0, None, None, 0.0) if norm is None else norm
    op = torch.ops.int8run.cpu_conv.default
    y: Tensor = op(
        *(x, packed, w_scale, bias, kernel, steps, zeros, rotation, sylvester),
        *norm_steps,
        *(silu, instructions),
    )
    return y


# -- what the operator does ------------------------------------------------------------------------


def _int8_conv_impl(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    rotation: int,
    sylvester: bool,
    norm_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    silu: bool,
    instructions: str,
) -> Tensor:
    dtype = x.dtype
    if dtype not in DTYPES:
        x = x.float()
    y = _make_output(x, packed, w_scale, kernel, stride, padding)
    check_rotation(rotation, x.shape[1] // packed.shape[0], sylvester=sylvester)
    if bias is not None:
        bias = bias.to(FLOAT32).contiguous()
        if bias.shape != w_scale.shape:
            raise ValueError(f"bias must have {w_scale.shape[0]} numbers, not {list(bias.shape)}")
    if x.numel() == 0:
        return y.copy_(_fill_with_bias(y, bias)).to(dtype)
    pixels = x.flatten(2)  # [B, C, pixels]
    factor = shift = None
    if norm_groups:
        norm = GroupNorm(norm_groups, norm_weight, norm_bias, norm_eps)
        factor, shift = measure_norm(pixels, norm, instructions)
    steps = PixelSteps(factor, shift, silu, rotation, sylvester, instructions)
    geometry = describe_geometry(x, y, kernel, stride, padding)
    _convolve_groups(pixels, packed, w_scale, bias, y, geometry, steps)
    return y.to(dtype)


def _convolve_groups(
    pixels: Tensor,  # [B, C, pixels]
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,  # is written
    geometry: ctypes.Array[ctypes.c_int64],
    steps: PixelSteps,
) -> None:
    channels, outputs = pixels.shape[1] // packed.shape[0], y.shape[1] // packed.shape[0]
    for group, weight in enumerate(packed):
        inputs = slice(group * channels, (group + 1) * channels)
        q, scale, center = quantize_pixels(pixels[:, inputs], _select_channels(steps, inputs))
        first = group * outputs
        status = load_conv_library(steps.instructions).functions.int8run_conv(
            geometry,
            q.data_ptr(),
            scale.data_ptr(),
            center.data_ptr(),
            channels,
            outputs,
            weight.data_ptr(),
            w_scale[first:].data_ptr(),
            None if bias is None else bias[first:].data_ptr(),
            y[:, first:].data_ptr(),
            y.shape[1],
            DTYPES[y.dtype],
            torch.get_num_threads(),
        )
        check_status(status)


def _select_channels(steps: PixelSteps, channels: slice) -> PixelSteps:
    if steps.factor is None or steps.shift is None:
        return steps
    return replace(steps, factor=steps.factor[:, channels], shift=steps.shift[:, channels])


def _make_output(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    # checks what would be read past its end; without sizes of its own, so that torch.compile may trace it
    if x.dim() not in CHANNELS_LAST:
        raise ValueError(f"a convolution takes [B, C, H, W] or [B, C, T, H, W], not {list(x.shape)}")
    sizes = measure_output(x.shape[2:], kernel, stride, padding)
    taps = 1
    for size in kernel:
        taps *= size
    groups, outputs = packed.shape[0], w_scale.shape[0]
    channels = x.shape[1] // groups
    expected = (groups, -(-outputs // groups // PANEL), taps, 1 + -(-channels // 4), 4 * PANEL)
    fits = outputs % groups == 0 and x.shape[1] % groups == 0 and packed.shape == expected
    if not fits or packed.dtype is not INT8 or not packed.is_contiguous():
        raise ValueError(
            f"a weight of {outputs} outputs, {x.shape[1]} channels and taps {list(kernel)} must be as from "
            f"pack_conv_weight, not {packed.dtype} {list(packed.shape)}"
        )
    if w_scale.dtype is not FLOAT32 or not w_scale.is_contiguous():
        raise ValueError(f"w_scale must be contiguous float32 [{outputs}], not {w_scale.dtype}")
    if channels > MOST_CHANNELS:
        raise ValueError(f"at most {MOST_CHANNELS} channels of a group fit 32-bit sums, not {channels}")
    shape = (x.shape[0], outputs, *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST[x.dim()])


def _fill_with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    # an empty batch, or an input that is nothing but padding
    if bias is None:
        return torch.zeros_like(y)
    return bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2)).expand_as(y)


def describe_geometry(
    x: Tensor, y: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> ctypes.Array[ctypes.c_int64]:
    """A `Geometry` of conv.h; images are videos of one frame."""

    def extend(sizes: Sequence[int], missing: int) -> list[int]:
        return [missing] * (MOST_DIMENSIONS - len(sizes)) + list(sizes)

    numbers = [
        x.shape[0],
        *extend(x.shape[2:], 1),
        *extend(kernel, 1),
        *extend(stride, 1),
        *extend(padding, 0),
        *extend(y.shape[2:], 1),
    ]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _int8_conv_fake(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    *steps: object,
) -> Tensor:
    return _make_output(x, packed, w_scale, kernel, stride, padding)


ops.impl("cpu_conv", _int8_conv_impl, "CPU")
torch.library.register_fake("int8run::cpu_conv", _int8_conv_fake, lib=ops)
