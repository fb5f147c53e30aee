"""LoRA and LoCon: a product of two thin matrices (arXiv 2106.09685)."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import (
    Dynamic,
    Pair,
    is_matrix,
    pick_rows,
    shape_misfit,
)


@dataclass(frozen=True, eq=False)
class LoRA:
    """`scale * lora_B @ lora_A`; with convolution kernels, and with a core between them, LyCORIS' LoCon."""

    lora_A: Tensor  # [r, K], or a kernel [r, K, kh, kw]
    lora_B: Tensor  # [N, r], or [N, r, 1, 1]
    scale: float = 1.0  # alpha / r
    mid: Tensor | None = None  # [r, r, kh, kw]

    reads_weight = False

    @property
    def kind(self) -> str:
        return "LoRA" if self.lora_A.dim() == 2 and self.mid is None else "LoCon"

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def rows(self) -> int:
        return self.lora_B.shape[0]

    @property
    def pair(self) -> Pair:
        """The two factors and the core."""
        return Pair(self.lora_B, self.lora_A, self.mid)

    @property
    def can_be_dynamic(self) -> bool:
        return is_matrix(self.pair.shape)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return shape_misfit(self.pair.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        return (self.scale * self.pair.dense(weight.device)).reshape(weight.shape)

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        if not self.can_be_dynamic:
            return None
        up, down = self.pair.factors()
        return Dynamic(down, self.scale * up)

    def pick(self, rows: Tensor) -> "LoRA":
        return replace(self, lora_B=pick_rows(self.lora_B, rows))
