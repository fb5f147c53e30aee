"""LoRA and LoCon: a product of two thin matrices (arXiv 2106.09685)."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import (
    LowRankPair,
    RuntimeBranch,
    describe_shape_mismatch,
    is_matrix,
    select_rows,
)


@dataclass(frozen=True, eq=False)
class LoRA:
    """`scale * lora_B @ lora_A`; with convolution kernels, and with a core between them, LyCORIS' LoCon."""

    lora_A: Tensor  # [r, K], or a kernel [r, K, kh, kw]
    lora_B: Tensor  # [N, r], or [N, r, 1, 1]
    scale: float = 1.0  # alpha / r
    mid: Tensor | None = None  # [r, r, kh, kw]

    needs_weight = False

    @property
    def adapter_type(self) -> str:
        return "LoRA" if self.lora_A.dim() == 2 and self.mid is None else "LoCon"

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def pair(self) -> LowRankPair:
        """The two factors and the core."""
        return LowRankPair(self.lora_B, self.lora_A, self.mid)

    @property
    def has_branch(self) -> bool:
        return is_matrix(self.pair.shape)

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        return describe_shape_mismatch(self.pair.shape, shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        return (self.scale * self.pair.to_dense(weight.device)).reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        if not self.has_branch:
            return None
        up, down = self.pair.compute_factors()
        return RuntimeBranch(down, self.scale * up)

    def select_rows(self, rows: Tensor) -> "LoRA":
        return replace(self, lora_B=select_rows(self.lora_B, rows))
