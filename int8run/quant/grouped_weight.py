"""A weight of 4 or 6 bits whose codes decode to int8: what W4A8 layers hold (`asym_w4a8_int8` in files).

`kernels/grouped_weight/reference.py` has the arithmetic. A backend that decodes inside its product implements
`MultipliesGroupedWeights` of `backends/base.py`; for the others a layer decodes some rows at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.kernels.grouped_weight.reference import decode_grouped_weight
from int8run.quant.weight import QuantizedWeight


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
