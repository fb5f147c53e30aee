"""LoRA and LoCon: the change is a product of two thin matrices (PEFT `tuners/lora`, LyCORIS `locon`)."""

from dataclasses import dataclass, replace

from torch import Tensor

from int8run.lora.adapters.base import RuntimeBranch, describe_shape_mismatch
from int8run.lora.adapters.low_rank import LowRankPair
from int8run.lora.adapters.row_selection import select_rows


@dataclass(frozen=True, eq=False)
class LoRA:
    """`delta W = (alpha / r) * lora_B @ lora_A` (Hu et al. 2021, arXiv 2106.09685).

    With convolution kernels, or with a Tucker core between the factors, it is the LoCon of LyCORIS (arXiv
    2309.14859).

    Args:
        lora_A: [r, K], or a kernel [r, K, kh, kw].
        lora_B: [N, r], or [N, r, 1, 1].
        scale: alpha / r.
        mid: the Tucker core [r, r, kh, kw].
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    needs_weight = False
    has_branch = True

    @property
    def adapter_type(self) -> str:
        """`LoRA` for a pair of matrices; `LoCon` for kernels, or with a core."""
        is_plain_pair = self.lora_A.dim() == 2 and self.mid is None
        return "LoRA" if is_plain_pair else "LoCon"

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[0]

    @property
    def out_features(self) -> int:
        """N."""
        return self.lora_B.shape[0]

    @property
    def pair(self) -> LowRankPair:
        """`lora_B @ lora_A`, with the core between them: [N, K, *kernel]."""
        return LowRankPair(up=self.lora_B, down=self.lora_A, mid=self.mid)

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has the shape of the product."""
        return describe_shape_mismatch(self.pair.shape, shape)

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`scale * lora_B @ lora_A`, in the shape of the weight."""
        product = self.pair.to_dense(weight.device)  # [N, K, *kernel]
        return (self.scale * product).reshape(weight.shape)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch:
        """The two factors, the second one scaled: `x -> scale * lora_B (lora_A x)`."""
        up, down = self.pair.compute_factors()  # [N, r], [r, K]
        return RuntimeBranch(lora_A=down, lora_B=self.scale * up)

    def select_rows(self, index: Tensor) -> "LoRA":
        """Rows of `lora_B`: a row of a product needs all of the right factor, and one row of the left."""
        return replace(self, lora_B=select_rows(self.lora_B, index))
