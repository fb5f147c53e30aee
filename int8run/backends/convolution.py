"""What computes INT8 convolutions, and the shape of a convolution.

An `Int8Conv` holds one of these backends. They are not those of Linears: the kernels differ, and so do the
devices that have one. Nothing here knows models or settings.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from int8run.backends.base import Limits, find_instruction_set
from int8run.errors import BackendError
from int8run.kernels.cpu import conv
from int8run.kernels.cpu.instructions import AUTO, INSTRUCTION_SETS
from int8run.kernels.cpu.library import BuildError, load_conv_library
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.int8_conv.reference import GroupNorm, int8_conv
from int8run.kernels.int8_conv.tile import choose_conv_tile
from int8run.kernels.int8_linear.tile import AMD_ARCHITECTURES
from int8run.quant.weight import QuantizedWeight
from int8run.utils.hardware import get_gpu_architecture

log = logging.getLogger(__name__)
Sizes = tuple[int, ...]  # one number for each dimension of an image or video


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution moves over its input.

    Args:
        kernel: its height and width, of videos also its time.
        stride: pixels from one output to the next.
        padding: zeros on both sides of the input.
        dilation: pixels from one weight to the next.
        groups: into which channels are divided.
    """

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int

    @property
    def label(self) -> str:
        """For people: `3x3 stride 2`, `1x1 stride 1 groups 4`."""
        return describe_sizes(self.kernel, self.stride, self.groups)

    def compute_output_size(self, size: Sequence[int]) -> Sizes:
        """Height and width (and time) of the output for those of an input."""
        sizes = []
        for length, kernel, stride, padding, dilation in zip(
            size, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            sizes.append((length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        return tuple(sizes)


def describe_sizes(kernel: Sizes, stride: Sizes, groups: int) -> str:
    """Kernel, stride and groups for people; one group is not mentioned."""
    strides = "x".join(map(str, stride))
    if len(set(stride)) == 1:
        strides = str(stride[0])
    described = f"{'x'.join(map(str, kernel))} stride {strides}"
    if groups > 1:
        described += f" groups {groups}"
    return described


def read_geometry(layer: nn.Conv2d | nn.Conv3d) -> ConvGeometry:
    """The geometry of a convolution; `padding="same"` and `"valid"` as numbers.

    Raises:
        ValueError: for `same` with a kernel of even size, which needs other zeros on each side.
    """
    kernel, dilation = tuple(layer.kernel_size), tuple(layer.dilation)
    padding = layer.padding
    if padding == "valid":
        padding = (0,) * len(kernel)
    elif padding == "same":
        reaches = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        if any(reach % 2 for reach in reaches):
            raise ValueError(f"padding='same' of a {kernel} kernel differs from side to side")
        padding = tuple(reach // 2 for reach in reaches)
    return ConvGeometry(
        kernel=kernel,
        stride=tuple(layer.stride),
        padding=tuple(int(number) for number in padding),
        dilation=dilation,
        groups=layer.groups,
    )


class ConvCall(NamedTuple):
    """One convolution to compute.

    A tuple and not a dataclass, because a layer makes one at every call and torch.compile follows it.

    Args:
        x: float [B, C, *size]; its quantization is the kernel's.
        packed: from `ConvBackend.pack_weight`.
        w_scale: float32 [N].
        bias: float32 [N].
        geometry: of the convolution.
        rotation: of the channels of a group before they are rounded.
        norm: comes first; only where the backend's limits say that it computes one.
        silu: whether SiLU comes before the rotation.
    """

    x: Tensor
    packed: Tensor
    w_scale: Tensor
    bias: Tensor | None
    geometry: ConvGeometry
    rotation: Rotation | None = None
    norm: GroupNorm | None = None
    silu: bool = False


class ConvBackend(Protocol):
    """Packs the weight of a convolution once, and computes the convolution at every call."""

    name: ClassVar[str]
    limits: ClassVar[Limits]

    def pack_weight(self, weight: QuantizedWeight, kernel_shape: Sizes, groups: int) -> Tensor:
        """The integers in the layout of the kernel.

        Args:
            weight: [N, K], rows are output channels.
            kernel_shape: [N, C / groups, *kernel], how a row of K numbers lies in the kernel.
            groups: of the convolution.
        """

    def unpack_weight(self, packed: Tensor, kernel_shape: Sizes) -> Tensor:
        """The integers out of that layout, int8 [N, K]."""

    def convolve(self, call: ConvCall) -> Tensor:
        """Compute a convolution as `kernels.int8_conv.reference.int8_conv` defines it.

        Args:
            call: the input, which is float, and what it meets.

        Returns:
            [B, N, *size] in the input's dtype.
        """


@dataclass(frozen=True)
class ReferenceConv:
    """The definition: slow, and exact on any device."""

    name: ClassVar[str] = "reference"
    limits: ClassVar[Limits] = Limits(devices=("cpu", "cuda", "xpu", "mps"))

    def pack_weight(self, weight: QuantizedWeight, kernel_shape: Sizes, groups: int) -> Tensor:
        """The integers as a kernel."""
        return weight.qdata.reshape(kernel_shape)

    def unpack_weight(self, packed: Tensor, kernel_shape: Sizes) -> Tensor:
        """The kernel as rows."""
        return packed.flatten(1)

    def convolve(self, call: ConvCall) -> Tensor:
        """By the definition itself."""
        geometry = call.geometry
        return int8_conv(
            call.x,
            call.packed,
            call.w_scale,
            call.bias,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
            rotation=call.rotation,
            norm=call.norm,
            silu=call.silu,
        )


@dataclass(frozen=True)
class CpuConv:
    """int8run's own CPU kernels (`kernels/cpu/conv.h`): pixels quantized in one pass, no copy of the patches.

    Args:
        instructions: name of an instruction set; `auto`: the best that this CPU has.
    """

    instructions: str = AUTO
    name: ClassVar[str] = "cpu"
    limits: ClassVar[Limits] = Limits(
        devices=("cpu",),
        kernel_instructions=tuple(INSTRUCTION_SETS),
        needs_compiler=True,
        fuses_silu=True,
        fuses_norm=True,
    )

    @property
    def instruction_set(self) -> str:
        """Name of the instruction set that the kernels are built for.

        Raises:
            BackendError: when the kernels cannot be built.
        """
        try:
            return load_conv_library(self.instructions).instructions
        except BuildError as error:
            raise BackendError(f"INT8 convolutions on the CPU: {error}") from error

    def pack_weight(self, weight: QuantizedWeight, kernel_shape: Sizes, groups: int) -> Tensor:
        """Panels of 64 output channels, tap after tap."""
        return conv.pack_conv_weight(weight.qdata.reshape(kernel_shape), groups)

    def unpack_weight(self, packed: Tensor, kernel_shape: Sizes) -> Tensor:
        """The panels as rows."""
        outputs, channels, *kernel = kernel_shape
        return conv.unpack_conv_weight(packed, outputs, channels, kernel).flatten(1)

    def convolve(self, call: ConvCall) -> Tensor:
        """By the CPU's kernels; the result is channels-last."""
        geometry, rotation = call.geometry, call.rotation
        return conv.int8_conv(
            call.x,
            call.packed,
            call.w_scale,
            call.bias,
            kernel=geometry.kernel,
            stride=geometry.stride,
            padding=geometry.padding,
            rotation=0 if rotation is None else rotation.group,
            sylvester=rotation is not None and rotation.sylvester,
            norm=call.norm,
            silu=call.silu,
            instructions=self.instructions,
        )


@functools.cache
def load_triton_kernel() -> ModuleType:
    """The module that launches the Triton kernels; machines without a GPU need not have Triton."""
    from int8run.kernels.int8_conv import kernel

    return kernel


@dataclass(frozen=True)
class TritonConv:
    """int8run's own GPU kernels, an implicit GEMM over taps. Nothing of it has run on a GPU yet.

    Args:
        architecture: of the GPU, such as `sm_90`; the kernel's tiles follow from it. Not part of its name in
            tables of measured times, which are for one GPU anyway.
    """

    architecture: str = field(repr=False)
    name: ClassVar[str] = "triton"
    limits: ClassVar[Limits] = Limits(
        devices=("cuda",),
        cuda_capability=(8, 0),
        amd_architectures=AMD_ARCHITECTURES,
        python_packages=("triton",),
        fuses_silu=True,
    )

    def pack_weight(self, weight: QuantizedWeight, kernel_shape: Sizes, groups: int) -> Tensor:
        """Rows of taps, each with the sums of its taps."""
        packed: Tensor = load_triton_kernel().pack_weight(weight.qdata.reshape(kernel_shape))
        return packed

    def unpack_weight(self, packed: Tensor, kernel_shape: Sizes) -> Tensor:
        """The integers of the rows."""
        kernel: Tensor = load_triton_kernel().unpack_weight(packed, kernel_shape)
        return kernel.flatten(1)

    def convolve(self, call: ConvCall) -> Tensor:
        """By the GPU's kernels; the result is channels-last."""
        x, geometry = call.x, call.geometry
        outputs, channels = call.w_scale.shape[0], x.shape[1] // geometry.groups
        pixels = x.shape[0] * prod(geometry.compute_output_size(x.shape[2:]))
        y: Tensor = load_triton_kernel().int8_conv(
            call.x,
            call.packed,
            call.w_scale,
            call.bias,
            kernel_shape=(outputs, channels, *geometry.kernel),
            stride=geometry.stride,
            padding=geometry.padding,
            groups=geometry.groups,
            rotation=call.rotation,
            silu=call.silu,
            tile=choose_conv_tile(self.architecture, pixels),
        )
        return y


def choose_conv_backend(device: torch.device, asked: str, instructions: str = AUTO) -> ConvBackend:
    """What computes the INT8 convolutions on a device: its kernels, or where there are none the definition.

    Args:
        device: where the layers run.
        asked: name of the backend of the settings; `reference` gives the definition.
        instructions: of the CPU's kernels.
    """
    definition = ReferenceConv()
    if asked == definition.name:
        return definition
    backend: ConvBackend = definition
    if device.type == "cpu":
        backend = CpuConv(instructions)
    elif device.type == "cuda":
        backend = TritonConv(get_gpu_architecture(device))
    missing = backend.limits.unsupported_reasons(device)
    if not missing:
        try:
            log.debug("INT8 convolutions by %s %s", backend.name, find_instruction_set(backend))
        except BackendError as error:
            missing = [str(error)]
    if not missing and backend is not definition:
        return backend
    reasons = "; ".join(missing) or "there are no kernels for it"
    report_definition(device, reasons)
    return definition


@functools.cache
def report_definition(device: torch.device, reasons: str) -> None:
    """Say once that the slow definition computes the INT8 convolutions on a device, and why."""
    log.warning("INT8 convolutions have none but the slow definition on %s: %s", device, reasons)


def is_stopgap(backend: ConvBackend, asked: str) -> bool:
    """Whether the slow definition stands in for kernels: of real sizes, its times take hours.

    Args:
        backend: that computes the convolutions.
        asked: name of the backend of the settings, which may be the definition.
    """
    return isinstance(backend, ReferenceConv) and asked != backend.name
