"""What the adapter types share: the form of a run-time branch, and arithmetic on weights and factors."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# rows of a weight that are made float32 at a time for its norms
NORM_CHUNK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class RuntimeBranch:
    """A change that runs beside its layer: `delta = lora_B @ lora_A + row_factor[:, None] * W0`, all float32."""

    lora_A: Tensor | None = None  # [r, K]
    lora_B: Tensor | None = None  # [N, r], the scale multiplied in
    row_factor: Tensor | None = None  # [N]


class LoraDelta(Protocol):
    """A change of one weight."""

    @property
    def adapter_type(self) -> str:
        """What it is called: LoRA, LoCon, LoHa, LoKr, diff, norm, IA3, DoRA."""

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None where a kind has none."""

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where a kind has none."""

    @property
    def out_features(self) -> int | None:
        """Output rows of the weight that it changes; None: it fits any number."""

    @property
    def needs_weight(self) -> bool:
        """Whether `delta` and `dynamic` look at the weight's values, or only at its shape."""

    @property
    def has_branch(self) -> bool:
        """Whether `dynamic` has an answer."""

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a weight of this shape, both shapes in the text; None: it fits."""

    def compute_delta(self, weight: Tensor) -> Tensor:
        """The change at strength 1, float32, in the weight's shape. `weight` is the one without any LoRA."""

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """The exact form beside a Linear; None: there is none narrower than the weight. `weight` is needed where `reads_weight`."""

    def select_rows(self, rows: Tensor) -> "LoraDelta":
        """The change whose row i is this one's row `rows[i]`, or 0 where that is -1. rows: int64 [N]."""


@dataclass(frozen=True, eq=False)
class LowRankPair:
    """A low-rank matrix or kernel: `up @ down`, with a Tucker core `mid` between them where there is one."""

    up: Tensor  # [N, r], or [N, r, 1, 1]
    down: Tensor  # [r, K, *kernel]; beside a core [r, K], or [r, K, 1, 1]
    mid: Tensor | None = None  # [r, r, *kernel]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product: [N, K, *kernel]."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return self.up.shape[0], self.down.shape[1], *kernel

    def compute_factors(self) -> tuple[Tensor, Tensor]:
        """The two factors in float32, the core multiplied into the second. Returns [N, r], [r, K * kernel]."""
        down = self.down.float().flatten(1)
        if self.mid is not None:
            down = torch.einsum("mn...,nk->mk...", self.mid.float(), down).flatten(1)
        return self.up.float().flatten(1), down

    def to_dense(self, device: torch.device) -> Tensor:
        """The product in float32, made on a device."""
        up, down = self.compute_factors()
        return (up.to(device) @ down.to(device)).reshape(self.shape)

    def select_rows(self, rows: Tensor) -> "LowRankPair":
        """The product's rows: those of `up`."""
        return replace(self, up=select_rows(self.up, rows))


def select_rows(t: Tensor, rows: Tensor) -> Tensor:
    """Row i is `t[rows[i]]`, or 0 where that is -1."""
    rows = rows.to(t.device)
    picked = t[rows.clamp_min(0)]
    picked[rows < 0] = 0
    return picked


def broadcast_to_dim(factor: Tensor, axis: int, dims: int) -> Tensor:
    """A vector shaped to multiply along one axis of a tensor of `dims` dimensions."""
    return factor.reshape([-1 if axis == i else 1 for i in range(dims)])


def compute_row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """`||W + lora_B lora_A||` of each row, without a second [N, K]: only W Aᵀ is made. Returns float32 [N].

    The square is `||W||² + 2 B · (W Aᵀ) + (B A Aᵀ) · B`, summed per row.
    """
    lora_A, lora_B = lora_A.to(weight.device), lora_B.to(weight.device)
    gram = lora_A @ lora_A.T
    norms = []
    for w, b in zip(weight.flatten(1).split(NORM_CHUNK_ROWS), lora_B.split(NORM_CHUNK_ROWS), strict=True):
        w = w.float()
        square = w.pow(2).sum(1) + (b * (2 * (w @ lora_A.T) + b @ gram)).sum(1)
        norms.append(square.clamp_min(0).sqrt())
    return torch.cat(norms)


