"""What a backend is: the program that quantizes a layer's input and multiplies int8 matrices.

An `Int8Linear` holds one backend and calls its `quantize` and `linear` at every forward. The backends beside
this module implement the `Backend` protocol and state their `Limits` as data; none of them knows models,
LoRAs or configs.
"""

import dataclasses
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from int8run.backends.onednn_check import onednn_saturates
from int8run.kernels.cpu.features import read_cpu_capabilities
from int8run.kernels.cpu.instructions import find_unusable_reason
from int8run.kernels.cpu.library import COMPILERS
from int8run.kernels.hadamard.reference import Rotation
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.weight import QuantizedWeight
from int8run.utils.hardware import get_gpu_architecture

# a 32-bit sum holds this many products of the largest integers: signed inputs, or unsigned ones, by signed
# weights
MAX_SIGNED_PRODUCTS = 2**31 // (128 * 127)
MAX_UNSIGNED_PRODUCTS = 2**31 // (255 * 127)

# each of these instruction sets has a byte product that adds into 32 bits, by torch's names
INT8_CPU_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8")

Shape = tuple[int, int, int]  # of a layer: rows, in_features, out_features

# why no backend runs on a device that torch knows, for messages
NO_INT8_PRODUCT = {"mps": ", for which torch has no int8 product"}

# what the kernels take as `gelu_from` where there is no GELU: their operators have no optional integers
NO_GELU = -1


