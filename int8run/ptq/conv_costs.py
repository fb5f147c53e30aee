"""What a rotation or a LoRA branch costs a convolution in time, measured on this machine and remembered.

`outlier=auto` and `lora.mode=auto` ask, as they ask `layer_costs` about Linears; costs are kept in the same
file.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from int8run.backends.base import Backend
from int8run.backends.convolution import ConvBackend, choose_conv_backend, is_stopgap, read_geometry
from int8run.kernels.cpu.instructions import AUTO
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_conv import Int8Conv
from int8run.layers.int8_linear import QuantizedLayer
from int8run.outlier.base import OutlierTransform
from int8run.ptq.layer_costs import (
    LayerCosts,
    describe_convolution,
    describe_plain_convolution,
    describe_transform,
)
from int8run.quant.weight import quantize_weight


class ConvCosts(LayerCosts):
    """Times of a changed INT8 convolution over those of the plain one, each measured once.

    Args:
        backend: of the config; its name decides which kernels of convolutions run.
        device: where the layers run.
        dtype: of the float model.
    """

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype):
        super().__init__(backend, device, dtype)
        self.conv_backend: ConvBackend | None = None  # chosen when the first convolution comes

    def get_transform_ratio(
        self, transform: OutlierTransform, conv: nn.Conv2d | nn.Conv3d, input_shape: Sequence[int]
    ) -> float:
        """The ratio for a convolution with a transform; it does not depend on the numbers of either.

        Args:
            transform: of the layer.
            conv: has the shape; its weight need not be in memory.
            input_shape: [B, C, *size].
        """
        steps = describe_transform(transform)
        if not steps:
            return 1.0
        if self.conv_backend is None:
            instructions = getattr(self.backend, "instructions", AUTO)
            self.conv_backend = choose_conv_backend(self.device, self.backend.name, instructions)
        if is_stopgap(self.conv_backend, self.backend.name):
            return 1.0
        shape = describe_plain_convolution(
            read_geometry(conv), conv.out_channels, input_shape, self.conv_backend
        )
        key = f"cost of {steps} | {shape}"
        known = self.look_up(key)
        if known is not None:
            return known
        num_inputs = conv.weight[0].numel()
        weight = quantize_weight(self.random_tensor(conv.out_channels, num_inputs))
        plain = QuantizedLayer(weight, OutlierTransform(), bias=None)
        plain_conv = Int8Conv(plain, self.conv_backend, conv, self.dtype).to(self.device)
        changed = QuantizedLayer(weight, transform.to(self.device), bias=None)
        changed_conv = Int8Conv(changed, self.conv_backend, conv, self.dtype).to(self.device)
        x = self.random_tensor(*input_shape).to(self.dtype)
        return self.measure_ratio(key, plain_conv, changed_conv, x)

    def get_branch_ratio(self, layer: Int8Conv, rank: int, input_shape: Sequence[int]) -> float:
        """The ratio for a convolution with a low-rank branch; it does not depend on the branch's numbers.

        Args:
            layer: of that shape, on the backend that runs it; it is not changed.
            rank: of all LoRAs together.
            input_shape: [B, C, *size].
        """
        if is_stopgap(layer.backend, self.backend.name):
            return 1.0
        key = f"cost of a branch of rank {rank} | {describe_convolution(layer, input_shape)}"
        known = self.look_up(key)
        if known is not None:
            return known
        plain: Any = copy_sharing_tensors(layer).to(self.device)
        changed: Any = copy_sharing_tensors(layer).to(self.device)
        lora_A = self.random_tensor(rank, layer.in_features)
        lora_B = self.random_tensor(layer.out_features, rank)
        branch = changed.make_branch([(lora_A, lora_B)])
        branch.set_strengths([1.0])
        plain.set_adapter(None)
        changed.set_adapter(branch)
        x = self.random_tensor(*input_shape).to(self.dtype)
        return self.measure_ratio(key, plain, changed, x)
