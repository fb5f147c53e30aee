"""The INT8 convolution on the GPU, in two launches of Triton kernels.

`reference.py` is the definition, `programs.py` what one program computes, `tile.py` the tile sizes. The first
launch rounds each pixel of the input, the second is the product: an implicit GEMM of M output pixels, N
output channels and a walk over taps and channels,

    y[p, o] = w_scale[o] * sum over taps t of (scale[p, t] * sum over c of (q[p, t, c] * qdata[o, c, t])
                                               + center[p, t] * sum over c of qdata[o, c, t])  +  bias[o]

The sums over c stay integers. Those of a tap become float32 when it is done, because the next tap meets
pixels with other scales: two tiles of sums, so the tiles are those of a linear layer with scales per group.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.int8_conv.programs import conv_kernel, quantize_pixels_kernel
from int8run.kernels.int8_conv.reference import Sizes, as_sizes, check_conv, measure_output
from int8run.kernels.int8_linear.kernel import limit_block_k
from int8run.kernels.int8_linear.tile import Tile
from int8run.kernels.quantize_rowwise.kernel import ROTATIONS, SYLVESTER_ROTATIONS, choose_block_parts
from int8run.kernels.triton_calls import FLOATS, choose_dot_precision, needs_operator

BLOCK_P = 16  # pixels of a program that rounds them: the smallest tensor-core product
PIXELS_WARPS = 8
SMALLEST_BLOCK_K = 32  # the depth of one int8 tensor-core instruction
ALIGNMENT = 16  # bytes, of a row of the packed weight and of the sums in it


def pack_weight(qdata: Tensor) -> Tensor:
    """The weight as the kernel reads it: a row for each output channel.

        | tap 0: C integers | tap 1 | ... zeros to 16 bytes | int32 sums of each tap ... zeros to 16 bytes |

    Args:
        qdata: int8 [O, C / groups, (kT,) kH, kW].

    Returns:
        int8 [O, bytes of a row].
    """
    taps = qdata.flatten(2).mT  # [O, taps, C]
    integers = _pad_rows(taps.flatten(1))
    sums = taps.sum(dim=-1, dtype=torch.int32)
    return torch.cat([integers, _pad_rows(sums.view(torch.int8))], dim=1)


def unpack_weight(packed: Tensor, kernel_shape: Sequence[int]) -> Tensor:
    """The weight out of `pack_weight`: int8 [O, C / groups, (kT,) kH, kW], the kernel's shape."""
    channels_out, channels, *kernel = kernel_shape
    taps = packed[:, : channels * prod(kernel)].unflatten(1, (-1, channels))  # [O, taps, C]
    qdata: Tensor = taps.mT.reshape(channels_out, channels, *kernel)
    return qdata


def _pad_rows(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, -rows.shape[1] % ALIGNMENT))


