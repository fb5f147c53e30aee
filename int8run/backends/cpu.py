"""int8run's own CPU kernels: one pass over the input, one product with everything else in its registers.

The kernels are C++ (`kernels/cpu`), compiled on first use for the instruction set that runs them.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from int8run.backends.base import (
    MAX_SIGNED_PRODUCTS,
    NO_GELU,
    FusedBranch,
    Limits,
    PackedGroups,
    QuantizedInput,
)
from int8run.errors import BackendError, check_bool, check_choice
from int8run.kernels.cpu import grouped, linear, norm, rotary
from int8run.kernels.cpu.instructions import AUTO, INSTRUCTION_SETS
from int8run.kernels.cpu.library import BuildError, load_linear_library
from int8run.kernels.grouped_weight.reference import compute_levels
from int8run.kernels.hadamard.reference import Rotation
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.weight import QuantizedWeight, quantize_weight

# unsigned activations may wrap the sums around; subtracting 128 times the weights' sum wraps them back
LIMITS = Limits(
    devices=("cpu",),
    kernel_instructions=tuple(INSTRUCTION_SETS),
    needs_compiler=True,
    fuses_gelu=True,
    max_in_features=MAX_SIGNED_PRODUCTS,
)
# by what `instructions` may be
LIMITS_BY_INSTRUCTIONS = {
    AUTO: LIMITS,
    **{name: replace(LIMITS, kernel_instructions=(name,)) for name in INSTRUCTION_SETS},
}


class BranchFactors(NamedTuple):
    """What the product takes of a low-rank branch; None without one.

    Args:
        down: packed int8 [r, K].
        down_scale: float32 [r], times the strengths.
        up: packed int8 [N, r].
        up_scale: float32 [N].
    """

    down: Tensor | None = None
    down_scale: Tensor | None = None
    up: Tensor | None = None
    up_scale: Tensor | None = None


@dataclass(frozen=True)
class Cpu:
    """Kernels for the byte products of CPUs.

    `quantize` computes GELU, factor and rotation in one pass; `linear` keeps the scales, the bias and an int8
    low-rank branch in registers.

    Args:
        int8_branch: compute LoRA branches in int8 inside the product; false: as two float products beside it.
        instructions: name of an instruction set; `auto`: the best that this CPU has.
    """

    int8_branch: bool = True
    instructions: str = AUTO
    name: ClassVar[str] = "cpu"

    def __post_init__(self) -> None:
        check_bool("backend.int8_branch", self.int8_branch)
        check_choice("backend.instructions", self.instructions, (AUTO, *INSTRUCTION_SETS))

    @property
    def limits(self) -> Limits:
        """What it needs: one of all instruction sets, or the one that was asked for."""
        return LIMITS_BY_INSTRUCTIONS[self.instructions]

    @property
    def instruction_set(self) -> str:
        """Name of the instruction set that the kernels are built for.

        Raises:
            BackendError: when the kernels cannot be built.
        """
        try:
            return load_linear_library(self.instructions).instructions
        except BuildError as error:
            raise BackendError(f"backend cpu: {error}; backend=auto takes the next best") from error

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """Panels of 64 output columns, with their compensations; may be saved.

        int8 [ceil(N / 64), 1 + ceil(K / 4), 256].

        Raises:
            BackendError: when the kernels cannot be built.
        """
        _ = self.instruction_set  # raises now what would stop the first step
        return linear.pack_weight(weight.qdata)

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """x: [M, K] -> uint8 [M, K rounded up to 4] and scales [M]."""
        q, scale = linear.quantize_rows(
            x,
            factor=factor,
            rotation=0 if rotation is None else rotation.group,
            sylvester=rotation is not None and rotation.sylvester,
            gelu_from=NO_GELU if gelu_from is None else gelu_from,
            instructions=self.instructions,
        )
        return QuantizedInput(q, scale)

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
        """x: [M, K] -> [M, N].

        Raises:
            ValueError: for a branch without strengths, or one that is not from `fuse_branch`.
        """
        if branch is None:
            return linear.int8_linear(
                x.q, x.scale, packed, w_scale, bias, dtype, instructions=self.instructions
            )
        factors = scale_branch(branch, strengths)
        return linear.int8_linear(
            x.q,
            x.scale,
            packed,
            w_scale,
            bias,
            dtype,
            down=factors.down,
            down_scale=factors.down_scale,
            up=factors.up,
            up_scale=factors.up_scale,
            instructions=self.instructions,
        )

    def unsupported_group_reasons(self, weight: GroupedWeight) -> list[str]:
        """Groups that the kernel cannot decode."""
        levels = compute_levels(weight.bits, weight.codebook)
        return grouped.list_unsupported_reasons(weight.group_scale, levels, weight.bits, weight.shape[1])

    def pack_grouped_weight(self, weight: GroupedWeight) -> PackedGroups:
        """Panels of 64 output columns, with their compensations; `kernels/cpu/grouped.h` draws them.

        Raises:
            BackendError: when the kernels cannot be built.
        """
        _ = self.instruction_set  # raises now what would stop the first step
        return PackedGroups(
            codes=grouped.pack_weight(weight.codes, weight.group_scale, weight.bits, weight.codebook),
            group_scale=grouped.pack_group_scale(weight.group_scale),
            codebook=weight.codebook,
            bits=weight.bits,
            group_size=weight.group_size,
        )

    def unpack_grouped_weight(self, packed: PackedGroups, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes [N, K * bits / 8] and group scales [N, K / g] as they were packed. shape: N and K."""
        rows = shape[0]
        codes = grouped.unpack_codes(grouped.remove_compensation(packed.codes), packed.bits, rows)
        return codes, grouped.unpack_group_scale(packed.group_scale, rows)

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
        """x: [M, K] -> [M, N], the weight decoded for each panel of columns.

        Raises:
            ValueError: for a branch without strengths, or one that is not from `fuse_branch`.
        """
        factors = scale_branch(branch, strengths)
        return grouped.grouped_linear(
            x.q,
            x.scale,
            packed.codes,
            packed.group_scale,
            packed.codebook,
            packed.bits,
            w_scale,
            bias,
            dtype,
            down=factors.down,
            down_scale=factors.down_scale,
            up=factors.up,
            up_scale=factors.up_scale,
            instructions=self.instructions,
        )

    def multiply_once(
        self, x: QuantizedInput, weight: QuantizedWeight, *, dtype: torch.dtype, bias: Tensor | None
    ) -> Tensor:
        """x: [M, K] -> [M, N], with a weight that is packed for this one product."""
        # `pack_weight` of the backend would look for its compiled kernels, which a graph cannot do
        packed = linear.pack_weight(weight.qdata)
        return self.linear(x, packed, weight.scale[:, 0], dtype=dtype, bias=bias)

    def normalize(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """RMSNorm over the last dimension. x: [..., K], weight: [K] -> [..., K]."""
        return norm.rms_norm(x, weight, eps, self.instructions)

    def can_rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, tokens_first: bool) -> bool:
        """Whether the kernel takes these tensors as they are."""
        is_here = x.device.type == cos.device.type == sin.device.type == "cpu"
        return is_here and rotary.can_rotate(x, cos, sin, tokens_first=tokens_first)

    def rotate_positions(self, x: Tensor, cos: Tensor, sin: Tensor, *, tokens_first: bool) -> Tensor:
        """Rotary embedding. x: [B, tokens, heads, D] or [B, heads, tokens, D], cos and sin: [tokens, D]."""
        return rotary.rotate_positions(x, cos, sin, tokens_first=tokens_first, instructions=self.instructions)

    def fuse_branch(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> FusedBranch | None:
        """Both factors in int8 with a scale per row: the branch uses the quantized x and the same
        instructions.

        None with `int8_branch=false`.
        """
        if not self.int8_branch:
            return None
        down, up = quantize_weight(lora_A), quantize_weight(lora_B)
        return FusedBranch(
            down=linear.pack_weight(down.qdata),
            up=linear.pack_weight(up.qdata),
            down_scale=down.scale[:, 0].contiguous(),
            up_scale=up.scale[:, 0].contiguous(),
        )


def scale_branch(branch: FusedBranch | None, strengths: Tensor | None) -> BranchFactors:
    """What the product takes of a branch.

    Args:
        branch: from `fuse_branch`, or None.
        strengths: float32 [r], one per rank.

    Raises:
        ValueError: for a branch without strengths, or one that is not from `fuse_branch`.
    """
    if branch is None:
        return BranchFactors()
    if strengths is None or branch.down_scale is None or branch.up_scale is None:
        raise ValueError("a branch of backend cpu needs its scales, which fuse_branch gives, and strengths")
    return BranchFactors(branch.down, branch.down_scale * strengths, branch.up, branch.up_scale)
