"""What the adapter types share: the form of a run-time branch, and arithmetic on weights and factors."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# rows of a weight that are made float32 at a time for its norms
NORM_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Dynamic:
    """A change that runs beside its layer: `delta = lora_B @ lora_A + row_factor[:, None] * W0`, all float32."""

    lora_A: Tensor | None = None  # [r, K]
    lora_B: Tensor | None = None  # [N, r], the scale multiplied in
    row_factor: Tensor | None = None  # [N]


class Core(Protocol):
    """A change of one weight."""

    @property
    def kind(self) -> str:
        """What it is called: LoRA, LoCon, LoHa, LoKr, diff, norm, IA3, DoRA."""

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None where a kind has none."""

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where a kind has none."""

    @property
    def rows(self) -> int | None:
        """Output rows of the weight that it changes; None: it fits any number."""

    @property
    def reads_weight(self) -> bool:
        """Whether `delta` and `dynamic` look at the weight's values, or only at its shape."""

    @property
    def can_be_dynamic(self) -> bool:
        """Whether `dynamic` has an answer."""

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a weight of this shape, both shapes in the text; None: it fits."""

    def delta(self, weight: Tensor) -> Tensor:
        """The change at strength 1, float32, in the weight's shape. `weight` is the one without any LoRA."""

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        """The exact form beside a Linear; None: there is none narrower than the weight. `weight` is needed where `reads_weight`."""

    def pick(self, rows: Tensor) -> "Core":
        """The change whose row i is this one's row `rows[i]`, or 0 where that is -1. rows: int64 [N]."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A low-rank matrix or kernel: `up @ down`, with a Tucker core `mid` between them where there is one."""

    up: Tensor  # [N, r], or [N, r, 1, 1]
    down: Tensor  # [r, K, *kernel]; beside a core [r, K], or [r, K, 1, 1]
    mid: Tensor | None = None  # [r, r, *kernel]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product: [N, K, *kernel]."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return self.up.shape[0], self.down.shape[1], *kernel

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two factors in float32, the core multiplied into the second. Returns [N, r], [r, K * kernel]."""
        down = self.down.float().flatten(1)
        if self.mid is not None:
            down = torch.einsum("mn...,nk->mk...", self.mid.float(), down).flatten(1)
        return self.up.float().flatten(1), down

    def dense(self, device: torch.device) -> Tensor:
        """The product in float32, made on a device."""
        up, down = self.factors()
        return (up.to(device) @ down.to(device)).reshape(self.shape)

    def pick(self, rows: Tensor) -> "Pair":
        """The product's rows: those of `up`."""
        return replace(self, up=pick_rows(self.up, rows))


def pick_rows(t: Tensor, rows: Tensor) -> Tensor:
    """Row i is `t[rows[i]]`, or 0 where that is -1."""
    rows = rows.to(t.device)
    picked = t[rows.clamp_min(0)]
    picked[rows < 0] = 0
    return picked


def along(factor: Tensor, axis: int, dims: int) -> Tensor:
    """A vector shaped to multiply along one axis of a tensor of `dims` dimensions."""
    return factor.reshape([-1 if axis == i else 1 for i in range(dims)])


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """`||W + lora_B lora_A||` of each row, without a second [N, K]: only W Aᵀ is made. Returns float32 [N].

    The square is `||W||² + 2 B · (W Aᵀ) + (B A Aᵀ) · B`, summed per row.
    """
    lora_A, lora_B = lora_A.to(weight.device), lora_B.to(weight.device)
    gram = lora_A @ lora_A.T
    norms = []
    for w, b in zip(weight.flatten(1).split(NORM_ROWS), lora_B.split(NORM_ROWS), strict=True):
        w = w.float()
        square = w.pow(2).sum(1) + (b * (2 * (w @ lora_A.T) + b @ gram)).sum(1)
        norms.append(square.clamp_min(0).sqrt())
    return torch.cat(norms)


