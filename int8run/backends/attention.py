"""What computes INT8 attention on a device, and what is done to queries and keys before they are rounded.

`layers.int8_attention` holds one of these backends and calls it at every forward. They are apart from those
of Linears, which have a weight to pack, and are known by the same names, so that `backend=cpu` means both.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from int8run.backends.base import Backend, Limits
from int8run.errors import BackendError
from int8run.kernels.cpu import attention as cpu_attention
from int8run.kernels.cpu.instructions import AUTO, INSTRUCTION_SETS
from int8run.kernels.cpu.library import BuildError, load_attention_library
from int8run.kernels.int8_attention.reference import int8_attention
from int8run.kernels.int8_attention.tile import MAX_WIDTH, choose_attention_tile
from int8run.kernels.int8_linear.tile import AMD_ARCHITECTURES
from int8run.utils.attention_call import AttentionCall
from int8run.utils.hardware import get_gpu_architecture

# the least group of channels that is worth a rotation
MIN_ROTATION = 4


@dataclass(frozen=True)
class AttentionMethod:
    """What keeps outliers in queries and keys from widening the scale of their token.

    Args:
        rotation: channels of a group of queries and keys that is rotated by a Hadamard matrix; 0: none.
        center_keys: subtract the mean of all keys, which changes no probability.
    """

    rotation: int = 0
    center_keys: bool = False

    @property
    def label(self) -> str:
        """How tables name it: `rotated 64`, `centered`, `rotated 8, centered`, `none`."""
        steps = []
        if self.rotation:
            steps.append(f"rotated {self.rotation}")
        if self.center_keys:
            steps.append("centered")
        return ", ".join(steps) or "none"


def choose_attention_method(width: int) -> AttentionMethod:
    """The method for a head width: a rotation of the whole head where there is a matrix of that size.

    Else groups of the largest power of 2 that divides the width are rotated, and the keys are centered.
    """
    rotation = width & -width  # the largest power of 2 in it
    if rotation == width:
        return AttentionMethod(rotation=rotation)
    if rotation < MIN_ROTATION:
        return AttentionMethod(center_keys=True)
    return AttentionMethod(rotation=rotation, center_keys=True)


class AttentionBackend(Protocol):
    """A frozen dataclass with the backend's settings. An `Int8Attention` holds the one that runs it."""

    name: ClassVar[str]

    @property
    def limits(self) -> Limits:
        """What it needs of a device."""
        ...

    @property
    def instruction_set(self) -> str:
        """What its kernels are built for; empty where they are built for none.

        Raises:
            BackendError: when they cannot be built.
        """
        ...

    def unsupported_width_reason(self, width: int, value_width: int) -> str | None:
        """Why it cannot take heads of these widths; None: it can."""
        ...

    def attend(self, call: AttentionCall, method: AttentionMethod) -> Tensor:
        """Compute an attention as `kernels.int8_attention.reference.int8_attention` defines it.

        Args:
            call: what a model asks for; its dropout is none.
            method: what is done to queries and keys before they are rounded.

        Returns:
            [B, Hq, Lq, Dv] in the query's dtype.
        """
        ...


def make_kernel_options(call: AttentionCall, method: AttentionMethod) -> dict[str, Any]:
    """What the attention of every backend takes beside queries, keys and values, by the reference's names."""
    return {
        "mask": call.attn_mask,
        "is_causal": call.is_causal,
        "scale": call.scale,
        "rotation": method.rotation,
        "center_keys": method.center_keys,
    }


@dataclass(frozen=True)
class ReferenceAttention:
    """The definition: slow, and runs everywhere."""

    name: ClassVar[str] = "reference"
    limits: ClassVar[Limits] = Limits(devices=("cpu", "cuda", "xpu"))
    instruction_set: ClassVar[str] = ""

    def unsupported_width_reason(self, width: int, value_width: int) -> str | None:
        """None: it takes all."""
        return None

    def attend(self, call: AttentionCall, method: AttentionMethod) -> Tensor:
        """By the definition itself."""
        return int8_attention(call.query, call.key, call.value, **make_kernel_options(call, method))


@dataclass(frozen=True)
class CpuAttention:
    """int8run's own kernels for CPUs (`kernels/cpu/attention.h`), compiled on first use.

    Args:
        instructions: name of an instruction set; `auto`: the best that this CPU has.
    """

    instructions: str = AUTO
    name: ClassVar[str] = "cpu"

    @property
    def limits(self) -> Limits:
        """What it needs: one of all instruction sets, or the one that was asked for."""
        names = tuple(INSTRUCTION_SETS) if self.instructions == AUTO else (self.instructions,)
        return Limits(devices=("cpu",), kernel_instructions=names, needs_compiler=True)

    @property
    def instruction_set(self) -> str:
        """Name of the instruction set that the kernels are built for.

        Raises:
            BackendError: when the kernels cannot be built.
        """
        try:
            return load_attention_library(self.instructions).instructions
        except BuildError as error:
            raise BackendError(f"INT8 attention on the CPU: {error}; set int8.attention=float") from error

    def unsupported_width_reason(self, width: int, value_width: int) -> str | None:
        """None: it takes all."""
        return None

    def attend(self, call: AttentionCall, method: AttentionMethod) -> Tensor:
        """By the CPU's kernels; the result lies as [B, Lq, Hq, Dv]."""
        options = make_kernel_options(call, method)
        return cpu_attention.int8_attention(
            call.query, call.key, call.value, instructions=self.instructions, **options
        )


@dataclass(frozen=True)
class TritonAttention:
    """int8run's own kernels for GPUs (`kernels/int8_attention/kernel.py`): 8-bit scores, 16-bit values.

    Args:
        architecture: of the GPU, such as `sm_90`; the kernel's tiles follow from it.
    """

    architecture: str = ""
    name: ClassVar[str] = "triton"
    limits: ClassVar[Limits] = Limits(
        devices=("cuda",),
        cuda_capability=(8, 0),
        amd_architectures=AMD_ARCHITECTURES,
        python_packages=("triton",),
    )
    instruction_set: ClassVar[str] = ""

    def unsupported_width_reason(self, width: int, value_width: int) -> str | None:
        """A head that is wider than the kernel's registers."""
        if max(width, value_width) <= MAX_WIDTH:
            return None
        return f"a head has {max(width, value_width)} channels, backend triton takes up to {MAX_WIDTH}"

    def attend(self, call: AttentionCall, method: AttentionMethod) -> Tensor:
        """By the GPU's kernels, with the tile for this shape."""
        # not everybody has Triton; here and not in a cached property, which torch.compile cannot enter
        from int8run.kernels.int8_attention.kernel import int8_attention as launch_int8_attention

        mask = call.attn_mask
        tile = choose_attention_tile(
            self.architecture,
            max(call.query.shape[3], call.value.shape[3]),
            call.query.shape[2],
            has_row_mask=mask is not None and mask.dim() > 1 and mask.shape[-2] > 1,
        )
        options = make_kernel_options(call, method)
        return launch_int8_attention(call.query, call.key, call.value, tile=tile, **options)


def make_attention_backends(asked: Backend, device: torch.device) -> dict[str, AttentionBackend]:
    """Every backend of attention by its name, the fastest first; the last one runs everywhere.

    Args:
        asked: `backend=` of the config, whose settings count for attention, too.
        device: where the model runs.
    """
    candidates = getattr(asked, "candidates", {})
    cpu = candidates.get(CpuAttention.name, asked)
    architecture = get_gpu_architecture(device) if device.type == "cuda" else ""
    backends: list[AttentionBackend] = [
        TritonAttention(architecture),
        CpuAttention(instructions=getattr(cpu, "instructions", AUTO)),
        ReferenceAttention(),
    ]
    return {backend.name: backend for backend in backends}


def list_attention_backends(asked: Backend, device: torch.device) -> list[AttentionBackend]:
    """The backends that can compute attention on a device, the fastest first.

    Args:
        asked: `backend=` of the config; where attention has one of that name, it alone.
        device: where the model runs.
    """
    backends = make_attention_backends(asked, device)
    choice = list(backends.values())
    if asked.name in backends:
        choice = [backends[asked.name]]
    return [backend for backend in choice if not backend.limits.unsupported_reasons(device)]
