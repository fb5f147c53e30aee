"""What a backend is, and what it may refuse."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from int8run.kernels.cpu.library import COMPILERS
from int8run.machine import cpu_capabilities
from int8run.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Limits:
    """What a backend needs, as data: the same table drives the check, the message and the tests."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    cpu_features: tuple[str, ...] = ()  # one of these is enough; empty: any CPU
    compiler: bool = False  # a C++ compiler on the PATH
    modules: tuple[str, ...] = ()  # Python packages
    cuda_capability: tuple[int, int] = (0, 0)  # at least
    multiple: tuple[int, int] = (1, 1)  # in_features and out_features must be multiples of these

    def refuse(self, device: torch.device) -> list[str]:
        """Every reason why this device cannot run it; empty when it can."""
        reasons = []
        if device.type not in self.devices:
            reasons.append(f"runs on {' and '.join(self.devices)}, not on {device.type}")
        elif device.type == "cpu" and self.cpu_features and not has_cpu_feature(self.cpu_features):
            reasons.append(f"needs a CPU with {' or '.join(self.cpu_features)}: without, int8 products saturate")
        elif (
            device.type == "cuda"
            and self.cuda_capability > (0, 0)
            and (have := torch.cuda.get_device_capability(device)) < self.cuda_capability
        ):
            reasons.append(f"needs compute capability {version(self.cuda_capability)}, this GPU has {version(have)}")
        if self.compiler and not any(map(shutil.which, COMPILERS)):
            reasons.append(f"needs a C++ compiler on the PATH ({', '.join(COMPILERS)})")
        reasons += [f"needs the Python package {m}" for m in self.modules if importlib.util.find_spec(m) is None]
        return reasons

    def refuse_layer(self, in_features: int, out_features: int) -> list[str]:
        """Every reason why it cannot take a layer of this shape."""
        sizes = {"in_features": in_features, "out_features": out_features}
        wanted = zip(sizes.items(), self.multiple, strict=True)
        return [f"{name}={size} is no multiple of {multiple}" for (name, size), multiple in wanted if size % multiple]


def version(numbers: tuple[int, int]) -> str:
    """`(8, 0)` as `8.0`."""
    return ".".join(map(str, numbers))


def has_cpu_feature(features: Sequence[str]) -> bool:
    """Whether this CPU has one of the named instruction sets, by torch's own names (`avx512_vnni`, `avx_vnni`, …)."""
    capabilities = cpu_capabilities()
    return any(capabilities.get(feature, False) for feature in features)


class Quantized(NamedTuple):
    """Rows after quantization: what layers that read the same tensor can share."""

    q: Tensor  # [M, K], int8 or uint8, K possibly padded
    scale: Tensor  # float32, one per row
    h: Tensor | None = None  # float32 [M, r]: the branch's down-projection, where the backend computes it from x in passing


class FusedBranch(NamedTuple):
    """A low-rank branch in a backend's own layout."""

    down: Tensor
    up: Tensor
    down_scale: Tensor | None = None
    up_scale: Tensor | None = None
    with_input: bool = False  # `down` is wanted by `quantize`, not by `linear`

    @property
    def down_with_input(self) -> Tensor | None:
        """What `quantize` needs of it."""
        return self.down if self.with_input else None


class Backend(Protocol):
    """A frozen dataclass with the backend's settings. An `Int8Linear` holds the one that runs it."""

    name: ClassVar[str]
    limits: ClassVar[Limits]

    def pack(self, weight: QuantizedWeight) -> Tensor:
        """The weight in the layout that `linear` wants; computed once per layer."""
        ...

    def quantize(self, x: Tensor, factor: Tensor | None, matrix: Tensor | None, gelu_from: int, down: Tensor | None) -> Quantized:
        """Quantize each row: GELU on the columns from `gelu_from` (-1: none), times `factor`, groups rotated by `matrix`, rounded.

        Args:
            x: float [M, K].
            factor: float32 [K] or None.
            matrix: regular Hadamard [g, g] or None.
            down: the fused branch's down-projection, where it wants the input.
        """
        ...

    def linear(
        self, x: Quantized, packed: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
        branch: FusedBranch | None, strengths: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Multiply, scale, add the bias and the branch. w_scale: float32 [N], bias: float32 [N] -> [M, N] of the dtype."""
        ...


@runtime_checkable
class FusesBranch(Protocol):
    """What a backend may offer besides: the low-rank branch inside its own product."""

    def fuse_branch(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> FusedBranch:
        """The branch in the backend's own layout.

        lora_A: float32 [r, K], for the transformed input; lora_B: float32 [N, r]; dtype of the float model.
        """
        ...


def run_layer(backend: Backend, x: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """A whole layer without transform and branch: quantize x, multiply. x: float [M, K] -> [M, N], x's dtype."""
    return backend.linear(backend.quantize(x, None, None, -1, None), packed, w_scale, bias, x.dtype, None, None)
