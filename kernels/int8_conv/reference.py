"""The INT8 convolution, written to be read: pixels to int8, exact sums, then the scales and the bias.

The layers of convolutions and all tests build on it; faster versions stand in `kernels/cpu` and beside it. It
knows tensors, no modules and no settings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.hadamard.reference import Rotation, rotate_groups
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, TINY

Sizes = int | Sequence[int]  # one number for all dimensions of the image, or one for each


class Pixels(NamedTuple):
    """An image or video whose pixels are quantized each by itself: `x ~ q * scale + center`."""

    q: Tensor  # int8 [B, C, (T,) H, W] in -127..127
    scale: Tensor  # float32 [B, 1, (T,) H, W]
    center: Tensor  # float32 [B, 1, (T,) H, W], the middle of what the pixel's channels hold


class GroupNorm(NamedTuple):
    """A normalization before a convolution, as `F.group_norm` defines it."""

    groups: int  # a divisor of the channels
    weight: Tensor | None  # [C], any float dtype
    bias: Tensor | None
    eps: float


def measure_norm(x: Tensor, norm: GroupNorm) -> tuple[Tensor, Tensor]:
    """The normalization of an image as a factor and a shift of each channel: `x * factor + shift`.

    Args:
        x: [B, C, (T,) H, W], any float dtype; the arithmetic is float64.
        norm: whose groups divide C.

    Returns:
        factor and shift, float32 [B, C].
    """
    batch, channels = x.shape[:2]
    grouped = x.double().reshape(batch, norm.groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)  # [B, groups]
    width = channels // norm.groups
    factor = (variance + norm.eps).rsqrt().repeat_interleave(width, dim=1)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -mean.repeat_interleave(width, dim=1) * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return factor.float(), shift.float()


def normalize(x: Tensor, norm: GroupNorm) -> Tensor:
    """`x * factor + shift` in float32; x: [B, C, (T,) H, W]."""
    factor, shift = (each.view(*x.shape[:2], *[1] * (x.dim() - 2)) for each in measure_norm(x, norm))
    return x.float() * factor + shift


def quantize_pixels(x: Tensor, rotation: Rotation | None = None, *, silu: bool = False) -> Pixels:
    """Round the channels of each pixel to int8, around the middle of their range.

    What convolutions receive has mostly been through SiLU, which gives nothing below -0.28: rounded around 0,
    half of int8's numbers would stay unused. A center costs one product with the sum of a tap's weights, and
    brings 5 dB.

    Args:
        x: [B, C, (T,) H, W], any float dtype; the arithmetic is float32.
        rotation: of groups of g channels, where g divides C; or None.
        silu: whether SiLU comes first, before the rotation.
    """
    x = x.float()
    if silu:
        x = F.silu(x)
    if rotation is not None:
        x = rotate_groups(x.movedim(1, -1), rotation.matrix.to(x.dtype)).movedim(-1, 1)
    high, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    # halved before they are added: their difference may be beyond float32
    center = high / 2 + low / 2
    scale = ((high / 2 - low / 2) / INT8_MAX).clamp(min=TINY)
    q = ((x - center) / scale).round().clamp(-INT8_MAX, INT8_MAX)
    return Pixels(q.to(torch.int8), scale, center)


def int8_conv(
    x: Tensor,
    qdata: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    rotation: Rotation | None = None,
    norm: GroupNorm | None = None,
    silu: bool = False,
) -> Tensor:
    """A convolution (`F.conv2d`, `F.conv3d`) of pixels that are quantized each by itself.

    For each output pixel p and output channel o:

        y[p, o] = w_scale[o] * sum over taps t of (scale[p, t] * sum over c of (q[p, t, c] * qdata[o, c, t])
                                                   + center[p, t] * sum over c of qdata[o, c, t])  +  bias[o]

    where [p, t] is the input pixel that tap t of p meets. Taps beyond the input's edge add nothing. The
    sums over c are whole numbers; everything here is computed in float64, which holds them exactly. The
    channels of a group are quantized by themselves: each group is a convolution of its own.

    Args:
        x: float [B, C, (T,) H, W].
        qdata: int8 [O, C / groups, (kT,) kH, kW] weight. With a rotation, of weights whose input channels are
            rotated as well.
        w_scale: float32 [O], of each output channel.
        bias: [O] or None.
        stride: at least 1.
        padding: zeros on both sides of each dimension, at least 0.
        dilation: 1.
        groups: a divisor of C and O.
        rotation: of the channels of a group of the convolution before they are rounded; or None.
        norm: what comes first; or None.
        silu: whether SiLU comes between the two.

    Returns:
        [B, O, (oT,) oH, oW] in x's dtype.

    Raises:
        ValueError: for a dilation, and for sizes that do not fit each other.
    """
    check_conv(x, qdata, stride=stride, padding=padding, dilation=dilation, groups=groups)
    convolve = F.conv2d if x.dim() == 4 else F.conv3d
    normed = x if norm is None else normalize(x, norm)
    outputs = []
    weights = qdata.double().chunk(groups)
    for inputs, weight in zip(normed.chunk(groups, dim=1), weights, strict=True):
        pixels = quantize_pixels(inputs, rotation, silu=silu)
        rounded = pixels.q.double() * pixels.scale + pixels.center
        outputs.append(convolve(rounded, weight, stride=as_sizes(stride, x), padding=as_sizes(padding, x)))
    y = torch.cat(outputs, dim=1) * as_channels(w_scale, x)
    if bias is not None:
        y = y + as_channels(bias, x)
    return y.to(x.dtype)


def as_sizes(sizes: Sizes, x: Tensor) -> tuple[int, ...]:
    """One number for each dimension of the image; x: [B, C, (T,) H, W]."""
    dimensions = x.dim() - 2
    if isinstance(sizes, int):
        return (sizes,) * dimensions
    return tuple(sizes)


def as_channels(vector: Tensor, x: Tensor) -> Tensor:
    """A number for each output channel, shaped to meet x [B, C, (T,) H, W]."""
    return vector.double().view(-1, *[1] * (x.dim() - 2))


def check_conv(
    x: Tensor, qdata: Tensor, *, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> tuple[int, ...]:
    """Refuse what is no such convolution.

    Args:
        x: [B, C, (T,) H, W].
        qdata: [O, C / groups, (kT,) kH, kW].
        stride: as `int8_conv` takes it, like the others.
        padding: zeros on both sides.
        dilation: 1.
        groups: a divisor of C and O.

    Returns:
        Sizes of the output: (oT,) oH, oW.

    Raises:
        ValueError: says in one line what does not fit.
    """
    if x.dim() not in (4, 5) or qdata.dim() != x.dim():
        raise ValueError(
            "a convolution takes [B, C, H, W] and a weight [O, C, kH, kW], or [B, C, T, H, W] and "
            f"[O, C, kT, kH, kW], not {list(x.shape)} and {list(qdata.shape)}"
        )
    if any(size != 1 for size in as_sizes(dilation, x)):
        raise ValueError(f"an INT8 convolution has no dilation, not {dilation}; leave the layer float")
    if groups < 1 or qdata.shape[0] % groups or x.shape[1] != groups * qdata.shape[1]:
        raise ValueError(
            f"{x.shape[1]} channels in {groups} groups do not fit a weight of {list(qdata.shape)}"
        )
    return measure_output(x.shape[2:], qdata.shape[2:], as_sizes(stride, x), as_sizes(padding, x))


def measure_output(
    input_sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Sizes of the output.

    Args:
        input_sizes: (T,) H, W of the input.
        kernel: taps in each dimension.
        stride: at least 1.
        padding: zeros on both sides, at least 0.

    Raises:
        ValueError: for another number of dimensions, and for an input that is smaller than the kernel.
    """
    if not len(input_sizes) == len(kernel) == len(stride) == len(padding):
        raise ValueError(
            f"stride and padding are one number or {len(input_sizes)}, not {list(stride)} and {list(padding)}"
        )
    if min(stride) < 1 or min(padding) < 0:
        raise ValueError(f"stride is 1 or more and padding 0 or more, not {list(stride)} and {list(padding)}")
    sizes = []
    for size, taps, step, zeros in zip(input_sizes, kernel, stride, padding, strict=True):
        if size + 2 * zeros < taps:
            raise ValueError(
                f"an input of {list(input_sizes)} with padding {list(padding)} is smaller than the kernel "
                f"{list(kernel)}"
            )
        sizes.append((size + 2 * zeros - taps) // step + 1)
    return tuple(sizes)
