"""Layers whose weight stays in memory in the few bits of its checkpoint: int8, fp8, mxfp8, nvfp4, or codes.

Only the weight is quantized: a product or a look-up turns some rows at a time into floats. Text encoders use
these layers (`int8run.text_encoders.build`). The exception is `scaled_mm`, torch's fp8 product, which rounds
the input as well. Which kernel a layer gets is decided by the caller.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import ceil
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.backends.base import format_version
from int8run.kernels.dequantize import eager, reference
from int8run.kernels.dequantize.reference import infer_block_shape
from int8run.kernels.quantize_rowwise.reference import TINY
from int8run.layers.int8_linear import KeepsDtypes, to_float32_bias
from int8run.outlier.base import OutlierTransform
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.packed_weight import PackedWeight, round_up
from int8run.quant.weight import QuantizedWeight

StoredWeight = PackedWeight | GroupedWeight

# how many numbers of a weight are floats at a time: on a CPU as many as its cache holds, on a GPU enough for
# few launches
MAX_FLOAT_NUMBERS = {"cpu": 2**20, "cuda": 2**24}

# torch's fp8 product: its name among the kernels, the GPUs that have it, and the multiple that cuBLAS takes
# for N and K
SCALED_MM, SCALED_MM_CAPABILITY, SCALED_MM_MULTIPLE = "scaled_mm", (8, 9), 16
E4M3, E4M3_MAX = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class PackedLayer:
    """One layer as its checkpoint has it, before it is bound to a kernel.

    Args:
        weight: [N, K], in the transform's basis.
        transform: the outlier transform of its input.
        bias: [N] or None.
    """

    weight: StoredWeight
    transform: OutlierTransform
    bias: Tensor | None


class WeightOnlyLayer(KeepsDtypes):
    """A packed weight in buffers, and the transform in whose basis it is.

    Args:
        weight: [N, K].
        transform: the outlier transform.
        dtype: in which the layer computes.
        kernels: what makes floats of the weight: `eager` (torch), `reference` (its definition, slower) or
            `triton`.
    """

    qdata: Tensor
    scale: Tensor | None

    def __init__(self, weight: StoredWeight, transform: OutlierTransform, dtype: torch.dtype, kernels: str):
        super().__init__()
        if isinstance(weight, PackedWeight):
            weight = weight.unswizzle_scales()  # so that some rows can be read without the others
        self.transform, self.dtype, self.kernels = transform, dtype, kernels
        self.shape = weight.shape
        self.weight_class: Any = type(weight)
        self.facts: dict[str, Any] = {}  # of the weight, besides its tensors
        self.tensor_names: list[str] = []
        for field in fields(weight):
            value = getattr(weight, field.name)
            if value is None or isinstance(value, Tensor):
                tensor = None if value is None else value.detach().contiguous()
                self.tensor_names.append(field.name)
                self.register_buffer(field.name, tensor, persistent=False)
            else:
                self.facts[field.name] = value

    @property
    def stored_weight(self) -> StoredWeight:
        """The weight, in the transform's basis; block scales lie in rows."""
        tensors = {name: self._buffers[name] for name in self.tensor_names}
        weight: StoredWeight = self.weight_class(**tensors, **self.facts)
        return weight

    @property
    def storage_device(self) -> torch.device:
        """Where the weight is."""
        return next(self.buffers()).device

    def iter_float_rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight as floats, some neighbouring rows at a time, in the transform's basis.

        At most MAX_FLOAT_NUMBERS of them, and at least the rows that share a scale.
        """
        weight, device = self.stored_weight, self.storage_device
        if isinstance(weight, PackedWeight) and weight.scale is None:
            # a plain cast, by the same operators: torch's own conversion is slow on CPUs
            weight = replace(weight, scale=torch.ones((), device=device))
        operators = get_operators(self.kernels)
        n_rows, n_columns = self.shape
        height = rows_per_scale(weight)
        max_numbers = MAX_FLOAT_NUMBERS.get(device.type, MAX_FLOAT_NUMBERS["cuda"])
        step = max(max_numbers // n_columns // height, 1) * height
        for start in range(0, n_rows, step):
            rows = slice_rows(weight, start, min(start + step, n_rows), height)
            yield dequantize_rows(rows, dtype, operators)

    @torch.no_grad()
    def dequantize_weight(self) -> Tensor:
        """The weight as floats, without the transform. Returns float32 [N, K]."""
        parts = [self.transform.restore_weight(rows) for rows in self.iter_float_rows(torch.float32)]
        return torch.cat(parts)


class WeightOnlyLinear(WeightOnlyLayer):
    """`nn.Linear` with a packed weight. Each call dequantizes some rows, multiplies them, and goes on to the
    next.

    Args:
        layer: packed weight, outlier transform and bias.
        dtype: dtype of the float model.
        kernels: see `WeightOnlyLayer`; or `scaled_mm`, torch's fp8 product, for weights without a
            `scaled_mm_unsupported_reason`. It rounds the input to e4m3: with a scale per row where the weight
            has one per row, else with a single scale.
    """

    bias: Tensor | None

    def __init__(self, layer: PackedLayer, dtype: torch.dtype, kernels: str = "eager"):
        weight = layer.weight
        if kernels == SCALED_MM and isinstance(weight, PackedWeight):
            weight = pad_for_scaled_mm(weight)
        super().__init__(weight, layer.transform, dtype, kernels)
        self.out_features, self.in_features = layer.weight.shape
        self.register_buffer("bias", to_float32_bias(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in x's dtype."""
        rows = x.reshape(-1, self.in_features)  # [..., K] -> [M, K]
        rows = self.transform.transform_input(rows).to(self.dtype)
        y = self._scaled_mm_product(rows) if self.kernels == SCALED_MM else self._float_product(rows)
        y = y.to(x.dtype)
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)

    def _float_product(self, x: Tensor) -> Tensor:
        """In floats. x: [M, K] -> [M, N], in the layer's dtype."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        parts, start = [], 0
        for weight in self.iter_float_rows(self.dtype):
            stop = start + len(weight)
            part_of_bias = None if bias is None else bias[start:stop]
            parts.append(F.linear(x, weight, part_of_bias))
            start = stop
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=1)

    def _scaled_mm_product(self, x: Tensor) -> Tensor:
        """In fp8. x: [M, K] -> float32 [M, N].

        All scales follow the product: torch's own scaling per row takes only weights in e4m3 and gives only
        bfloat16 on most GPUs, and some GPUs have none.
        """
        has_row_scales = self.scale is not None and self.scale.numel() > 1
        q, scale = quantize_fp8(x, per_row=has_row_scales)
        padding = (0, self.qdata.shape[1] - self.in_features)
        q = F.pad(q.view(torch.uint8), padding).view(E4M3)  # as bytes, because torch does not pad fp8
        one = torch.ones((), device=x.device)
        y = torch._scaled_mm(q, self.qdata.T, one, one, out_dtype=torch.float32).mul_(scale)
        if self.scale is not None:
            y = y.mul_(self.scale.flatten())
        y = y[:, : self.out_features]  # [M, N padded] -> [M, N]
        if self.bias is not None:
            y = y + self.bias
        return y

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        dtype = self.stored_weight.storage_dtype
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {dtype}, kernels={self.kernels}"


class WeightOnlyEmbedding(WeightOnlyLayer):
    """`nn.Embedding` with a packed table. Only the rows that are looked up become floats.

    It has no `weight`: a table that its model reads in another way (CLIP's positions, T5's relative bias)
    must stay `nn.Embedding`.

    Args:
        weight: the table, a row for each token.
        transform: the outlier transform in whose basis the table is.
        dtype: dtype of the float model.
        padding_idx: kept for code that reads it; it affects gradients only.
        embed_scale: multiplied to each row in the model's dtype, as Gemma 3's embedding does.
    """

    def __init__(
        self,
        weight: StoredWeight,
        transform: OutlierTransform,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
    ):
        super().__init__(weight, transform, dtype, kernels="eager")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.embed_scale = padding_idx, embed_scale

    def forward(self, index: Tensor) -> Tensor:
        """index: integers [...] -> [..., embedding_dim]."""
        selected = take_rows(self.stored_weight, index.flatten())
        rows = dequantize_rows(selected, torch.float32, get_operators(self.kernels))
        rows = self.transform.restore_weight(rows).to(self.dtype)
        if self.embed_scale != 1:
            rows = rows * torch.tensor(self.embed_scale, dtype=self.dtype, device=rows.device)
        return rows.reshape(*index.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.stored_weight.storage_dtype}"


def get_operators(kernels: str) -> ModuleType:
    """The module of `kernels/dequantize` that a layer's `kernels` names."""
    if kernels == "triton":
        # imported here, because machines without a GPU need not have Triton
        from int8run.kernels.dequantize import kernel

        return kernel
    return reference if kernels == "reference" else eager


