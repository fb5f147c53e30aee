"""Layers whose weight stays in memory as a checkpoint has it: in codes, which a product or a look-up turns into numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.backends.base import Backend, format_version
from int8run.kernels.dequantize import eager, reference
from int8run.kernels.dequantize.reference import infer_block_shape
from int8run.kernels.quantize_rowwise.reference import TINY
from int8run.layers.int8_linear import KeepsDtypes
from int8run.outlier.base import OutlierTransform
from int8run.quant.packed_weight import PackedWeight, round_up
from int8run.quant.weight import QuantizedWeight

# numbers of a weight that are floats at a time: on a CPU what its cache holds, elsewhere what keeps launches few
MAX_FLOAT_NUMBERS = {"cpu": 2**20, "cuda": 2**24}
# torch's fp8 product: the GPUs that have it, what cuBLAS wants N and K to be multiples of, and what the input is rounded to
SCALED_MM, SCALED_MM_CAPABILITY, SCALED_MM_MULTIPLE = "scaled_mm", (8, 9), 16
E4M3, E4M3_MAX = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class PackedLayer:
    """One layer as it is stored, before it is bound to a kernel."""

    weight: PackedWeight  # in the transform's basis
    transform: OutlierTransform
    bias: Tensor | None


class WeightOnlyLayer(KeepsDtypes):
    """A coded weight in buffers, and the transform in whose basis it is.

    Args:
        dtype: in which the layer computes.
        kernels: what makes numbers of the codes: `eager` (torch), `reference` (its definition, slower) or `triton`.
    """

    qdata: Tensor
    scale: Tensor | None
    global_scale: Tensor | None

    def __init__(self, weight: PackedWeight, transform: OutlierTransform, dtype: torch.dtype, kernels: str):
        super().__init__()
        weight = weight.unswizzle_scales()  # so that some rows can be read without the others
        self.transform, self.dtype, self.kernels = transform, dtype, kernels
        self.shape, self.block, self.high_first = weight.shape, weight.block_size, weight.high_nibble_first
        self.register_buffer("qdata", weight.qdata.detach().contiguous(), persistent=False)
        self.register_buffer(
            "scale", None if weight.scale is None else weight.scale.detach().contiguous(), persistent=False
        )
        self.register_buffer("global_scale", weight.global_scale, persistent=False)

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight, in the transform's basis; block scales lie in rows."""
        return PackedWeight(
            self.qdata,
            self.scale,
            self.shape,
            self.global_scale,
            self.block,
            is_swizzled=False,
            high_nibble_first=self.high_first,
        )

    def iter_float_rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight's numbers, some rows after others: at most `FLOAT_NUMBERS`, and at least as many rows as share a scale."""
        weight, operators = self.packed_weight, get_operators(self.kernels)
        if (
            weight.scale is None
        ):  # a plain cast, by the same operators: torch's own conversion is slow on CPUs
            weight = replace(weight, scale=torch.ones((), device=self.qdata.device))
        height = rows_per_scale(weight)
        numbers = MAX_FLOAT_NUMBERS.get(self.qdata.device.type, MAX_FLOAT_NUMBERS["cuda"])
        rows = max(numbers // self.shape[1] // height, 1) * height
        for start in range(0, self.shape[0], rows):
            yield slice_rows(weight, start, min(start + rows, self.shape[0]), height).dequantize(
                dtype, operators
            )

    @torch.no_grad()
    def dequantize_weight(self) -> Tensor:
        """The weight's numbers, without the transform. Returns float32 [N, K]."""
        return torch.cat(
            [self.transform.restore_weight(rows) for rows in self.iter_float_rows(torch.float32)]
        )


class WeightOnlyLinear(WeightOnlyLayer):
    """`nn.Linear` with a weight in codes. Each call makes numbers of some rows, multiplies them, and goes on to the next.

    Args:
        layer: coded weight, outlier transform and bias.
        dtype: dtype of the float model.
        kernels: see `Coded`; or `scaled_mm`, torch's fp8 product, for weights that `scaled_mm_refuses` lets pass. It rounds the
            input to e4m3: each row for itself where the weight has a scale per row, else all of it with one scale.
    """

    bias: Tensor | None

    def __init__(self, layer: PackedLayer, dtype: torch.dtype, kernels: str = "eager"):
        super().__init__(
            pad_for_scaled_mm(layer.weight) if kernels == SCALED_MM else layer.weight,
            layer.transform,
            dtype,
            kernels,
        )
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in x's dtype."""
        rows = self.transform.transform_input(x.reshape(-1, self.in_features)).to(self.dtype)
        y = (self.scaled_mm(rows) if self.kernels == SCALED_MM else self.product(rows)).to(x.dtype)
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)

    def product(self, x: Tensor) -> Tensor:
        """In floats. x: [M, K] -> [M, N], in the layer's dtype."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        parts, start = [], 0
        for weight in self.iter_float_rows(self.dtype):
            parts.append(F.linear(x, weight, None if bias is None else bias[start : start + len(weight)]))
            start += len(weight)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def scaled_mm(self, x: Tensor) -> Tensor:
        """In fp8. x: [M, K] -> float32 [M, N].

        All scales follow the product, because torch's own scaling per row takes weights in e4m3 alone and gives bfloat16 alone on
        most GPUs, and some have none.
        """
        q, scale = quantize_fp8(x, self.scale is not None and self.scale.numel() > 1)
        q = F.pad(q.view(torch.uint8), (0, self.qdata.shape[1] - self.in_features)).view(
            E4M3
        )  # torch pads no fp8
        one = torch.ones((), device=x.device)
        y = torch._scaled_mm(q, self.qdata.T, one, one, out_dtype=torch.float32).mul_(scale)
        y = (
            y[:, : self.out_features]
            if self.scale is None
            else y.mul_(self.scale.flatten())[:, : self.out_features]
        )
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed_weight.storage_dtype}, kernels={self.kernels}"


class WeightOnlyEmbedding(WeightOnlyLayer):
    """`nn.Embedding` with a table in codes. Only the rows that are looked up become numbers.

    It has no `weight`: a table that its model reads in another way (CLIP's positions, T5's relative bias) must stay `nn.Embedding`.

    Args:
        weight: the table, a row for each token.
        dtype: dtype of the float model.
        padding_idx: kept for those who ask; it says something about gradients only.
        embed_scale: multiplied to each row in the model's dtype, as Gemma 3's embedding does.
    """

    def __init__(
        self,
        weight: PackedWeight,
        transform: OutlierTransform,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
    ):
        super().__init__(weight, transform, dtype, "eager")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.embed_scale = padding_idx, embed_scale

    def forward(self, index: Tensor) -> Tensor:
        """index: integers [...] -> [..., embedding_dim]."""
        rows = self.packed_weight.select_rows(index.flatten()).dequantize(
            operators=get_operators(self.kernels)
        )
        rows = self.transform.restore_weight(rows).to(self.dtype)
        if self.embed_scale != 1:
            rows = rows * torch.tensor(self.embed_scale, dtype=self.dtype, device=rows.device)
        return rows.reshape(*index.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed_weight.storage_dtype}"


class BlockInt8Linear(KeepsDtypes):
    """`nn.Linear` in W8A8 with a scale per block of input features: on one backend a product for each block, summed in float32.

    The input is quantized per row and block, as QuantOps does for int8_blockwise. Blocks of all rows, of some, or of one.

    Args:
        layer: an int8 weight with any scales, outlier transform and bias.
        backend: runs the products.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: PackedLayer, backend: Backend):
        super().__init__()
        qdata, scale = layer.weight.qdata, layer.weight.scale
        assert layer.weight.storage_dtype == "int8" and scale is not None, (
            "BlockInt8Linear takes int8 weights"
        )
        rows, columns = qdata.shape
        self.out_features, self.in_features = rows, columns
        self.backend, self.transform = backend, layer.transform
        height, self.block = infer_block_shape(qdata.shape, scale.shape, layer.weight.block_size or None)
        grid = scale.detach().float().reshape(ceil(rows / height), ceil(columns / self.block))
        scale = grid.repeat_interleave(height, dim=0)[:rows].T.contiguous()  # [blocks, N]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        for i, (codes, row_scale) in enumerate(zip(qdata.split(self.block, dim=1), scale, strict=True)):
            packed = backend.pack_weight(QuantizedWeight(codes.contiguous(), row_scale[:, None]))
            self.register_buffer(f"packed_{i}", packed, persistent=False)

    @property
    def packed(self) -> Iterator[Tensor]:
        """Each block of columns in the backend's layout."""
        return (getattr(self, f"packed_{i}") for i in range(len(self.scale)))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in x's dtype."""
        rows = self.transform.transform_input(x.reshape(-1, self.in_features))
        y = (
            rows.new_zeros((len(rows), self.out_features), dtype=torch.float32)
            if self.bias is None
            else self.bias.repeat(len(rows), 1)
        )
        for block, packed, scale in zip(rows.split(self.block, dim=1), self.packed, self.scale, strict=True):
            quantized = self.backend.quantize(block.contiguous())
            y += self.backend.linear(quantized, packed, scale, dtype=torch.float32)
        y = y.to(x.dtype)
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)

    @torch.no_grad()
    def dequantize_weight(self) -> Tensor:
        """The weight's numbers, without the transform: the blocks' integers are their products with the unit vectors. float32 [N, K]."""
        blocks = []
        for packed, scale, width in zip(self.packed, self.scale, self.widths, strict=True):
            unit = self.backend.quantize(torch.eye(width, device=scale.device))
            integers = self.backend.linear(unit, packed, torch.ones_like(scale), dtype=torch.float32).round()
            blocks.append((integers * scale).T)
        return self.transform.restore_weight(torch.cat(blocks, dim=1))

    @property
    def widths(self) -> Iterator[int]:
        """Columns of each block; the last may have fewer."""
        return (min(self.block, self.in_features - start) for start in range(0, self.in_features, self.block))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, backend={self.backend.name}"


