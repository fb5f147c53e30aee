"""Products with weights of 4 and 6 bits on backends that do not decode them in their own product.

Some output rows are decoded to int8 at a time, packed and multiplied, at each call: the whole int8 weight is
never in memory. It costs the decoding, and the backend's packing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.backends.base import (
    Backend,
    FusedBranch,
    MultipliesGroupedWeights,
    PackedGroups,
    PacksInsideProduct,
    QuantizedInput,
)
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.weight import QuantizedWeight

# int8 numbers that are decoded at a time: what stays in a CPU's cache, and what keeps a GPU busy
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
ROW_MULTIPLE = 64  # of a chunk: what kernels take together


@dataclass(frozen=True)
class RowDecoder:
    """Multiplies grouped weights by the int8 product of a backend.

    Args:
        backend: computes the products.
    """

    backend: Backend

    def unsupported_group_reasons(self, weight: GroupedWeight) -> list[str]:
        """None: what decodes can be multiplied."""
        return []

    def pack_grouped_weight(self, weight: GroupedWeight) -> PackedGroups:
        """The weight as it is."""
        # what a backend looks up for a shape when it packs, compiled code cannot look up
        ranges = list_row_ranges(weight)
        for start, stop in {ranges[0], ranges[-1]}:
            self.backend.pack_weight(weight.select_rows(start, stop).decode())
        return PackedGroups(
            codes=weight.codes.contiguous(),
            group_scale=weight.group_scale.contiguous(),
            codebook=weight.codebook,
            bits=weight.bits,
            group_size=weight.group_size,
        )

    def unpack_grouped_weight(self, packed: PackedGroups, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes and group scales."""
        return packed.codes, packed.group_scale

    def grouped_linear(
        self,
        x: QuantizedInput,
        packed: PackedGroups,
        w_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        branch: FusedBranch | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """x: [M, K] -> [M, N].

        Raises:
            ValueError: for a branch, whose second factor is packed for all rows.
        """
        if branch is not None:
            raise ValueError("a branch cannot be inside a product of some rows at a time")
        weight = GroupedWeight(
            packed.codes, packed.group_scale, w_scale[:, None], packed.bits, codebook=packed.codebook
        )
        products = []
        for start, stop in list_row_ranges(weight):
            rows = weight.select_rows(start, stop).decode()
            rows_bias = None if bias is None else bias[start:stop]
            products.append(multiply_once(self.backend, x, rows, dtype=dtype, bias=rows_bias))
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def multiply_once(
    backend: Backend, x: QuantizedInput, weight: QuantizedWeight, *, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    """Pack a weight and multiply.

    Args:
        backend: computes both.
        x: from its `quantize`.
        weight: int8 [N, K].
        dtype: of the result.
        bias: float32 [N].

    Returns:
        dtype [M, N].
    """
    if isinstance(backend, PacksInsideProduct):
        return backend.multiply_once(x, weight, dtype=dtype, bias=bias)
    packed = backend.pack_weight(weight)
    return backend.linear(x, packed, weight.scale[:, 0].contiguous(), dtype=dtype, bias=bias)


def list_row_ranges(weight: GroupedWeight) -> list[tuple[int, int]]:
    """The output rows that are decoded together: first, and one past the last."""
    rows, columns = weight.shape
    elements = CHUNK_ELEMENTS.get(weight.codes.device.type, CHUNK_ELEMENTS["cuda"])
    count = max(1, elements // columns // ROW_MULTIPLE) * ROW_MULTIPLE
    return [(start, min(start + count, rows)) for start in range(0, rows, count)]


def choose_multiplier(backend: Backend, weight: GroupedWeight) -> MultipliesGroupedWeights:
    """What multiplies a grouped weight: the backend's own product, where it takes it, else a `RowDecoder`."""
    if isinstance(backend, MultipliesGroupedWeights) and not backend.unsupported_group_reasons(weight):
        return backend
    return RowDecoder(backend)


def run_grouped_layer(
    backend: Backend,
    multiplier: MultipliesGroupedWeights,
    x: Tensor,
    packed: PackedGroups,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A whole layer of 4 or 6 bits without transform and branch: quantize x and multiply.

    Args:
        backend: quantizes the input.
        multiplier: from `choose_multiplier` of the backend.
        x: float [M, K].
        packed: from its `pack_grouped_weight`.
        w_scale: float32 [N].
        bias: float32 [N] or None.

    Returns:
        [M, N] in x's dtype.
    """
    return multiplier.grouped_linear(backend.quantize(x), packed, w_scale, dtype=x.dtype, bias=bias)