@dataclass(frozen=True)
class Limits:
    """What a backend needs, as data: the same values drive the check, the error message and the tests.

    Args:
        devices: device types that it runs on.
        cpu_features: instruction sets by torch's names, of which one is enough; empty: any CPU.
        kernel_instructions: instruction sets of int8run's own CPU kernels, of which one is enough.
        uses_onednn: whether its products on a CPU are oneDNN's, which need not use what the CPU has.
        needs_compiler: whether a C++ compiler must be on the PATH.
        python_packages: packages that must be installed.
        cuda_capability: the least compute capability of an NVIDIA GPU.
        amd_architectures: AMD GPUs that it runs on, by the compiler's names; empty: all.
        max_in_features: the widest layer whose 32-bit sums cannot overflow; None: any width.
        fuses_gelu: whether `quantize` computes a GELU on the way, at next to no cost.
        fuses_silu: whether a convolution computes a SiLU where it quantizes its input.
        fuses_norm: whether it also computes the GroupNorm before that.
        is_optional: whether `backend=auto` says nothing where this backend is missing, because few have it.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    cpu_features: tuple[str, ...] = ()
    kernel_instructions: tuple[str, ...] = ()
    uses_onednn: bool = False
    needs_compiler: bool = False
    python_packages: tuple[str, ...] = ()
    cuda_capability: tuple[int, int] = (0, 0)
    amd_architectures: tuple[str, ...] = ()
    max_in_features: int | None = None
    fuses_gelu: bool = False
    fuses_silu: bool = False
    fuses_norm: bool = False
    is_optional: bool = False

    def unsupported_reasons(self, device: torch.device) -> list[str]:
        """Every reason why the backend cannot run on this device; empty when it can."""
        if device.type not in self.devices:
            reason = f"runs on {' and '.join(self.devices)}, not on {device.type}"
            return [reason + NO_INT8_PRODUCT.get(device.type, "")]
        reasons = []
        processor_reason = self._unsupported_processor_reason(device)
        if processor_reason is not None:
            reasons.append(processor_reason)
        if self.needs_compiler and not any(map(shutil.which, COMPILERS)):
            reasons.append(f"needs a C++ compiler on the PATH ({', '.join(COMPILERS)})")
        for package in self.python_packages:
            if importlib.util.find_spec(package) is None:
                pip_name = package.replace("_", "-")
                reasons.append(f"needs the Python package {package} (pip install {pip_name})")
        return reasons

    def _unsupported_processor_reason(self, device: torch.device) -> str | None:
        if device.type == "cpu":
            return self._unsupported_cpu_reason()
        if device.type == "cuda":
            return self._unsupported_gpu_reason(device)
        return None

    def _unsupported_cpu_reason(self) -> str | None:
        if self.cpu_features and not has_cpu_feature(self.cpu_features):
            return f"needs a CPU with {' or '.join(self.cpu_features)}: without, int8 products saturate"
        if self.kernel_instructions:
            reason = find_unusable_reason(self.kernel_instructions)
            if reason is not None:
                return reason
        if self.uses_onednn and onednn_saturates():
            return (
                "uses oneDNN, whose int8 products saturate here: something keeps it from this CPU's int8 "
                "instructions; unset ONEDNN_MAX_CPU_ISA"
            )
        return None

    def _unsupported_gpu_reason(self, device: torch.device) -> str | None:
        if torch.version.hip:
            return self._unsupported_amd_reason(device)
        # a GPU is asked for its capability only where one is required: asking starts CUDA
        if self.cuda_capability == (0, 0):
            return None
        capability = torch.cuda.get_device_capability(device)
        if capability >= self.cuda_capability:
            return None
        required, found = format_version(self.cuda_capability), format_version(capability)
        return f"needs compute capability {required}, this GPU has {found}"

    def _unsupported_amd_reason(self, device: torch.device) -> str | None:
        if not self.amd_architectures:
            return None
        architecture = get_gpu_architecture(device)
        if architecture in self.amd_architectures:
            return None
        known = ", ".join(self.amd_architectures)
        return f"runs on AMD GPUs of {known}, this one is {architecture}; backend=auto finds another"

    def unsupported_layer_reasons(self, in_features: int, out_features: int) -> list[str]:
        """Every reason why the backend cannot take a layer of this shape; empty when it can."""
        if self.max_in_features is None or in_features <= self.max_in_features:
            return []
        return [f"in_features={in_features} overflows its 32-bit sums, which hold {self.max_in_features}"]


def format_version(numbers: tuple[int, int]) -> str:
    """`(8, 0)` as `8.0`."""
    return ".".join(map(str, numbers))


def has_cpu_feature(features: Sequence[str]) -> bool:
    """Whether this CPU has one of these instruction sets, named as torch does (`avx512_vnni`, ...)."""
    capabilities = read_cpu_capabilities()
    return any(capabilities.get(feature, False) for feature in features)


class QuantizedInput(NamedTuple):
    """Rows after quantization: what layers that read the same tensor can share.

    Args:
        q: int8 or uint8 [M, K]; a backend may pad M and K.
        scale: float32, one per row.
        down_product: float32 [M, r], the branch's down-projection of x, where the backend computes it in the
            same pass.
        rotation: size of the groups that `linear` has still to rotate, for a backend that quantizes inside
            its product.
    """

    q: Tensor
    scale: Tensor
    down_product: Tensor | None = None
    rotation: int = 0


class FusedBranch(NamedTuple):
    """A low-rank branch in a backend's own layout.

    Args:
        down: the factor that reads the input, lora_A.
        up: the factor that writes the output, lora_B.
        down_scale: scales of `down`, where it is quantized.
        up_scale: scales of `up`, where it is quantized.
        needs_input: whether `quantize` takes `down` and multiplies it with the transformed input; otherwise
            `linear` does.
        max_rank: how many ranks `quantize` can multiply at once; None: any number.
    """

    down: Tensor
    up: Tensor
    down_scale: Tensor | None = None
    up_scale: Tensor | None = None
    needs_input: bool = False
    max_rank: int | None = None

    @property
    def down_with_input(self) -> Tensor | None:
        """What to give to `quantize` as `down`."""
        return self.down if self.needs_input else None


class Backend(Protocol):
    """A frozen dataclass with the backend's settings. An `Int8Linear` holds the one that runs it."""

    name: ClassVar[str]

    @property
    def limits(self) -> Limits:
        """What it needs, with its settings; most backends have the same for all, as a class variable."""
        ...

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """The integers of a weight in the layout that `linear` takes; computed once per layer."""
        ...

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """Quantize each row after a GELU, a factor per column and a rotation, in this order.

        Args:
            x: float [M, K].
            factor: float32 [K], multiplied to the columns.
            rotation: of groups of g columns, where g divides K.
            gelu_from: the first column that goes through a GELU (tanh); None: no column does.
            down: the down-projection of a fused branch that needs the input, see
                `FusedBranch.down_with_input`.
        """
        ...

    def linear(
        self,
        x: QuantizedInput,
        packed: Tensor,
        w_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        branch: FusedBranch | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """Multiply, apply the scales, and add the bias and the branch.

        Args:
            x: from `quantize`: M rows of K columns.
            packed: from `pack_weight`.
            w_scale: float32 [N].
            dtype: of the result.
            bias: float32 [N].
            branch: from `FusesBranch.fuse_branch`.
            strengths: float32 [r], one per rank of the branch.

        Returns:
            dtype [M, N].
        """
        ...


class PackedGroups(NamedTuple):
    """A grouped weight in a backend's own layout; the tensors are a layer's buffers.

    Args:
        codes: codes of 4 or 6 bits.
        group_scale: the scale of each group.
        codebook: float32 [16], the level of each code; None: evenly spaced ones.
        bits: 4 or 6.
        group_size: columns that share a scale.
    """

    codes: Tensor
    group_scale: Tensor
    codebook: Tensor | None
    bits: int
    group_size: int


@runtime_checkable
class MultipliesGroupedWeights(Protocol):
    """A backend whose product decodes weights of 4 and 6 bits on the way, without an int8 copy of them."""

    def unsupported_group_reasons(self, weight: GroupedWeight) -> list[str]:
        """Every reason why `grouped_linear` cannot take this weight; empty when it can."""
        ...

    def pack_grouped_weight(self, weight: GroupedWeight) -> PackedGroups:
        """The weight in the layout that `grouped_linear` takes; computed once per layer."""
        ...

    def unpack_grouped_weight(self, packed: PackedGroups, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes and group scales as they were given to `pack_grouped_weight`, to the bit.

        Files and LoRAs ask for it.

        Args:
            packed: from `pack_grouped_weight`.
            shape: N and K of the weight.

        Returns:
            codes: int8 [N, K * bits / 8].
            group_scale: [N, K / g], in the dtype that it had.
        """
        ...

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
        """As `Backend.linear`, with a weight from `pack_grouped_weight`; its numbers are `decode`'s."""
        ...


@runtime_checkable
class PacksInsideProduct(Protocol):
    """A backend whose `pack_weight` compiled code cannot call, with a product that packs by itself."""

    def multiply_once(
        self, x: QuantizedInput, weight: QuantizedWeight, *, dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor:
        """As `Backend.linear`, with a weight that is used once and as it is; visible to torch.compile."""
        ...


@runtime_checkable
class FusesBranch(Protocol):
    """A backend that can compute a low-rank branch inside its own product."""

    def fuse_branch(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> FusedBranch | None:
        """The branch in the backend's own layout; None where its rank is too large for that.

        Args:
            lora_A: float32 [r, K], in the basis of the transformed input.
            lora_B: float32 [N, r].
            dtype: of the float model.
        """
        ...


@runtime_checkable
class ComputesNorms(Protocol):
    """A backend with a kernel for RMSNorm, faster than torch's own on its device."""

    def normalize(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """`x / sqrt(mean(x²) + eps) * weight` over the last dimension.

        Args:
            x: float [..., K], contiguous.
            weight: [K] in x's dtype.
            eps: added to the mean.
        """
        ...


@runtime_checkable
class RotatesPositions(Protocol):
    """A backend with a kernel for the rotary embedding of queries and keys."""

    def can_rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, tokens_first: bool) -> bool:
        """Whether the kernel takes these tensors as they are; shapes as for `rotate_positions`."""
        ...

    def rotate_positions(self, x: Tensor, cos: Tensor, sin: Tensor, *, tokens_first: bool) -> Tensor:
        """Rotate each pair of neighboring channels by the angle of its token.

        Args:
            x: float [B, tokens, heads, D] or [B, heads, tokens, D].
            cos: float32 [tokens, D], of the angles.
            sin: as `cos`.
            tokens_first: whether tokens come before heads.
        """
        ...


@runtime_checkable
class HasInstructionSet(Protocol):
    """A backend whose kernels are built for an instruction set."""

    @property
    def instruction_set(self) -> str:
        """Its name."""
        ...


def find_instruction_set(backend: object) -> str:
    """What a backend's kernels are built for; empty where it has no kernels of that kind."""
    return backend.instruction_set if isinstance(backend, HasInstructionSet) else ""


def describe_settings(backend: Backend) -> str:
    """A backend's name, with the settings that differ from its own defaults: `cpu(instructions=avx2)`.

    Not the file in which it keeps what it measured: that changes no result and no time.
    """
    settings: list[str] = []
    if dataclasses.is_dataclass(backend):
        for option in dataclasses.fields(backend):
            value = getattr(backend, option.name)
            if option.name != "table" and option.compare and value != option.default:
                settings.append(f"{option.name}={value}")
    if not settings:
        return backend.name
    return f"{backend.name}({', '.join(settings)})"


@dataclass(frozen=True)
class LayerTimes:
    """What was measured on one layer shape.

    Args:
        seconds: of one call, by name: the median of its rounds.
        failures: why others could not run, by name.
        is_steady: whether the times of the fastest did not scatter.
        shortest: of its rounds, by name; nothing for what was called once.
    """

    seconds: Mapping[str, float]
    failures: Mapping[str, str]
    is_steady: bool
    shortest: Mapping[str, float] = field(default_factory=dict)

    def find_shortest(self, name: str) -> float:
        """The seconds of the quickest call."""
        return self.shortest.get(name, self.seconds[name])


class Timer(Protocol):
    """Times backends on one device; `Tunable` backends are given one."""

    @property
    def device(self) -> torch.device:
        """Where it measures."""
        ...

    def measure(self, backends: Mapping[str, Backend], shape: Shape) -> LayerTimes:
        """Time a layer without transform and branch on each backend.

        Args:
            backends: by the name that they have in the result.
            shape: of the layer.
        """
        ...


@runtime_checkable
class Tunable(Protocol):
    """A backend with settings that `task=bench` chooses for each shape."""

    def tune(self, timer: Timer, shape: Shape) -> None:
        """Time the settings for a shape and keep the best of those that can run."""
        ...


@runtime_checkable
class TunesGroupedWeights(Protocol):
    """A backend with settings for weights of 4 and 6 bits that `task=bench` chooses for each shape."""

    def tune_grouped(self, timer: Timer, shape: Shape, bits: int) -> None:
        """Time the settings for a shape and keep the best of those that can run."""
        ...


def run_plain_layer(
    backend: Backend, x: Tensor, packed: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """A whole layer without transform and branch: quantize x and multiply.

    Args:
        backend: runs the layer.
        x: float [M, K].
        packed: from `pack_weight`.
        w_scale: float32 [N].
        bias: float32 [N] or None.

    Returns:
        [M, N] in x's dtype.
    """
    return backend.linear(backend.quantize(x), packed, w_scale, dtype=x.dtype, bias=bias)
