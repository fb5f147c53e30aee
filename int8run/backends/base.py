"""What a backend is, and what it may refuse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from int8run.machine import cpu_capabilities
from int8run.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Limits:
    """What a backend needs, as data: the same table drives the check, the message and the tests."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    cpu_features: tuple[str, ...] = ()  # one of these is enough; empty: any CPU

    def refuse(self, device: torch.device) -> list[str]:
        """Every reason why this device cannot run it; empty when it can."""
        if device.type not in self.devices:
            return [f"runs on {' and '.join(self.devices)}, not on {device.type}"]
        if device.type == "cpu" and self.cpu_features and not has_cpu_feature(self.cpu_features):
            return [f"needs a CPU with one of {', '.join(self.cpu_features)}: without, int8 products saturate"]
        return []


def has_cpu_feature(features: Sequence[str]) -> bool:
    """Whether this CPU has one of the named instruction sets, by torch's own names (`avx512_vnni`, `avx_vnni`, …)."""
    capabilities = cpu_capabilities()
    return any(capabilities.get(feature, False) for feature in features)


def usable(backend: "Backend", device: torch.device) -> bool:
    """Whether the backend's limits allow this device."""
    return not backend.limits.refuse(device)


class Backend(Protocol):
    """A frozen dataclass with the backend's settings. An `Int8Linear` holds the one that runs it."""

    name: ClassVar[str]
    limits: ClassVar[Limits]

    def pack(self, weight: QuantizedWeight) -> Tensor:
        """The weight in the layout that `linear` wants; computed once per layer."""
        ...

    def linear(self, x: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
        """Quantize x per row, multiply, scale, add the bias. x: float [M, K], w_scale: float32 [N] -> [M, N], x's dtype."""
        ...
