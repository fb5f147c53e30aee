"""Column norms of a matrix that a file has in one and the model in several modules: q, k and v, say.

A DoRA with a norm for each input column (OneTrainer's default) divides by norms over all rows of the file's
matrix. The modules' weights are read once, where they are all at hand, and their squares are added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from int8run.errors import LoraError


class DenseDelta(Protocol):
    """The part of an adapter that is needed here, see `LoraDelta`."""

    def compute_delta(self, weight: Tensor) -> Tensor:
        """The change at strength 1, float32, in the shape of the weight."""


@dataclass(frozen=True, eq=False)
class JoinedPart:
    """The rows of one module in the file's matrix.

    Args:
        module: its name in the model.
        delta: the change of its weight without the norms.
        rows: of the weight, where the model fuses more than the file; None: all.
    """

    module: str
    delta: DenseDelta
    rows: range | None = None

    def compute_squares(self, weight: Tensor) -> Tensor:
        """The squares of `W0 + dW`, added over the rows: [K], float32."""
        changed = weight.float() + self.delta.compute_delta(weight)  # [N, K, *kernel]
        if self.rows is not None:
            changed = changed[self.rows.start : self.rows.stop]
        columns = changed.transpose(0, 1).flatten(1)  # [K, N * kernel]
        return columns.pow(2).sum(1)


@dataclass(eq=False)
class JoinedColumns:
    """The modules that one matrix of a file is cut into; all their changes share this object.

    Args:
        parts: the modules.
        norms: [K], float32, of `W0 + dW` over all of them; None: not read yet.
    """

    parts: Sequence[JoinedPart]
    norms: Tensor | None = field(default=None, repr=False)

    @property
    def modules(self) -> list[str]:
        """Names of the modules."""
        return [part.module for part in self.parts]

    @torch.no_grad()
    def read(self, read_weight: Callable[[str], Tensor]) -> None:
        """Compute the norms.

        Args:
            read_weight: the weight of a module without any LoRA.
        """
        squares: list[Tensor] = []  # of each part, [K]
        for part in self.parts:
            part_squares = part.compute_squares(read_weight(part.module))
            device = squares[0].device if squares else part_squares.device
            squares.append(part_squares.to(device))
        self.norms = torch.stack(squares).sum(0).sqrt()

    def get_norms(self) -> Tensor:
        """The norms.

        Raises:
            LoraError: when the weights were never together.
        """
        if self.norms is None:
            raise LoraError(
                f"the DoRA norms (dora_scale [1, in]) run over {', '.join(self.modules)} together, and these "
                "weights are read one by one here; set lora.mode=stochastic or auto, or use a file with row "
                "norms (dora_scale [out, 1])"
            )
        return self.norms