def get_operators(kernels: str) -> ModuleType:
    """The module of `kernels/dequantize` that is meant."""
    if kernels == "triton":
        # imported where it runs: a CPU has no use for Triton
        from int8run.kernels.dequantize import kernel

        return kernel
    return reference if kernels == "reference" else eager


def rows_per_scale(weight: PackedWeight) -> int:
    """How many neighbouring rows share a scale; 1 as well where all of them do, because that scale serves any rows."""
    if weight.scale is None or weight.scale.numel() == 1 or weight.storage_dtype in ("mxfp8", "nvfp4"):
        return 1
    return infer_block_shape(weight.qdata.shape, weight.scale.shape, weight.block_size or None)[0]


def slice_rows(weight: PackedWeight, start: int, stop: int, height: int) -> PackedWeight:
    """Neighbouring rows without a copy.

    Args:
        weight: block scales lie in rows.
        start: a multiple of the height.
        height: `shared_rows(weight)`.
    """
    scale = weight.scale
    if scale is not None and scale.numel() > 1:
        scale = scale[start // height : ceil(stop / height)]
    return replace(weight, qdata=weight.qdata[start:stop], scale=scale, shape=(stop - start, weight.shape[1]))


def is_rowwise(weight: PackedWeight) -> bool:
    """Whether an int8 or fp8 weight has one scale, one for each output row, or none, so that a product can apply it to its sums."""
    if weight.storage_dtype not in ("int8", "fp8"):
        return False
    if weight.scale is None or weight.scale.numel() == 1:
        return True
    height, width = infer_block_shape(weight.qdata.shape, weight.scale.shape, weight.block_size or None)
    return height == 1 and width >= weight.qdata.shape[1]


def to_quantized_weight(weight: PackedWeight) -> QuantizedWeight:
    """An int8 weight with one scale, or one for each output row, as `Int8Linear` takes it.

    Raises:
        ValueError: for any other.
    """
    if weight.storage_dtype != "int8" or weight.scale is None or not is_rowwise(weight):
        scales = None if weight.scale is None else list(weight.scale.shape)
        raise ValueError(
            f"the weight is {weight.storage_dtype} with scales {scales}; an INT8 layer takes int8 with one scale or one per row"
        )
    scale = weight.scale.detach().float().reshape(-1, 1).expand(len(weight.qdata), 1)
    return QuantizedWeight(weight.qdata.contiguous(), scale.contiguous())


def scaled_mm_unsupported_reason(weight: PackedWeight, device: torch.device) -> str | None:
    """Why torch's fp8 product cannot take a weight on a device; None when it can."""
    if weight.storage_dtype != "fp8" or not is_rowwise(weight):
        what = weight.storage_dtype if weight.storage_dtype != "fp8" else "fp8 with scales per block"
        return f"scaled_mm takes fp8 weights with one scale or one per output row, this one is {what}"
    if device.type not in ("cpu", "cuda"):
        return f"scaled_mm runs on cpu and cuda, not on {device.type}"
    if device.type == "cuda" and (have := torch.cuda.get_device_capability(device)) < SCALED_MM_CAPABILITY:
        return f"scaled_mm needs compute capability {format_version(SCALED_MM_CAPABILITY)}, this GPU has {format_version(have)}"
    return None


def pad_for_scaled_mm(weight: PackedWeight) -> PackedWeight:
    """The same fp8 weight, N and K filled up with zeros to what cuBLAS wants, and its scales in float32."""
    rows, columns = weight.qdata.shape
    more = round_up(rows, SCALED_MM_MULTIPLE) - rows
    padding = (0, round_up(columns, SCALED_MM_MULTIPLE) - columns, 0, more)
    qdata = F.pad(weight.qdata.view(torch.uint8), padding).view(weight.qdata.dtype)  # torch pads no fp8
    scale = None if weight.scale is None else weight.scale.float().flatten()
    scale = scale if scale is None or scale.numel() == 1 else F.pad(scale, (0, more), value=1.0)
    return replace(weight, qdata=qdata, scale=scale)


def quantize_fp8(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """Round to e4m3 with a scale for each row, or with one: `scale = absmax / 448`, ties to even.

    Args:
        x: [M, K], any float dtype; the arithmetic is float32.

    Returns:
        q: float8_e4m3fn [M, K], and scale: float32 [M, 1] or [1, 1], so that `x ~ q * scale`.
    """
    x = x.float()
    absmax = x.abs().amax(dim=1, keepdim=True)
    if not per_row and len(x):
        absmax = absmax.amax(dim=0, keepdim=True)
    scale = (absmax / E4M3_MAX).clamp(min=TINY)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale
