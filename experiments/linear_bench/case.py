"""One layer to measure: the same numbers in every process, its exact result, and what may be added to it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# size of a LoRA's change relative to the weight, both as Frobenius norms
DELTA = 0.3


@dataclass
class Case:
    """x: [M, K], weight: [N, K], bias: [N], and a low-rank change A: [r, K], B: [N, r] where asked."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, K and N."""
        n, k = self.weight.shape
        return len(self.x), k, n

    def linear(self) -> nn.Sequential:
        """The float layer as a model of one Linear, named `0`; its weight is a copy."""
        n, k = self.weight.shape
        skeleton = nn.Sequential(nn.Linear(k, n, device="meta"))
        model = skeleton.to_empty(device=self.weight.device).to(self.weight.dtype)
        model[0].load_state_dict({"weight": self.weight, "bias": self.bias})
        return model.eval().requires_grad_(False)

    def error(self, y: Tensor) -> float:
        """|y - exact| / |exact|, with the exact result in float64."""
        exact = F.linear(self.x.double(), self.weight.double(), self.bias.double())
        if self.lora_A is not None and self.lora_B is not None:
            exact += self.x.double() @ self.lora_A.double().T @ self.lora_B.double().T
        return ((y.double() - exact).norm() / exact.norm()).item()


def make_case(
    m: int,
    k: int,
    n: int,
    rank: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Gaussian activations and weights from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    weight = torch.randn(n, k, generator=generator) / math.sqrt(k)
    bias = torch.randn(n, generator=generator) * 0.1
    tensors = [x, weight, bias]
    if rank:
        lora_A = torch.randn(rank, k, generator=generator) / math.sqrt(k)
        lora_B = torch.randn(n, rank, generator=generator)
        # |B A| for independent Gaussian factors is close to sqrt(N r)
        tensors += [lora_A, lora_B * (DELTA * weight.norm() / math.sqrt(n * rank))]
    return Case(*(tensor.to(device, dtype) for tensor in tensors))