def dense(w: Tensor | Pair, device: torch.device) -> Tensor:
    """A matrix or kernel in float32 on a device, multiplied out."""
    return w.dense(device) if isinstance(w, Pair) else w.to(device).float()


def thin_rank(w: Tensor | Pair) -> int:
    """Inner width of `thin_factors`."""
    short = min(w.shape[:2])
    return min(short, w.up.shape[1]) if isinstance(w, Pair) else short


def thin_factors(w: Tensor | Pair) -> tuple[Tensor, Tensor]:
    """`w = up @ down` with the narrowest exact factors at hand: its own, or itself and a unit matrix. w: [N, K] or [N, K, 1, 1]."""
    if isinstance(w, Pair) and thin_rank(w) == w.up.shape[1]:
        return w.factors()
    w = dense(w, w.up.device if isinstance(w, Pair) else w.device).flatten(1)
    return (torch.eye(w.shape[0]).to(w), w) if w.shape[0] < w.shape[1] else (w, torch.eye(w.shape[1]).to(w))


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is one of a Linear, or a 1x1 convolution's that acts like one."""
    return len(shape) >= 2 and math.prod(shape[2:]) == 1


def shape_misfit(made: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """Both shapes in words where a change of shape `made` does not fit a weight of `shape`.

    A 1x1 kernel fits a Linear and the other way round; a change written flat, [out, in * kernel], fits the kernel it is of.
    """
    flat = len(made) == 2 < len(shape) and made == (shape[0], math.prod(shape[1:]))
    if flat or without_ones(made) == without_ones(shape):
        return None
    return f"changes a {times(made)} weight, the model's is {times(shape)}"


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[N, K, 1, 1] -> [N, K]."""
    return tuple(shape[:2]) if is_matrix(shape) else tuple(shape)


def times(shape: tuple[int, ...]) -> str:
    """(5, 6) -> 5x6."""
    return "x".join(map(str, shape))


@dataclass(frozen=True, eq=False)
class PickedRows:
    """Rows of a change whose own factors cannot be cut: row i is the change's row `source[i]`, or 0 where that is -1."""

    core: Core
    source: Tensor  # int64 [N]

    @property
    def kind(self) -> str:
        return self.core.kind

    @property
    def rank(self) -> int | None:
        return self.core.rank

    @property
    def scale(self) -> float:
        return self.core.scale

    @property
    def rows(self) -> int:
        return self.source.shape[0]

    @property
    def reads_weight(self) -> bool:
        return self.core.reads_weight

    @property
    def can_be_dynamic(self) -> bool:
        return self.core.can_be_dynamic

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if shape[0] != self.rows:
            return f"changes {self.rows} rows, the model's weight is {times(shape)}"
        return self.core.misfit((self.whole_rows, *shape[1:]))

    @property
    def whole_rows(self) -> int:
        """Rows of the matrix that the change was made for."""
        return self.core.rows or int(self.source.max()) + 1

    def whole(self, weight: Tensor) -> Tensor:
        """The weight that the change was made for, as far as its rows are here; 0 elsewhere."""
        shape = self.whole_rows, *weight.shape[1:]
        if not self.reads_weight:
            return weight.new_zeros(()).expand(shape)
        whole, here = weight.new_zeros(shape), (self.source >= 0).to(weight.device)
        whole[self.source.to(weight.device)[here]] = weight[here]
        return whole

    def delta(self, weight: Tensor) -> Tensor:
        return pick_rows(self.core.delta(self.whole(weight)), self.source)

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        form = self.core.dynamic(None if weight is None else self.whole(weight))
        if form is None:
            return None
        pick = lambda t: None if t is None else pick_rows(t, self.source)  # noqa: E731
        return Dynamic(form.lora_A, pick(form.lora_B), pick(form.row_factor))

    def pick(self, rows: Tensor) -> "PickedRows":
        return replace(self, source=torch.where(rows < 0, -1, self.source[rows.clamp_min(0)]))