def to_dense(w: Tensor | LowRankPair, device: torch.device) -> Tensor:
    """A matrix or kernel in float32 on a device, multiplied out."""
    return w.to_dense(device) if isinstance(w, LowRankPair) else w.to(device).float()


def factor_rank(w: Tensor | LowRankPair) -> int:
    """Inner width of `thin_factors`."""
    short = min(w.shape[:2])
    return min(short, w.up.shape[1]) if isinstance(w, LowRankPair) else short


def factorize(w: Tensor | LowRankPair) -> tuple[Tensor, Tensor]:
    """`w = up @ down` with the narrowest exact factors at hand: its own, or itself and a unit matrix. w: [N, K] or [N, K, 1, 1]."""
    if isinstance(w, LowRankPair) and factor_rank(w) == w.up.shape[1]:
        return w.compute_factors()
    w = to_dense(w, w.up.device if isinstance(w, LowRankPair) else w.device).flatten(1)
    return (torch.eye(w.shape[0]).to(w), w) if w.shape[0] < w.shape[1] else (w, torch.eye(w.shape[1]).to(w))


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is one of a Linear, or a 1x1 convolution's that acts like one."""
    return len(shape) >= 2 and math.prod(shape[2:]) == 1


def describe_shape_mismatch(made: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """Both shapes in words where a change of shape `made` does not fit a weight of `shape`.

    A 1x1 kernel fits a Linear and the other way round; a change written flat, [out, in * kernel], fits the kernel it is of.
    """
    flat = len(made) == 2 < len(shape) and made == (shape[0], math.prod(shape[1:]))
    if flat or drop_unit_kernel(made) == drop_unit_kernel(shape):
        return None
    return f"changes a {format_shape(made)} weight, the model's is {format_shape(shape)}"


def drop_unit_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[N, K, 1, 1] -> [N, K]."""
    return tuple(shape[:2]) if is_matrix(shape) else tuple(shape)


def format_shape(shape: tuple[int, ...]) -> str:
    """(5, 6) -> 5x6."""
    return "x".join(map(str, shape))


@dataclass(frozen=True, eq=False)
class SelectedRows:
    """Rows of a change whose own factors cannot be cut: row i is the change's row `source[i]`, or 0 where that is -1."""

    inner: LoraDelta
    source: Tensor  # int64 [N]

    @property
    def adapter_type(self) -> str:
        return self.inner.adapter_type

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    @property
    def out_features(self) -> int:
        return self.source.shape[0]

    @property
    def needs_weight(self) -> bool:
        return self.inner.needs_weight

    @property
    def has_branch(self) -> bool:
        return self.inner.has_branch

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        if shape[0] != self.out_features:
            return f"changes {self.out_features} rows, the model's weight is {format_shape(shape)}"
        return self.inner.shape_mismatch((self.whole_rows, *shape[1:]))

    @property
    def whole_rows(self) -> int:
        """Rows of the matrix that the change was made for."""
        return self.inner.out_features or int(self.source.max()) + 1

    def whole(self, weight: Tensor) -> Tensor:
        """The weight that the change was made for, as far as its rows are here; 0 elsewhere."""
        shape = self.whole_rows, *weight.shape[1:]
        if not self.needs_weight:
            return weight.new_zeros(()).expand(shape)
        whole, here = weight.new_zeros(shape), (self.source >= 0).to(weight.device)
        whole[self.source.to(weight.device)[here]] = weight[here]
        return whole

    def compute_delta(self, weight: Tensor) -> Tensor:
        return select_rows(self.inner.compute_delta(self.whole(weight)), self.source)

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        form = self.inner.make_branch(None if weight is None else self.whole(weight))
        if form is None:
            return None
        pick = lambda t: None if t is None else select_rows(t, self.source)  # noqa: E731
        return RuntimeBranch(form.lora_A, pick(form.lora_B), pick(form.row_factor))

    def select_rows(self, rows: Tensor) -> "SelectedRows":
        return replace(self, source=torch.where(rows < 0, -1, self.source[rows.clamp_min(0)]))
