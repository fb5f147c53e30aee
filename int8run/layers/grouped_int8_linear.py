"""The INT8 layer of a weight of 4 or 6 bits, which is decoded to int8 for each product (W4A8, W6A8).

Its input is quantized as in every `Int8Linear`, so that it shares inputs, GELUs and outlier transforms with
the layers of 8 bits beside it.
"""

import torch
from torch import Tensor

from int8run.backends.base import Backend, FusedBranch, MultipliesGroupedWeights, PackedGroups, QuantizedInput
from int8run.backends.row_decoder import RowDecoder, choose_multiplier
from int8run.kernels.quantize_rowwise.reference import apply_gelu_to_columns
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer, overwrite
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.layers.shared_input import SharedInput
from int8run.quant.grouped_weight import GroupedWeight, LayerWeight
from int8run.quant.weight import QuantizedWeight


class GroupedInt8Linear(Int8Linear):
    """`nn.Linear` in W4A8 or W6A8 on one backend.

    Neither a float copy of the weight is kept nor its int8 numbers: the backend decodes the codes in its
    product, or some output rows are decoded at a time (`RowDecoder`).

    Args:
        layer: weight in groups, outlier transform and bias.
        backend: quantizes the input and computes the product.
        dtype: dtype of the float model; the float fallback computes in it.
        float_rows: as for `Int8Linear`; where it is not 0, the layer does keep a float weight.
    """

    codes: Tensor
    group_scale: Tensor
    codebook: Tensor | None
    correction: Tensor | None
    multiplier: MultipliesGroupedWeights

    def register_weight(self, weight: LayerWeight) -> None:
        """Keep the codes as the product wants them, and how the groups are laid out."""
        grouped = check_has_groups(weight)
        self.multiplier = choose_multiplier(self.backend, grouped)
        self._bits, self.group_size = grouped.bits, grouped.group_size
        packed = self.multiplier.pack_grouped_weight(grouped)
        # in the layout of this product, which would mean nothing to another that loads the state dict
        self.register_buffer("codes", packed.codes, persistent=False)
        self.register_buffer("group_scale", packed.group_scale, persistent=False)
        self.register_buffer("codebook", packed.codebook, persistent=False)
        self.register_buffer("correction", grouped.correction, persistent=False)

    @property
    def bits(self) -> int:
        """Stored bits of a weight, without its scales."""
        return self._bits

    @property
    def can_fuse_branch(self) -> bool:
        """A product of some rows at a time has no branch in it."""
        return not isinstance(self.multiplier, RowDecoder)

    @property
    def packed_groups(self) -> PackedGroups:
        """The weight in the layout of its product."""
        buffers = self._buffers
        return PackedGroups(
            codes=buffers["codes"],  # type: ignore[arg-type]
            group_scale=buffers["group_scale"],  # type: ignore[arg-type]
            codebook=buffers["codebook"],
            bits=self._bits,
            group_size=self.group_size,
        )

    def set_weight(self, weight: LayerWeight) -> None:
        """Replace the weight by another of its shape, bits and group size, in the transform's basis."""
        grouped = check_has_groups(weight)
        packed = self.multiplier.pack_grouped_weight(grouped)
        self.codes = overwrite(self.codes, packed.codes)
        self.group_scale = overwrite(self.group_scale, packed.group_scale)
        self.codebook = overwrite_optional(self.codebook, packed.codebook)
        self.correction = overwrite_optional(self.correction, grouped.correction)
        self.scale = overwrite(self.scale, grouped.scale[:, 0])
        if self.float_weight is not None:
            self.float_weight = overwrite(self.float_weight, grouped.dequantize(self.dtype))

    def read_grouped_weight(self) -> GroupedWeight:
        """Codes and scales out of the product's layout, in the transform's basis, to the bit."""
        shape = (self.out_features, self.in_features)
        codes, group_scale = self.multiplier.unpack_grouped_weight(self.packed_groups, shape)
        return GroupedWeight(
            codes=codes.clone(),
            group_scale=group_scale.clone(),
            scale=self.scale[:, None].clone(),
            bits=self._bits,
            codebook=None if self.codebook is None else self.codebook.clone(),
            correction=None if self.correction is None else self.correction.clone(),
        )

    def read_stored_weight(self) -> LayerWeight:
        """The weight as `set_weight` takes it."""
        return self.read_grouped_weight()

    def read_qdata(self) -> Tensor:
        """The int8 numbers that the product multiplies, [N, K]."""
        return self.read_grouped_weight().decode().qdata

    def read_quantized_weight(self) -> QuantizedWeight:
        """The int8 weight that the product multiplies; a correction is not in it."""
        return self.read_grouped_weight().decode()

    def _multiply(
        self,
        quantized: QuantizedInput,
        *,
        dtype: torch.dtype,
        bias: Tensor | None,
        branch: FusedBranch | None,
        strengths: Tensor | None,
    ) -> Tensor:
        return self.multiplier.grouped_linear(
            quantized,
            self.packed_groups,
            self._buffers["scale"],  # type: ignore[arg-type]
            dtype=dtype,
            bias=bias,
            branch=branch,
            strengths=strengths,
        )

    def _int8_forward(
        self,
        x: Tensor,
        rows: Tensor,
        gelu_from: int | None,
        shared: SharedInput | None,
        branch: LowRankBranch | None,
    ) -> Tensor:
        """The product, and that of the correction. x: [..., K], rows: x as [M, K] -> [M, N]."""
        y = super()._int8_forward(x, rows, gelu_from, shared, branch)
        correction = self._buffers["correction"]
        if correction is None:
            return y
        # [K / g, N] is added to the weight of each group: a product with the sums of the input's groups
        transformed = self.transform.transform_input(apply_gelu_to_columns(rows, gelu_from))
        sums: Tensor = transformed.float().unflatten(1, (-1, self.group_size)).sum(2)  # [M, K / g]
        return y.add_((sums @ correction.float()).to(y.dtype))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return f"{super().extra_repr()}, bits={self._bits}, group_size={self.group_size}"


def check_has_groups(weight: LayerWeight) -> GroupedWeight:
    """The codes of a layer with 4 or 6 bits.

    Raises:
        TypeError: for a weight of 8 bits, which `Int8Linear` takes.
    """
    if isinstance(weight, QuantizedWeight):
        raise TypeError("a weight of 8 bits is for an Int8Linear")
    return weight


def overwrite_optional(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """As `overwrite`, for a tensor that a weight may lack."""
    if old is None or new is None:
        return new
    return overwrite(old, new)


def make_int8_linear(
    layer: QuantizedLayer, backend: Backend, dtype: torch.dtype, float_rows: int = 0
) -> Int8Linear:
    """The INT8 layer for a weight of any bits; arguments as of `Int8Linear`."""
    if isinstance(layer.weight, GroupedWeight):
        return GroupedInt8Linear(layer, backend, dtype, float_rows)
    return Int8Linear(layer, backend, dtype, float_rows)
