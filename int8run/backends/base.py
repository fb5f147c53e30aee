"""What a backend is, and what it may refuse."""

import importlib.util
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from int8run.kernels.cpu.library import COMPILERS
from int8run.kernels.hadamard.reference import Rotation
from int8run.quant.weight import QuantizedWeight
from int8run.utils.hardware import get_cpu_capabilities

# 32-bit sums hold this many products of the largest codes: signed by signed, and unsigned activations by signed weights
MAX_SIGNED_PRODUCTS, MAX_UNSIGNED_PRODUCTS = 2**31 // (128 * 127), 2**31 // (255 * 127)


@dataclass(frozen=True)
class Limits:
    """What a backend needs, as data: the same table drives the check, the message and the tests."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    cpu_features: tuple[str, ...] = ()  # one of these is enough; empty: any CPU
    needs_compiler: bool = False  # a C++ compiler on the PATH
    python_packages: tuple[str, ...] = ()  # Python packages
    cuda_capability: tuple[int, int] = (0, 0)  # at least
    max_in_features: int | None = None  # beyond, 32-bit sums overflow
    fuses_gelu: bool = False  # a GELU before the layer costs next to nothing inside its quantization
    is_optional: bool = False  # for those who ask for it: backend=auto says nothing when it is missing

    def unsupported_reasons(self, device: torch.device) -> list[str]:
        """Every reason why this device cannot run it; empty when it can."""
        if device.type not in self.devices:
            return [f"runs on {' and '.join(self.devices)}, not on {device.type}"]
        reasons = []
        if device.type == "cpu" and self.cpu_features and not has_cpu_feature(self.cpu_features):
            reasons.append(
                f"needs a CPU with {' or '.join(self.cpu_features)}: without, int8 products saturate"
            )
        elif (
            device.type == "cuda"
            and self.cuda_capability > (0, 0)
            and (have := torch.cuda.get_device_capability(device)) < self.cuda_capability
        ):
            reasons.append(
                f"needs compute capability {format_version(self.cuda_capability)}, this GPU has {format_version(have)}"
            )
        if self.needs_compiler and not any(map(shutil.which, COMPILERS)):
            reasons.append(f"needs a C++ compiler on the PATH ({', '.join(COMPILERS)})")
        missing = [m for m in self.python_packages if importlib.util.find_spec(m) is None]
        reasons += [f"needs the Python package {m} (pip install {m.replace('_', '-')})" for m in missing]
        return reasons

    def unsupported_layer_reasons(self, in_features: int, out_features: int) -> list[str]:
        """Every reason why it cannot take a layer of this shape."""
        if self.max_in_features is None or in_features <= self.max_in_features:
            return []
        return [f"in_features={in_features} overflows its 32-bit sums, which hold {self.max_in_features}"]


def format_version(numbers: tuple[int, int]) -> str:
    """`(8, 0)` as `8.0`."""
    return ".".join(map(str, numbers))


def has_cpu_feature(features: Sequence[str]) -> bool:
    """Whether this CPU has one of the named instruction sets, by torch's own names (`avx512_vnni`, `avx_vnni`, …)."""
    capabilities = get_cpu_capabilities()
    return any(capabilities.get(feature, False) for feature in features)


class QuantizedInput(NamedTuple):
    """Rows after quantization: what layers that read the same tensor can share."""

    q: Tensor  # [M, K], int8 or uint8, K possibly padded
    scale: Tensor  # float32, one per row
    down_product: Tensor | None = (
        None  # float32 [M, r]: the branch's down-projection, where the backend computes it from x in passing
    )
    rotation: int = 0  # group still to be rotated, by a backend that quantizes inside its product


class FusedBranch(NamedTuple):
    """A low-rank branch in a backend's own layout."""

    down: Tensor
    up: Tensor
    down_scale: Tensor | None = None
    up_scale: Tensor | None = None
    needs_input: bool = False  # `down` is wanted by `quantize`, not by `linear`

    @property
    def down_with_input(self) -> Tensor | None:
        """What `quantize` needs of it."""
        return self.down if self.needs_input else None


class Backend(Protocol):
    """A frozen dataclass with the backend's settings. An `Int8Linear` holds the one that runs it."""

    name: ClassVar[str]
    limits: ClassVar[Limits]

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """The weight in the layout that `linear` wants; computed once per layer."""
        ...

    def quantize(
        self, x: Tensor, factor: Tensor | None, rotation: Rotation | None, gelu_from: int, down: Tensor | None
    ) -> QuantizedInput:
        """Quantize each row: GELU on the columns from `gelu_from` (-1: none), times `factor`, groups rotated, rounded.

        Args:
            x: float [M, K].
            factor: float32 [K] or None.
            rotation: of groups of g columns, where g divides K; or None.
            down: the fused branch's down-projection, where it wants the input.
        """
        ...

    def linear(
        self,
        x: QuantizedInput,
        packed: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        branch: FusedBranch | None,
        strengths: Tensor | None,
    ) -> Tensor:
        """Multiply, scale, add the bias and the branch. w_scale: float32 [N], bias: float32 [N] -> [M, N] of the dtype."""
        ...


@runtime_checkable
class FusesBranch(Protocol):
    """What a backend may offer besides: the low-rank branch inside its own product."""

    def fuse_branch(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> FusedBranch | None:
        """The branch in the backend's own layout; None where its rank is too large for that.

        lora_A: float32 [r, K], for the transformed input; lora_B: float32 [N, r]; dtype of the float model.
        """
        ...


class Timer(Protocol):
    """What a tunable backend is timed by."""

    @property
    def device(self) -> torch.device:
        """Where it measures."""
        ...

    def measure_seconds(
        self, backends: Iterable[Backend], rows: int, in_features: int, out_features: int
    ) -> dict[str, float]:
        """Seconds of each backend."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """What a backend may offer besides: settings of its own that `task=bench` chooses per shape."""

    def tune(self, timer: Timer, rows: int, in_features: int, out_features: int) -> None:
        """Time its settings for a shape and keep the best."""
        ...


def run_plain_layer(
    backend: Backend, x: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """A whole layer without transform and branch: quantize x, multiply. x: float [M, K] -> [M, N], x's dtype."""
    return backend.linear(
        backend.quantize(x, None, None, -1, None), packed, w_scale, bias, x.dtype, None, None
    )
