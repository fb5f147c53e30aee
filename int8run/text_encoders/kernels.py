"""Chooses the kernels that a text encoder's quantized layers run on, from `clip.kernel_backend`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from int8run.backends.base import Backend
from int8run.backends.registry import make_backend
from int8run.backends.triton import Triton
from int8run.errors import BackendError
from int8run.layers.plan import LayerPlan
from int8run.ptq.quantize import check_backend
from int8run.quant.grouped_weight import GROUPED_BITS
from int8run.text_encoders.base import DEQUANTIZE, SCALED_MM
from int8run.text_encoders.plan_layers import format_counts

# backends that run INT8 layers, and dequantize the others
RUNS_ALL_FORMATS = ("auto", "triton", "reference")


@dataclass(frozen=True)
class Kernels:
    """How quantized layers run.

    Args:
        name: `auto`, an INT8 backend, `dequantize` or `scaled_mm`.
        device: where they run.
        num_tokens: of a call, with which `auto` measures.
    """

    name: str
    device: torch.device
    num_tokens: int

    @cached_property
    def backend(self) -> Backend | None:
        """What runs INT8 layers; None: float products."""
        return None if self.name in (DEQUANTIZE, SCALED_MM) else make_backend(self.name)

    @property
    def dequantizer(self) -> str:
        """The kernels that dequantize weights: `reference`, `triton` or `eager` (torch)."""
        if self.name == "reference":
            return "reference"
        if self.name in ("auto", "triton", DEQUANTIZE) and self.has_triton:
            return "triton"
        return "eager"

    @cached_property
    def has_triton(self) -> bool:
        """Whether int8run's Triton kernels run on the device."""
        return not Triton.limits.unsupported_reasons(self.device)


def check_dtypes(kernels: Kernels, plans: Sequence[LayerPlan], where: str) -> None:
    """Check that the device has the numbers that the weights are stored in.

    Args:
        kernels: as they were asked for.
        plans: of all layers.
        where: the file, for messages.

    Raises:
        BackendError: for fp8 weights and scales on MPS.
    """
    if kernels.device.type != "mps":
        return
    formats = Counter(plan.rounding for plan in plans if plan.skip_reason is None)
    fp8 = Counter({name: count for name, count in formats.items() if not name.startswith("int8")})
    if fp8:
        raise BackendError(
            f"{where} gives {format_counts(fp8)}, and torch has no fp8 on mps; choose an int8 format, or "
            "device=cpu"
        )


def check_kernels(kernels: Kernels, plans: Sequence[LayerPlan], where: str) -> None:
    """Check that the kernels can run here, and that they have a layer to run.

    Args:
        kernels: as they were asked for.
        plans: of all layers.
        where: the file, for messages.

    Raises:
        BackendError: naming what would work.
    """
    check_dtypes(kernels, plans, where)
    backend = kernels.backend
    if backend is None:
        return
    try:
        check_backend(backend, kernels.device, ())
    except BackendError as error:
        raise BackendError(
            f"clip.kernel_backend={kernels.name}: {error}; {DEQUANTIZE} runs everywhere"
        ) from error
    formats = Counter(plan.rounding for plan in plans if plan.skip_reason is None)
    has_int8 = any(name.startswith("int8") or name in GROUPED_BITS for name in formats)
    if formats and not has_int8 and kernels.name not in RUNS_ALL_FORMATS:
        raise BackendError(
            f"clip.kernel_backend={kernels.name} runs INT8 layers, and {where} gives "
            f"{format_counts(formats)}; choose auto or {DEQUANTIZE}"
        )
