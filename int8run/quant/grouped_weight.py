"""A weight of 4 or 6 bits whose codes decode to int8: what W4A8 layers hold (`asym_w4a8_int8` in files).

`kernels/grouped_weight/reference.py` has the arithmetic. A backend that decodes inside its product implements
`MultipliesGroupedWeights` of `backends/base.py`; for the others a layer decodes some rows at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.kernels.grouped_weight.reference import decode_grouped_weight
from int8run.quant.weight import QuantizedWeight

W4A8, W6A8 = "w4a8", "w6a8"
# storage dtype -> bits of a code
GROUPED_BITS = {W4A8: 4, W6A8: 6}
# bits of a code -> what the columns of a weight are a multiple of
COLUMN_MULTIPLES = {4: 16, 6: 32}
MIN_GROUP_SIZE, GROUP_MULTIPLE = 4, 16


@dataclass(frozen=True)
class GroupedWeight:
    """Codes and scales of one weight [N, K], in the basis of its outlier transform.

    Args:
        codes: int8 [N, K * bits / 8], from `pack_codes`.
        group_scale: float8_e4m3fn or float32 [N, K / g].
        scale: float32 [N, 1], of the int8 numbers that the codes decode to.
        bits: 4 or 6.
        codebook: float32 [16], the level of each code; None: evenly spaced ones.
        correction: [K / g, N], added to the weight of each group: it shifts the levels of a group, and enters
            a layer as a product with the sums of the input's groups. None: there is none.
    """

    codes: Tensor
    group_scale: Tensor
    scale: Tensor
    bits: int
    codebook: Tensor | None = None
    correction: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K of the weight."""
        rows, row_bytes = self.codes.shape
        return rows, row_bytes * 8 // self.bits

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.group_scale.shape[1]

    @property
    def storage_dtype(self) -> str:
        """`w4a8` or `w6a8`: the word of `clip=` for its number of bits."""
        return next(name for name, bits in GROUPED_BITS.items() if bits == self.bits)

    @property
    def nbytes(self) -> int:
        """Memory of codes and scales."""
        tensors = (self.codes, self.group_scale, self.scale, self.codebook, self.correction)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def decode(self) -> QuantizedWeight:
        """The int8 weight that the product uses, without the correction."""
        qdata = decode_grouped_weight(self.codes, self.group_scale, bits=self.bits, codebook=self.codebook)
        return QuantizedWeight(qdata, self.scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that codes, scales and correction stand for. Returns [N, K]."""
        weight = self.decode().dequantize()
        if self.correction is not None:
            weight = weight + self.correction.float().T.repeat_interleave(self.group_size, dim=1)
        return weight.to(dtype)

    def to(self, device: torch.device) -> "GroupedWeight":
        """The same on a device."""
        return replace(
            self,
            codes=self.codes.to(device),
            group_scale=self.group_scale.to(device),
            scale=self.scale.to(device),
            codebook=None if self.codebook is None else self.codebook.to(device),
            correction=None if self.correction is None else self.correction.to(device),
        )

    @property
    def saturated_share(self) -> float:
        """Share of the decoded int8 numbers at the end of their range."""
        return self.decode().saturated_share

    def select_rows(self, start: int, stop: int) -> "GroupedWeight":
        """Some of the output rows."""
        correction = self.correction
        return replace(
            self,
            codes=self.codes[start:stop],
            group_scale=self.group_scale[start:stop],
            scale=self.scale[start:stop],
            correction=None if correction is None else correction[:, start:stop],
        )

    def take_rows(self, index: Tensor) -> "GroupedWeight":
        """Some rows in any order, for look-ups. index: int64 [R]. Returns a weight [R, K]."""
        return self.map_rows(lambda rows: take_rows(rows, index))

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> "GroupedWeight":
        """The weight whose tensors are changed alike, each as one with a row for each output row."""
        correction = self.correction
        return replace(
            self,
            codes=change(self.codes),
            group_scale=change(self.group_scale),
            scale=change(self.scale),
            correction=None if correction is None else change(correction.T).T.contiguous(),
        )


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor; of 8-bit numbers by their bytes, because not every torch can index 8-bit floats."""
    if tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8).index_select(0, index).view(tensor.dtype)
    return tensor.index_select(0, index)


def join_rows(parts: Sequence[GroupedWeight]) -> GroupedWeight:
    """The inverse of `select_rows`: weights with the same codebook below each other."""
    corrections = [part.correction for part in parts if part.correction is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        group_scale=torch.cat([part.group_scale for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        correction=torch.cat(corrections, dim=1) if corrections else None,
    )


# what a layer holds: integers, or codes of 4 or 6 bits that decode to them
LayerWeight = QuantizedWeight | GroupedWeight


def count_bits(weight: LayerWeight) -> int:
    """Stored bits of a number of a weight."""
    return weight.bits if isinstance(weight, GroupedWeight) else 8


def find_group_obstacle(columns: int, *, bits: int, group_size: int) -> str | None:
    """Why rows of so many columns cannot be codes in such groups; None when they can.

    The rules are those of comfy-kitchen 0.2.40, whose kernels decode 16 columns at a time.

    Args:
        columns: K of the weight.
        bits: 4 or 6.
        group_size: columns that share a scale.
    """
    is_multiple = group_size % GROUP_MULTIPLE == 0
    is_part = bits == 4 and group_size >= MIN_GROUP_SIZE and GROUP_MULTIPLE % group_size == 0
    if not is_multiple and not is_part:
        allowed = "4, 8, 16 and multiples of 16" if bits == 4 else "multiples of 16"
        return f"groups of {group_size} columns; with {bits} bits, groups have {allowed}"
    if columns % COLUMN_MULTIPLES[bits]:
        return f"{columns} columns, which with {bits} bits are a multiple of {COLUMN_MULTIPLES[bits]}"
    if columns % group_size:
        return f"{columns} columns, which groups of {group_size} do not divide"
    return None
