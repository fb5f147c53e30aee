"""An int8 weight and how it is made: what rounding methods return, and layers and backends compute with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.kernels.quantize_rowwise.reference import INT8_MAX, quantize_rowwise


@dataclass(frozen=True)
class QuantizedWeight:
    """A symmetric int8 weight with one scale for each output row: `weight ~ qdata * scale`."""

    qdata: Tensor  # int8 [N, K]
    scale: Tensor  # float32 [N, 1]
    bits: ClassVar[int] = 8  # of a stored number

    @property
    def shape(self) -> tuple[int, int]:
        """N and K of the weight."""
        rows, columns = self.qdata.shape
        return rows, columns

    @property
    def saturated_share(self) -> float:
        """Share of numbers at -127 or 127 (or -128, which other programs write).

        Every row has at least one, so 1/K is the least.
        """
        is_saturated = (self.qdata >= INT8_MAX) | (self.qdata <= -INT8_MAX)
        return is_saturated.float().mean().item()

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same on a device."""
        return QuantizedWeight(self.qdata.to(device), self.scale.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the integers stand for. Returns [N, K]."""
        return (self.qdata.float() * self.scale).to(dtype)


def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """Quantize each output row: `scale = absmax / 127`, ties to even. weight: [N, K], any float dtype."""
    qdata, scale = quantize_rowwise(weight.detach())
    return QuantizedWeight(qdata, scale)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise, 10 log10(sum r^2 / sum (r - a)^2), in dB; infinity when equal."""
    signal = reference.double().pow(2).sum()
    noise = (reference - approximation).double().pow(2).sum()
    if noise == 0:
        return float("inf")
    return 10 * torch.log10(signal / noise).item()