def dequantize_rows(rows: StoredWeight, dtype: torch.dtype, operators: ModuleType) -> Tensor:
    """Some rows of a weight as floats. Codes are decoded by their definition. Returns dtype [n, K]."""
    if isinstance(rows, GroupedWeight):
        return rows.dequantize(dtype)
    return rows.dequantize(dtype, operators)


def take_rows(weight: StoredWeight, index: Tensor) -> StoredWeight:
    """Some rows of a weight in any order. index: int64 [R]."""
    return weight.take_rows(index) if isinstance(weight, GroupedWeight) else weight.select_rows(index)


def rows_per_scale(weight: StoredWeight) -> int:
    """How many neighbouring rows share a scale; 1 also where all rows do, as that scale serves any."""
    if isinstance(weight, GroupedWeight):
        return 1
    if weight.scale is None or weight.scale.numel() == 1 or weight.storage_dtype in ("mxfp8", "nvfp4"):
        return 1
    height, _ = infer_block_shape(weight.qdata.shape, weight.scale.shape, weight.block_size or None)
    return height


def slice_rows(weight: StoredWeight, start: int, stop: int, height: int) -> StoredWeight:
    """Neighbouring rows of a weight, without a copy.

    Args:
        weight: its block scales lie in rows.
        start: first row, a multiple of the height.
        stop: the row after the last.
        height: `rows_per_scale(weight)`.
    """
    if isinstance(weight, GroupedWeight):
        return weight.select_rows(start, stop)
    scale = weight.scale
    if scale is not None and scale.numel() > 1:
        scale = scale[start // height : ceil(stop / height)]
    return replace(weight, qdata=weight.qdata[start:stop], scale=scale, shape=(stop - start, weight.shape[1]))


def is_rowwise(weight: StoredWeight) -> bool:
    """Whether an int8 or fp8 weight has no scale, one, or one per output row.

    Such scales can be applied to the sums of a product.
    """
    if isinstance(weight, GroupedWeight) or weight.storage_dtype not in ("int8", "fp8"):
        return False
    if weight.scale is None or weight.scale.numel() == 1:
        return True
    height, width = infer_block_shape(weight.qdata.shape, weight.scale.shape, weight.block_size or None)
    return height == 1 and width >= weight.qdata.shape[1]


def to_quantized_weight(weight: PackedWeight) -> QuantizedWeight:
    """An int8 weight with one scale, or one per output row, as `Int8Linear` takes it.

    Raises:
        ValueError: for any other.
    """
    if weight.storage_dtype != "int8" or weight.scale is None or not is_rowwise(weight):
        scales = None if weight.scale is None else list(weight.scale.shape)
        raise ValueError(
            f"the weight is {weight.storage_dtype} with scales {scales}; "
            "an INT8 layer takes int8 with one scale or one per row"
        )
    scale = weight.scale.detach().float().reshape(-1, 1).expand(len(weight.qdata), 1)  # [N, 1]
    return QuantizedWeight(weight.qdata.contiguous(), scale.contiguous())


def scaled_mm_unsupported_reason(weight: StoredWeight, device: torch.device) -> str | None:
    """Why torch's fp8 product cannot take a weight on a device; None when it can."""
    found = weight.storage_dtype
    if found == "fp8" and not is_rowwise(weight):
        found = "fp8 with scales per block"
    if found != "fp8":
        return f"scaled_mm takes fp8 weights with one scale or one per output row, this one is {found}"
    if device.type not in ("cpu", "cuda"):
        return f"scaled_mm runs on cpu and cuda, not on {device.type}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < SCALED_MM_CAPABILITY:
            required, found = format_version(SCALED_MM_CAPABILITY), format_version(capability)
            return f"scaled_mm needs compute capability {required}, this GPU has {found}"
    return None


def pad_for_scaled_mm(weight: PackedWeight) -> PackedWeight:
    """The same fp8 weight, N and K zero-padded to multiples that cuBLAS takes, its scales in float32."""
    rows, columns = weight.qdata.shape
    more_rows = round_up(rows, SCALED_MM_MULTIPLE) - rows
    more_columns = round_up(columns, SCALED_MM_MULTIPLE) - columns
    as_bytes = weight.qdata.view(torch.uint8)  # torch does not pad fp8
    qdata = F.pad(as_bytes, (0, more_columns, 0, more_rows)).view(weight.qdata.dtype)
    scale = weight.scale
    if scale is not None:
        scale = scale.float().flatten()
        if scale.numel() > 1:
            scale = F.pad(scale, (0, more_rows), value=1.0)
    return replace(weight, qdata=qdata, scale=scale)


def quantize_fp8(x: Tensor, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """Round to e4m3: `scale = absmax / 448`, ties to even.

    Args:
        x: [M, K], any float dtype; the arithmetic is float32.
        per_row: whether each row has its own scale; otherwise all share one.

    Returns:
        q: float8_e4m3fn [M, K], and scale: float32 [M, 1] or [1, 1], so that `x ~ q * scale`.
    """
    x = x.float()
    absmax = x.abs().amax(dim=1, keepdim=True)  # [M, 1]
    if not per_row and len(x):
        absmax = absmax.amax(dim=0, keepdim=True)  # [1, 1]
    scale = (absmax / E4M3_MAX).clamp(min=TINY)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale
