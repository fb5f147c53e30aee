"""The INT8 layer that takes the place of an `nn.Linear`.

`Int8Linear.forward` is the hot path of every INT8 model. It has to stay visible to
`torch.compile(fullgraph=True)`: no look-ups by name, no branches on values of tensors. The layer knows its
backend and its outlier transform; it knows no model and no config.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8run.backends.base import Backend, FusedBranch, QuantizedInput
from int8run.backends.convolution import ConvBackend
from int8run.errors import BackendError
from int8run.kernels.quantize_rowwise.reference import apply_gelu_to_columns
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.layers.shared_input import SharedInput
from int8run.outlier.base import OutlierTransform
from int8run.quant.grouped_weight import GroupedWeight, LayerWeight
from int8run.quant.weight import QuantizedWeight

# how many unit vectors are multiplied at a time to read a packed weight back
UNIT_VECTORS_AT_ONCE = 1024


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The Linear of that name.

    Raises:
        TypeError: when the module of that name is not a Linear.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a Linear")
    return module


def check_has_integers(weight: LayerWeight) -> QuantizedWeight:
    """The integers of a layer with 8 bits.

    Raises:
        TypeError: for codes of fewer bits, which `GroupedInt8Linear` takes.
    """
    if isinstance(weight, GroupedWeight):
        raise TypeError(f"a weight of {weight.bits} bits is for a GroupedInt8Linear")
    return weight


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer after quantization and before it is bound to a backend.

    Args:
        weight: [N, K] of 8, 6 or 4 bits, in the transform's basis.
        transform: the outlier transform of its input.
        bias: [N] or None.
    """

    weight: LayerWeight
    transform: OutlierTransform
    bias: Tensor | None


def to_float32_bias(bias: Tensor | None) -> Tensor | None:
    """The bias of a layer as backends take it. [N]"""
    return None if bias is None else bias.detach().float()


def overwrite(old: Tensor, new: Tensor) -> Tensor:
    """Write a tensor into the place of an old one, whose address others know: CUDA graphs, offloading.

    Returns:
        The old one; the new one where it does not fit, or where the old one is opaque.
    """
    has_place = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    if not has_place or old.is_mkldnn:
        return new.contiguous()
    return old.copy_(new)


def center_rows(x: Tensor) -> Tensor:
    """Every token without the mean over its image's tokens, followed by the means.

    x: [..., T, K] -> float32 [B T + B, K], where B is the product of the leading dimensions.
    """
    x = x.float()  # in half precision the difference would be rounded once more
    mean = x.mean(-2, keepdim=True)
    return torch.cat([(x - mean).flatten(0, -2), mean.flatten(0, -2)])


# where layers of any backend may lie between their turns, as offloading leaves them
WAITING_DEVICES = ("cpu", "meta")

# diffusers asks some layers for the dtype of the first tensor in them, and converts their input to that: it
# is to be that of the model, not of the scales
DTYPE_MARKER = "dtype_marker"


def check_move(backend: Backend | ConvBackend, device: torch.device) -> None:
    """Check that a layer may be moved: to where its backend runs, or to where it only waits.

    A backend's layout is the same on all of its devices; on others its integers would mean nothing.

    Args:
        backend: of the layer.
        device: where it is moved to.

    Raises:
        BackendError: for a device on which it could only fail.
    """
    if device.type in backend.limits.devices or device.type in WAITING_DEVICES:
        return
    raise BackendError(
        f"an INT8 layer of backend {backend.name!r} cannot run on {device}, where it is moved; load the "
        f"model anew and call quantize_(model, device={str(device)!r}), which packs its weights for there"
    )


class KeepsDtypes(nn.Module):
    """A layer whose tensors `model.to(dtype)` moves and does not convert.

    In another dtype integers and scales would mean nothing.
    """

    # transformers asks some layers for the dtype of their weight, and passes over those that have none
    weight = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        layer: Self = super()._apply(move, recurse)
        return layer


class BackendLayer(KeepsDtypes):
    """A layer whose weight one backend has packed: it is moved to no device on which that could only fail."""

    backend: Backend | ConvBackend

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        probe = next(self.buffers())[:0]
        check_move(self.backend, fn(probe).device)
        return super()._apply(fn, recurse)


class Int8Linear(BackendLayer):
    """`nn.Linear` in W8A8 on one backend, chosen when the layer is built and held by it.

    The adapter, `shared` and `gelu_from` are set from outside: by LoRAs, and by `int8run.layers.fusion`.

    Args:
        layer: quantized weight, outlier transform and bias.
        backend: runs the product.
        dtype: dtype of the float model; the float fallback computes in it.
        float_rows: with at most this many rows, compute with the dequantized weight instead; 0: never.
    """

    backend: Backend
    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    float_weight: Tensor | None

    def __init__(self, layer: QuantizedLayer, backend: Backend, dtype: torch.dtype, float_rows: int = 0):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.backend = backend
        self.transform = layer.transform
        self.dtype = dtype
        self.float_rows = float_rows
        self.adapter: LowRankBranch | None = None
        self.shared: SharedInput | None = None
        self.shared_place = 0  # which of the layers with that input it is
        # input columns from this index on still need their GELU; the quantization applies it
        self.gelu_from: int | None = None
        # in this backend's own layout, which would mean nothing to another that loads the state dict
        self.register_buffer(DTYPE_MARKER, torch.empty(0, dtype=dtype), persistent=False)
        self.register_weight(layer.weight)
        self.register_buffer("scale", layer.weight.scale[:, 0].contiguous())  # float32 [N]
        self.register_buffer("bias", to_float32_bias(layer.bias))
        # dequantized once: a fallback that did it at every call would cost more than it saves
        float_weight = layer.weight.dequantize(dtype) if float_rows else None
        self.register_buffer("float_weight", float_weight, persistent=False)

    def register_weight(self, weight: LayerWeight) -> None:
        """Keep the integers as the backend wants them."""
        self.register_buffer("packed", self.backend.pack_weight(check_has_integers(weight)), persistent=False)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the float weight: [N, K]."""
        return self.out_features, self.in_features

    @property
    def bits(self) -> int:
        """Stored bits of a weight."""
        return 8

    @property
    def can_fuse_branch(self) -> bool:
        """Whether a low-rank branch may be computed inside the product, where the backend can do that."""
        return True

    def set_weight(self, weight: LayerWeight) -> None:
        """Replace the weight by another of its shape and bits, in the transform's basis.

        A compiled model stays compiled, and its tensors where they are.
        """
        packed = self.backend.pack_weight(check_has_integers(weight))
        self.packed = overwrite(self.packed, packed)
        self.scale = overwrite(self.scale, weight.scale[:, 0])
        if self.float_weight is not None:
            self.float_weight = overwrite(self.float_weight, weight.dequantize(self.dtype))

    def set_adapter(self, adapter: LowRankBranch | None) -> None:
        """Put a low-rank branch beside the layer in place of the one that is there; None: take it off."""
        self.adapter = adapter
        if self.shared is not None:
            self.shared.set_branch(self.shared_place, adapter)

    @torch.no_grad()
    def read_qdata(self) -> Tensor:
        """The weight's integers out of the backend's layout: exact products with unit vectors.

        int8 [N, K].
        """
        unit_scales = torch.ones_like(self.scale)
        columns = []
        for start in range(0, self.in_features, UNIT_VECTORS_AT_ONCE):
            count = min(UNIT_VECTORS_AT_ONCE, self.in_features - start)
            units = torch.zeros(count, self.in_features, device=self.scale.device)
            units[:, start:].fill_diagonal_(1.0)
            # row i of the products is column start + i of the weight
            products = self.backend.linear(
                self.backend.quantize(units), self.packed, unit_scales, dtype=torch.float32
            )
            columns.append(products.round().to(torch.int8))  # [count, N]
        return torch.cat(columns).T.contiguous()

    def read_quantized_weight(self) -> QuantizedWeight:
        """Integers and scales of the weight, in the transform's basis."""
        return QuantizedWeight(self.read_qdata(), self.scale[:, None].clone())

    def read_stored_weight(self) -> LayerWeight:
        """The weight as `set_weight` takes it, in the transform's basis."""
        return self.read_quantized_weight()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N], in x's dtype."""
        return self._forward(x, self.gelu_from, self.shared)

    def forward_isolated(self, x: Tensor) -> Tensor:
        """`forward` of this layer alone, for measurements: its GELU ran before it, and nothing is shared."""
        return self._forward(x, gelu_from=None, shared=None)

    def _forward(self, x: Tensor, gelu_from: int | None, shared: SharedInput | None) -> Tensor:
        """Compute few rows in float and many in INT8, then add the branch where the product does not hold it.

        Shapes as in `forward`.
        """
        is_matrix = x.dim() == 2
        rows = x if is_matrix else x.reshape(-1, self.in_features)  # [..., K] -> [M, K]
        branch = self._active_branch()
        float_weight = self.float_weight if self.float_rows else None
        if float_weight is not None and rows.shape[0] <= self.float_rows:
            y = self._float_forward(rows, float_weight, gelu_from)
        else:
            y = self._int8_forward(x, rows, gelu_from, shared, branch)
            if branch is not None and branch.fused is not None:
                branch = None  # it is in the product already
        if branch is not None:
            y = self._add_branch(y, rows, gelu_from, branch)
        if is_matrix:
            return y
        return y.view(*x.shape[:-1], self.out_features)

    def _active_branch(self) -> LowRankBranch | None:
        # not read in compiled code: torch.compile would recompile whenever it changes
        if self.adapter is not None and not torch.compiler.is_compiling() and self.adapter.is_idle:
            return None
        return self.adapter

    def _float_forward(self, rows: Tensor, float_weight: Tensor, gelu_from: int | None) -> Tensor:
        """With the dequantized weight. rows: [M, K] -> [M, N], in their dtype."""
        transformed = self.transform.transform_input(apply_gelu_to_columns(rows, gelu_from))
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return F.linear(transformed.to(self.dtype), float_weight, bias).to(rows.dtype)

    def _int8_forward(
        self,
        x: Tensor,
        rows: Tensor,
        gelu_from: int | None,
        shared: SharedInput | None,
        branch: LowRankBranch | None,
    ) -> Tensor:
        """On the backend, a fused branch included. x: [..., K], rows: x as [M, K] -> [M, N], in x's dtype."""
        # attributes that are tensors are looked for in three dictionaries; this is one
        buffers: dict[str, Any] = self._buffers
        # without a token axis there is nothing to center: a mean over the batch would mix images
        is_centered = self.transform.centered and x.dim() > 2
        fused: FusedBranch | None = None
        strengths = None
        if branch is not None and branch.fused is not None:
            fused = branch.fused
            strengths = branch.strengths

        def quantize(down: Tensor | None) -> QuantizedInput:
            # centered rows never wait for their GELU: fusion defers none to a centered transform
            tokens = center_rows(x) if is_centered else rows
            return self._quantize_rows(tokens, gelu_from, down)

        if shared is None:
            quantized = quantize(None if fused is None else fused.down_with_input)
        else:
            quantized = shared.get(x, quantize, branch)
        # of a centered input, the bias comes with the product of the means
        bias = None if is_centered else buffers["bias"]
        y = self._multiply(quantized, dtype=x.dtype, bias=bias, branch=fused, strengths=strengths)
        if is_centered:
            return self.add_mean_product(y, x.shape)
        return y

    def _multiply(
        self,
        quantized: QuantizedInput,
        *,
        dtype: torch.dtype,
        bias: Tensor | None,
        branch: FusedBranch | None,
        strengths: Tensor | None,
    ) -> Tensor:
        """The product of a quantized input with the weight. Returns dtype [M, N]."""
        buffers: dict[str, Any] = self._buffers  # see `_int8_forward`
        return self.backend.linear(
            quantized,
            buffers["packed"],
            buffers["scale"],
            dtype=dtype,
            bias=bias,
            branch=branch,
            strengths=strengths,
        )

    def _quantize_rows(self, rows: Tensor, gelu_from: int | None, down: Tensor | None) -> QuantizedInput:
        """Round rows [M, K] after the steps of the transform; `down` [r, K] is of a branch with them."""
        factor, rotation = self.transform.get_input_steps()
        return self.backend.quantize(rows, factor=factor, rotation=rotation, gelu_from=gelu_from, down=down)

    def add_mean_product(self, y: Tensor, shape: torch.Size) -> Tensor:
        """Put the products of `center_rows` together.

        y: [B T + B, N] -> [B T, N]; shape: of x, [..., T, K].
        """
        num_rows, num_tokens = shape[:-1].numel(), shape[-2]
        mean = y[num_rows:]  # [B, N]
        if self.bias is not None:
            mean = mean + self.bias.to(y.dtype)
        return y[:num_rows].add_(mean.repeat_interleave(num_tokens, dim=0))

    @staticmethod
    def _add_branch(y: Tensor, rows: Tensor, gelu_from: int | None, branch: LowRankBranch) -> Tensor:
        """Add a branch that is not fused: two products with the untransformed rows.

        y: [M, N], rows: [M, K].
        """
        return branch.add_product(y, apply_gelu_to_columns(rows, gelu_from))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend.name}"
        )
