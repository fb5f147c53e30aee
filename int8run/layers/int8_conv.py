"""The INT8 layer that takes the place of an `nn.Conv2d` or `nn.Conv3d`.

Like `Int8Linear`, it holds what computes it and no model or config, and stays visible to
`torch.compile(fullgraph=True)`. `find_conv_obstacle` says which convolutions have no such layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8run.backends.convolution import ConvBackend, ConvCall, describe_sizes, read_geometry
from int8run.kernels.int8_conv.reference import GroupNorm
from int8run.layers.int8_linear import (
    DTYPE_MARKER,
    BackendLayer,
    Int8Linear,
    QuantizedLayer,
    check_has_integers,
    get_linear,
    overwrite,
)
from int8run.layers.low_rank_branch import BranchStrengths
from int8run.quant.grouped_weight import LayerWeight
from int8run.quant.weight import QuantizedWeight

# their plain forms; subclasses may compute something else
CONV_CLASSES = (nn.Conv2d, nn.Conv3d)
DEPTHWISE = "a depthwise convolution: each output is a sum of few products"
FLOAT_CONVOLUTIONS = {2: F.conv2d, 3: F.conv3d}  # by the dimensions of what they move over


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of any kind, transposed ones and subclasses included."""
    return isinstance(module, nn.modules.conv._ConvNd)


def get_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d | nn.Conv3d:
    """The Linear or the convolution of that name.

    Raises:
        TypeError: when the module of that name is neither.
    """
    module = model.get_submodule(name)
    if isinstance(module, CONV_CLASSES):
        return module
    return get_linear(model, name)


def count_conv_inputs(conv: Any) -> int:
    """How many numbers each output of a convolution is summed from: K of its weight as a matrix."""
    kernel_size: int = prod(conv.kernel_size)
    return int(conv.in_channels) // int(conv.groups) * kernel_size


def describe_conv(conv: Any) -> str:
    """Kernel, stride and groups of a convolution of any kind, for people."""
    return describe_sizes(tuple(conv.kernel_size), tuple(conv.stride), int(conv.groups))


def find_conv_obstacle(conv: nn.Module, *, known_subclasses: Sequence[str] = ()) -> str | None:
    """Why a convolution has no INT8 form; None: it has one.

    Args:
        conv: a convolution of any kind.
        known_subclasses: names of subclasses that only change their input before they convolve it.
    """
    name = type(conv).__name__
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    if not isinstance(conv, CONV_CLASSES):
        return f"a {name}, INT8 has Conv2d and Conv3d"
    if type(conv) not in CONV_CLASSES and name not in known_subclasses:
        return f"a {name}, which may compute something else than its base class"
    if any(step != 1 for step in conv.dilation):
        return f"a dilated convolution (dilation {max(conv.dilation)})"
    if conv.padding_mode != "zeros":
        return f"a convolution with padding_mode={conv.padding_mode}"
    if conv.groups > 1 and conv.in_channels == conv.groups:
        return DEPTHWISE
    try:
        read_geometry(conv)
    except ValueError as error:
        return str(error)
    return None


class ConvBranch(BranchStrengths):
    """The low-rank changes of one convolution at run time: a convolution to the ranks, and a 1x1 one back.

    Args:
        parts: (lora_A [r, K], lora_B [N, r]) of each LoRA, its alpha / r multiplied in; K as the weight's.
        layer: beside which it is.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], layer: "Int8Conv"):
        super().__init__([lora_A.shape[0] for lora_A, _ in parts], layer.scale.device)
        self.geometry = layer.geometry
        device, dtype, groups = layer.scale.device, layer.dtype, layer.geometry.groups
        lora_A = torch.cat([lora_A.float() for lora_A, _ in parts])  # [R, K], R the sum of all ranks
        lora_B = torch.cat([lora_B.float() for _, lora_B in parts], dim=1)  # [N, R]
        kernel_ones = (1,) * len(self.geometry.kernel)
        down = lora_A.unflatten(1, layer.kernel_shape[1:])  # [R, C / groups, *kernel]
        # each group reads its own channels with the same factors
        down = down.repeat(groups, *(1,) * (down.dim() - 1))
        up = lora_B.reshape(*lora_B.shape, *kernel_ones)  # [N, R, 1, 1]
        self.register_buffer("lora_A", down.to(device, dtype), persistent=False)
        self.register_buffer("lora_B", up.to(device, dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, *size] -> [B, N, *size], in the branch's dtype."""
        geometry = self.geometry
        convolve = FLOAT_CONVOLUTIONS[len(geometry.kernel)]
        hidden = convolve(
            x.to(self.lora_A.dtype),
            self.lora_A,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
        )  # [B, groups * R, *size]
        strengths = self.strengths.to(hidden.dtype).repeat(geometry.groups)
        hidden = hidden * strengths.view(-1, *(1,) * len(geometry.kernel))
        return convolve(hidden, self.lora_B, groups=geometry.groups)


