"""A LoRA file that is to be written, and what it does to each module of its model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lora.layouts.names import FLUX, SWAPPED
from torch import Tensor, nn

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK


@dataclass
class Expected:
    """What becomes of one module at strength 1."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class Sample:
    """One file, while it is made and after."""

    name: str
    base: str
    models: Mapping[str, nn.Module]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] | None = None
    expected: dict[str, dict[str, Expected]] = field(default_factory=dict)
    path: Path = Path()

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(sum(map(ord, self.name)))

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers, the same for the same file."""
        return torch.randn(shape, generator=self.generator)

    def randint8(self, *shape: int) -> Tensor:
        """INT8 numbers, -127 to 127, the same for the same file."""
        return torch.randint(-127, 128, shape, generator=self.generator).to(torch.int8)

    def weight(self, module: str, component: str = "denoiser") -> Tensor:
        """The weight of a module of the model."""
        return self.models[component].get_submodule(module).weight

    def add(self, prefix: str, **parts: Tensor) -> None:
        """Tensors under `prefix.part`; two underscores stand for a dot."""
        for part, tensor in parts.items():
            self.put(f"{prefix}.{part.replace('__', '.')}", tensor)

    def put(self, key: str, tensor: Tensor) -> None:
        """A tensor under its key."""
        self.tensors[key] = tensor.clone().contiguous()

    def expect(
        self,
        module: str,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        component: str = "denoiser",
    ) -> None:
        """The change of one module."""
        self.expected.setdefault(component, {})[module] = Expected(weight, bias)

    def expect_native(self, native: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """The change of a matrix with the names of Flux's authors: cut by the rows of diffusers' modules."""
        sizes = [len(self.weight(target)) for target in FLUX[native]]
        assert sum(sizes) == len(weight)
        if native == SWAPPED:
            weight = swap_halves(weight)
            bias = None if bias is None else swap_halves(bias)
        weights = weight.split(sizes)
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        for target, its_weight, its_bias in zip(FLUX[native], weights, biases, strict=True):
            self.expect(target, its_weight, its_bias)

    def native_weight(self, native: str) -> Tensor:
        """The model's weight as a matrix with the names of Flux's authors has it."""
        weight = torch.cat([self.weight(target) for target in FLUX[native]])
        return swap_halves(weight) if native == SWAPPED else weight

    def native_shape(self, native: str) -> tuple[int, int]:
        """[out, in] of a matrix with the names of Flux's authors."""
        weights = [self.weight(target) for target in FLUX[native]]
        return sum(len(w) for w in weights), weights[0].shape[1]

    def pair(self, out: int, columns: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
        """down [rank, in], up [out, rank]."""
        return self.randn(rank, columns), self.randn(out, rank)


def swap_halves(rows: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])


Layout = Callable[[Sample], None]
LAYOUTS: dict[str, tuple[str, Layout]] = {}


def layout(base: str) -> Callable[[Layout], Layout]:
    """A function that fills a sample, kept under its own name."""

    def keep(fill: Layout) -> Layout:
        LAYOUTS[fill.__name__] = base, fill
        return fill

    return keep
