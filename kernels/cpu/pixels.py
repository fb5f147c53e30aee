"""Pixels to bytes on CPUs, before a convolution: GroupNorm, SiLU, rotation and rounding; see pixels.h.

`conv.py` calls it at every convolution. The definitions are those of
`int8run.kernels.int8_conv.reference`.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.kernels.cpu.instructions import AUTO
from int8run.kernels.cpu.library import check_status, load_conv_library
from int8run.kernels.cpu.linear import DTYPES, FLOAT32
from int8run.kernels.int8_conv.reference import GroupNorm


class PixelsInput(ctypes.Structure):
    """Images [images, C, plane] and what happens to them before they are rounded; as in pixels.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("images", ctypes.c_int64),
        ("C", ctypes.c_int64),
        ("plane", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 3),  # of the three
        ("factor", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("step_stride", ctypes.c_int64),
        ("silu", ctypes.c_int64),
        ("rotation", ctypes.c_int64),
        ("sylvester", ctypes.c_int64),
    )


class NormStruct(ctypes.Structure):
    """A GroupNorm; as in group_norm.h."""

    _fields_ = (
        ("groups", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_double),
    )


@dataclass(frozen=True)
class PixelSteps:
    """What happens to pixels on their way to bytes, in this order, and by which kernels.

    Args:
        factor: float32 [images, C], of each channel, or None; as `measure_norm` gives it, like `shift`.
        shift: what is added then.
        silu: whether SiLU follows.
        rotation: channels that are rotated together, a divisor of the channels of a group; 0: none.
        sylvester: by Sylvester's matrix (a power of 2), else by the regular Hadamard matrix (a power of 4).
        instructions: name of an instruction set, or `auto`.
    """

    factor: Tensor | None = None
    shift: Tensor | None = None
    silu: bool = False
    rotation: int = 0
    sylvester: bool = False
    instructions: str = AUTO


def quantize_pixels(x: Tensor, steps: PixelSteps | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize pixels to unsigned bytes, each by itself: `x ~ (q - 128) * scale + center`.

    Args:
        x: float [B, C, pixels]; one that is neither NCHW nor channels-last is copied first.
        steps: what comes before.

    Returns:
        q: uint8 [B * pixels, C rounded up to 4], scale and center: float32 [B * pixels].

    Raises:
        MemoryError: no memory for a few pixels' numbers.
    """
    steps = steps or PixelSteps()
    x = _as_readable(x)
    images, channels, plane = x.shape
    pixels = images * plane
    q = x.new_empty((pixels, -(-channels // 4) * 4), dtype=torch.uint8)
    scale, center = x.new_empty((2, pixels), dtype=FLOAT32).unbind()
    status = load_conv_library(steps.instructions).functions.int8run_quantize_pixels(
        ctypes.byref(_describe_pixels(x, steps)),
        q.data_ptr(),
        scale.data_ptr(),
        center.data_ptr(),
        torch.get_num_threads(),
    )
    check_status(status)
    return q, scale, center


def measure_norm(x: Tensor, norm: GroupNorm, instructions: str = AUTO) -> tuple[Tensor, Tensor]:
    """`kernels.int8_conv.reference.measure_norm`: a factor and a shift of each channel, float32 [B, C].

    NCHW and channels-last may differ in the last bit.

    Args:
        x: float [B, C, pixels], at least one pixel.
        norm: whose groups divide C.
        instructions: name of an instruction set, or `auto`.

    Raises:
        ValueError: for a norm that does not fit x.
        MemoryError: no memory for the sums.
    """
    x = _as_readable(x)
    images, channels, _ = x.shape
    weight, bias = (_as_float32(each) for each in (norm.weight, norm.bias))
    of_channels = [each.shape == (channels,) for each in (weight, bias) if each is not None]
    if channels % norm.groups or not all(of_channels):
        raise ValueError(f"a norm of {norm.groups} groups, weight and bias must fit {channels} channels")
    factor, shift = x.new_empty((2, images, channels), dtype=FLOAT32).unbind()
    described = NormStruct(norm.groups, _get_pointer(weight), _get_pointer(bias), norm.eps)
    status = load_conv_library(instructions).functions.int8run_group_norm(
        ctypes.byref(_describe_pixels(x, PixelSteps())),
        ctypes.byref(described),
        factor.data_ptr(),
        shift.data_ptr(),
        torch.get_num_threads(),
    )
    check_status(status)
    return factor, shift


def _as_readable(x: Tensor) -> Tensor:
    # channels or pixels side by side
    if x.shape[2] > 1 and 1 not in (x.stride(1), x.stride(2)):
        return x.contiguous()
    return x


def _as_float32(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(FLOAT32).contiguous()


def _get_pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _describe_pixels(x: Tensor, steps: PixelSteps) -> PixelsInput:
    # the tensors must live until the kernel has run
    return PixelsInput(
        x=x.data_ptr(),
        dtype=DTYPES[x.dtype],
        images=x.shape[0],
        C=x.shape[1],
        plane=x.shape[2],
        strides=x.stride(),
        factor=_get_pointer(steps.factor),
        shift=_get_pointer(steps.shift),
        step_stride=0 if steps.factor is None else steps.factor.stride(0),
        silu=steps.silu,
        rotation=steps.rotation,
        sylvester=steps.sylvester,
    )