@dataclass(frozen=True)
class DeferredSteps:
    """A SiLU and what precedes it, computed by a convolution on its way to bytes; modules before it
    hand their input on.

    Args:
        norm: which keeps its tensors and its place in the model; None: the norm is computed before.
    """

    norm: nn.GroupNorm | None

    @property
    def label(self) -> str:
        """`GroupNorm, SiLU` or `SiLU`."""
        return "SiLU" if self.norm is None else "GroupNorm, SiLU"

    def read_norm(self) -> GroupNorm | None:
        """The norm as kernels take it."""
        if self.norm is None:
            return None
        return GroupNorm(self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps)

    def apply(self, x: Tensor) -> Tensor:
        """The same in float; x: [B, C, *size]."""
        norm = self.norm
        if norm is not None:
            x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(x)


class Int8Conv(BackendLayer):
    """`nn.Conv2d` or `nn.Conv3d` in W8A8: a scale for each output channel, the input quantized as the kernel
    says.

    The adapter is set from outside, by LoRAs, and what is deferred to it by `layers.fused_group_norm`.

    Args:
        layer: quantized weight [N, K] and bias, K the channels of a group times the size of the kernel.
        backend: computes the convolution.
        conv: the float convolution, of which the geometry is taken.
        dtype: of the float model.
    """

    backend: ConvBackend
    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    # few pixels are computed like many; LoRAs ask an INT8 layer for it
    float_weight = None

    def __init__(
        self, layer: QuantizedLayer, backend: ConvBackend, conv: nn.Conv2d | nn.Conv3d, dtype: torch.dtype
    ):
        super().__init__()
        weight = check_has_integers(layer.weight)
        self.out_features, self.in_features = weight.shape
        self.backend = backend
        self.geometry = read_geometry(conv)
        channels = conv.in_channels // conv.groups
        self.kernel_shape = (self.out_features, channels, *self.geometry.kernel)
        self.transform = layer.transform
        self.dtype = dtype
        self.adapter: ConvBranch | None = None
        self.deferred: DeferredSteps | None = None
        self.register_buffer(DTYPE_MARKER, torch.empty(0, dtype=dtype), persistent=False)
        packed = backend.pack_weight(weight, self.kernel_shape, conv.groups)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", weight.scale[:, 0].contiguous())  # float32 [N]
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the float weight: [N, C / groups, *kernel]."""
        return self.kernel_shape

    def make_branch(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> ConvBranch:
        """A branch for low-rank changes, to be put beside the layer by `set_adapter`.

        Args:
            pairs: lora_A [r, K] and lora_B [N, r] of each.
        """
        return ConvBranch(pairs, self)

    @property
    def bits(self) -> int:
        """Stored bits of a weight."""
        return 8

    def set_weight(self, weight: LayerWeight) -> None:
        """Replace the weight by another of its shape."""
        packed = self.backend.pack_weight(check_has_integers(weight), self.kernel_shape, self.geometry.groups)
        self.packed = overwrite(self.packed, packed)
        self.scale = overwrite(self.scale, weight.scale[:, 0])

    def set_adapter(self, adapter: ConvBranch | None) -> None:
        """Put a low-rank branch beside the layer in place of the one that is there; None: take it off."""
        self.adapter = adapter

    def read_qdata(self) -> Tensor:
        """The weight's integers out of the backend's layout. int8 [N, K]."""
        return self.backend.unpack_weight(self.packed, self.kernel_shape).contiguous()

    def read_quantized_weight(self) -> QuantizedWeight:
        """Integers and scales of the weight."""
        return QuantizedWeight(self.read_qdata(), self.scale[:, None].clone())

    def read_stored_weight(self) -> LayerWeight:
        """The weight as `set_weight` takes it."""
        return self.read_quantized_weight()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, *size], or without B -> [B, N, *size], in x's dtype."""
        return self._forward(x, self.deferred)

    def forward_isolated(self, x: Tensor) -> Tensor:
        """`forward` of this layer alone, for measurements: norm and activation ran before it."""
        return self._forward(x, deferred=None)

    def _forward(self, x: Tensor, deferred: DeferredSteps | None) -> Tensor:
        has_batch = x.dim() == len(self.kernel_shape)
        batch = x if has_batch else x[None]
        branch = self._active_branch()
        if branch is not None and deferred is not None:
            # the branch reads what the convolution reads
            batch, deferred = deferred.apply(batch), None
        _, rotation = self.transform.get_input_steps()
        call = ConvCall(
            x=batch,
            packed=self.packed,
            w_scale=self.scale,
            bias=self.bias,
            geometry=self.geometry,
            rotation=rotation,
            norm=None if deferred is None else deferred.read_norm(),
            silu=deferred is not None,
        )
        y = self.backend.convolve(call)
        if branch is not None:
            y = y + branch(batch).to(y.dtype)
        return y if has_batch else y[0]

    def _active_branch(self) -> ConvBranch | None:
        # not read in compiled code: torch.compile would recompile whenever it changes
        if self.adapter is not None and not torch.compiler.is_compiling() and self.adapter.is_idle:
            return None
        return self.adapter

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        sizes = f"{self.kernel_shape[1] * self.geometry.groups}, {self.out_features}"
        return f"{sizes}, {self.geometry.label}, backend={self.backend.name}"


# a layer that LoRAs, files and measurements treat alike: it has a weight as a matrix, scales and a bias
Int8Layer = Int8Linear | Int8Conv
