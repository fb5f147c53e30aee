"""An INT8 layer for weights with a scale per block of input features, as some checkpoints have them.

`int8run.text_encoders.build` uses it for the format int8_blockwise.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

from int8run.backends.base import Backend
from int8run.kernels.dequantize.reference import infer_block_shape
from int8run.layers.int8_linear import BackendLayer, to_float32_bias
from int8run.layers.weight_only import PackedLayer
from int8run.quant.packed_weight import PackedWeight
from int8run.quant.weight import QuantizedWeight


class BlockInt8Linear(BackendLayer):
    """`nn.Linear` in W8A8 with a scale per block of input features.

    Each block is a product of its own on one backend; they are summed in float32. The input is quantized per
    row and block, as ComfyUI's QuantOps does for int8_blockwise. A block of the weight may be one row high,
    several, or all of them.

    Args:
        layer: an int8 weight with any scales, outlier transform and bias.
        backend: runs the products.
    """

    backend: Backend
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: PackedLayer, backend: Backend):
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, PackedWeight) and weight.storage_dtype == "int8", "it takes int8 weights"
        assert weight.scale is not None, "int8 weights have scales"
        self.out_features, self.in_features = rows, columns = weight.qdata.shape
        self.backend, self.transform = backend, layer.transform
        height, width = infer_block_shape(weight.qdata.shape, weight.scale.shape, weight.block_size or None)
        self.block = width
        grid = weight.scale.detach().float().reshape(ceil(rows / height), ceil(columns / width))
        scale = grid.repeat_interleave(height, dim=0)[:rows].T.contiguous()  # [blocks, N]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", to_float32_bias(layer.bias))
        blocks = weight.qdata.split(width, dim=1)  # int8 [N, width] each
        for i, (qdata, row_scale) in enumerate(zip(blocks, scale, strict=True)):
            packed = backend.pack_weight(QuantizedWeight(qdata.contiguous(), row_scale[:, None]))
            self.register_buffer(f"packed_{i}", packed, persistent=False)

    @property
    def packed(self) -> Iterator[Tensor]:
        """Each block of columns in the backend's layout."""
        return (getattr(self, f"packed_{i}") for i in range(len(self.scale)))

    @property
    def widths(self) -> Iterator[int]:
        """Columns of each block; the last may have fewer."""
        return (min(self.block, self.in_features - start) for start in range(0, self.in_features, self.block))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in x's dtype."""
        rows = self.transform.transform_input(x.reshape(-1, self.in_features))  # [M, K]
        if self.bias is None:
            y = rows.new_zeros((len(rows), self.out_features), dtype=torch.float32)
        else:
            y = self.bias.repeat(len(rows), 1)  # float32 [M, N]
        for block, packed, scale in zip(rows.split(self.block, dim=1), self.packed, self.scale, strict=True):
            quantized = self.backend.quantize(block.contiguous())
            y += self.backend.linear(quantized, packed, scale, dtype=torch.float32)
        y = y.to(x.dtype)
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)

    @torch.no_grad()
    def dequantize_weight(self) -> Tensor:
        """The weight as floats, without the transform. Returns float32 [N, K]."""
        blocks = []
        for packed, scale, width in zip(self.packed, self.scale, self.widths, strict=True):
            # the integers of a block are its products with the unit vectors
            units = self.backend.quantize(torch.eye(width, device=scale.device))
            products = self.backend.linear(units, packed, torch.ones_like(scale), dtype=torch.float32)
            blocks.append((products.round() * scale).T)  # [width, N] -> [N, width]
        return self.transform.restore_weight(torch.cat(blocks, dim=1))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, block={self.block}, backend={self.backend.name}"