def int8_conv(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    kernel_shape: Sequence[int],
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    rotation: Rotation | None = None,
    silu: bool = False,
    tile: Tile,
) -> Tensor:
    """An INT8 convolution on a GPU; arguments and result are those of the reference, `int8_conv.reference`.

    Here `packed`, from `pack_weight`, stands for the weight, and `kernel_shape` for its shape before it was
    packed. x is bfloat16, float16 or float32; channels-last is read as it is, else it is copied first. What
    enters the product of the rotation is rounded to x's dtype. `tile` is one of `tile.py`, whose block_k
    becomes smaller where channels ask for it.

    Returns:
        [B, O, (oT,) oH, oW] in x's dtype, channels-last.

    Raises:
        ValueError: for sizes, dtypes or a rotation that the kernels do not take.
    """
    # a weight of that shape without memory: the check asks for shapes alone
    weight = packed.new_empty(1).expand(tuple(kernel_shape))
    check_conv(x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    arguments = (
        x,
        packed,
        w_scale,
        bias,
        list(kernel_shape),
        list(as_sizes(stride, x)),
        list(as_sizes(padding, x)),
        groups,
        0 if rotation is None else rotation.group,
        rotation is not None and rotation.sylvester,
        silu,
    )
    if needs_operator(x):
        y: Tensor = torch.ops.int8run.triton_int8_conv.default(*arguments, tile.as_list())
        return y
    return _launch_int8_conv(*arguments, tile)


def _run_operator(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel_shape: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    rotation: int,
    sylvester: bool,
    silu: bool,
    tile: list[int],
) -> Tensor:
    """As an operator of torch, which knows no tiles."""
    return _launch_int8_conv(
        x,
        packed,
        w_scale,
        bias,
        kernel_shape,
        stride,
        padding,
        groups,
        rotation,
        sylvester,
        silu,
        Tile.from_list(tile),
    )


def _int8_conv_fake(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel_shape: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    rotation: int,
    sylvester: bool,
    silu: bool,
    tile: list[int],
) -> Tensor:
    return _allocate_output(x, kernel_shape, stride, padding)


def _launch_int8_conv(
    x: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel_shape: list[int],
    stride: list[int],
    padding: list[int],
    groups: int,
    rotation: int,
    sylvester: bool,
    silu: bool,
    tile: Tile,
) -> Tensor:
    _check_tensors(x, packed, w_scale, bias, kernel_shape)
    _check_rotation(rotation, kernel_shape[1], sylvester=sylvester)
    y = _allocate_output(x, kernel_shape, stride, padding)
    if x.shape[0] == 0:  # an empty grid cannot be launched
        return y
    image = _put_channels_last(x)
    # Triton launches on the current device, which need not be x's
    with torch.accelerator.device_index(x.device.index):
        pixels = _quantize_pixels(image, groups, rotation, sylvester=sylvester, silu=silu)
        _launch_product(pixels, packed, w_scale, bias, y, kernel_shape, stride, padding, tile)
    return y


class PixelRows(NamedTuple):
    """An image or video in int8, an image as a video of one frame."""

    q: Tensor  # int8 [B, T, H, W, groups, C]
    scale: Tensor  # float32 [B, T, H, W, groups]
    center: Tensor  # float32 [B, T, H, W, groups]


def _quantize_pixels(image: Tensor, groups: int, rotation: int, *, sylvester: bool, silu: bool) -> PixelRows:
    """Round each pixel of [B, T, H, W, C of all groups]."""
    *sizes, channels = image.shape
    channels //= groups
    q = torch.empty((*sizes, groups, channels), dtype=torch.int8, device=image.device)
    scale = torch.empty((*sizes, groups), dtype=torch.float32, device=image.device)
    center = torch.empty_like(scale)
    n_pixels = prod(sizes)
    quantize_pixels_kernel[(-(-n_pixels // BLOCK_P), groups)](
        image,
        q,
        scale,
        center,
        n_pixels,
        channels,
        groups,
        SILU=silu,
        ROTATION=rotation,
        SYLVESTER=sylvester,
        PRECISION=choose_dot_precision(image.dtype),
        PARTS=choose_block_parts(rotation),
        BLOCK_P=BLOCK_P,
        num_warps=PIXELS_WARPS,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return PixelRows(q, scale, center)


def _launch_product(
    pixels: PixelRows,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    kernel_shape: list[int],
    stride: list[int],
    padding: list[int],
    tile: Tile,
) -> None:
    """Write y [B, O, (oT,) oH, oW], which lies channels-last."""
    _, *sizes, groups, channels = pixels.q.shape
    channels_out = kernel_shape[0] // groups
    kernel = kernel_shape[2:]
    out_sizes = list(y.shape[2:])
    n_pixels = y.shape[0] * prod(out_sizes)
    block_k = choose_block_k(tile, channels)
    integer_bytes = channels * prod(kernel)
    n_programs = -(-n_pixels // tile.block_m) * -(-channels_out // tile.block_n)
    conv_kernel[(n_programs, groups)](
        *pixels,
        packed,
        packed.view(torch.int32),
        w_scale,
        bias,
        y,
        n_pixels,
        channels_out,
        channels,
        groups,
        packed.shape[1],
        -(-integer_bytes // ALIGNMENT) * ALIGNMENT // 4,
        *sizes,
        *_as_video(out_sizes, 1),
        *_as_video(kernel, 1),
        *_as_video(stride, 1),
        *_as_video(padding, 0),
        HAS_BIAS=bias is not None,
        EVEN_C=channels % block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=block_k,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def choose_block_k(tile: Tile, channels: int) -> int:
    """The largest step that ends with a tap's channels; where it is very short, one that goes beyond them."""
    return max(limit_block_k(tile.block_k, channels), SMALLEST_BLOCK_K)


def _as_video(sizes: list[int], time: int) -> list[int]:
    """Three sizes; of an image the one of time first."""
    return sizes if len(sizes) == 3 else [time, *sizes]


def _put_channels_last(x: Tensor) -> Tensor:
    """[B, C, (T,) H, W] as [B, T, H, W, C] without gaps."""
    if x.dim() == 4:
        x = x.unsqueeze(2)
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _allocate_output(x: Tensor, kernel_shape: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """[B, O, (oT,) oH, oW], channels-last."""
    sizes = measure_output(x.shape[2:], kernel_shape[2:], stride, padding)
    return x.new_empty((x.shape[0], *sizes, kernel_shape[0])).movedim(-1, 1)


def _check_tensors(
    x: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None, kernel_shape: list[int]
) -> None:
    channels_out, channels, *kernel = kernel_shape
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be bfloat16, float16 or float32, not {x.dtype}")
    taps = prod(kernel)
    row = -(-channels * taps // ALIGNMENT) * ALIGNMENT + -(-4 * taps // ALIGNMENT) * ALIGNMENT
    if packed.shape != (channels_out, row) or packed.dtype != torch.int8 or not packed.is_contiguous():
        raise ValueError(
            f"packed must be contiguous int8 [{channels_out}, {row}], as pack_weight makes it, "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    for name, vector in (("w_scale", w_scale), ("bias", bias)):
        if vector is not None and (vector.shape != (channels_out,) or not vector.is_contiguous()):
            raise ValueError(f"{name} must be contiguous [{channels_out}], not {list(vector.shape)}")


def _check_rotation(rotation: int, channels: int, *, sylvester: bool) -> None:
    rotations = SYLVESTER_ROTATIONS if sylvester else ROTATIONS
    if rotation not in rotations or (rotation and channels % rotation):
        raise ValueError(
            f"rotation must be one of {rotations} and divide {channels} channels, not {rotation}"
        )


# registered by hand: `custom_op` adds 12 microseconds to every call, this 3
ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "triton_int8_conv(Tensor x, Tensor packed, Tensor w_scale, Tensor? bias, int[] kernel_shape, "
    "int[] stride, int[] padding, int groups, int rotation, bool sylvester, bool silu, int[] tile) -> Tensor"
)
ops.impl("triton_int8_conv", _run_operator, "CompositeExplicitAutograd")
torch.library.register_fake("int8run::triton_int8_conv", _int8_conv_fake, lib=ops)
