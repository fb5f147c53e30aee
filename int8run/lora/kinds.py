"""Kinds of LoRA: what each does to one weight. Dense, as a low-rank pair beside the layer, and cut to rows of a fused matrix.

A change is linear in its strength t: `W' = W + t * delta(W0)`, with W0 the weight without any LoRA, so that the order of a stack
says nothing. All sums are float32, whatever the file holds: products of float16 factors can overflow in their own dtype.
The formulas are those of LyCORIS (`lycoris/modules`) and PEFT (`peft/tuners/lora`).
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from int8run.errors import LoraError

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


@dataclass(frozen=True, eq=False)
class LoHa:
    """Hadamard product of two low-rank matrices: `scale * first * second`, elementwise."""

    first: Pair
    second: Pair
    scale: float = 1.0

    kind = "LoHa"
    reads_weight = False

    @property
    def rank(self) -> int:
        return self.first.down.shape[0]

    @property
    def rows(self) -> int:
        return self.first.shape[0]

    @property
    def can_be_dynamic(self) -> bool:
        rank = self.first.up.shape[1] * self.second.up.shape[1]
        return is_matrix(self.first.shape) and rank < min(self.first.shape[:2])

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return shape_misfit(self.first.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        return (self.scale * self.first.dense(weight.device) * self.second.dense(weight.device)).reshape(weight.shape)

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        """All products of a column of one factor with a column of the other: rank r²."""
        if not self.can_be_dynamic:
            return None
        (up_1, down_1), (up_2, down_2) = self.first.factors(), self.second.factors()
        lora_B = torch.einsum("ni,nj->nij", up_1, up_2).flatten(1)
        lora_A = torch.einsum("ik,jk->ijk", down_1, down_2).flatten(0, 1)
        return Dynamic(lora_A, self.scale * lora_B)

    def pick(self, rows: Tensor) -> "LoHa":
        return replace(self, first=self.first.pick(rows), second=self.second.pick(rows))


@dataclass(frozen=True, eq=False)
class LoKr:
    """Kronecker product `scale * kron(w1, w2)`; each of the two is full or low-rank. Only a low-rank one brings an alpha."""

    w1: Tensor | Pair  # [a, c]
    w2: Tensor | Pair  # [b, d, *kernel]
    scale: float = 1.0

    kind = "LoKr"
    reads_weight = False

    @property
    def rank(self) -> int | None:
        return next((w.down.shape[0] for w in (self.w2, self.w1) if isinstance(w, Pair)), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product: [a b, c d, *kernel]."""
        (a, c), (b, d, *kernel) = self.w1.shape, self.w2.shape
        return a * b, c * d, *kernel

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def can_be_dynamic(self) -> bool:
        return is_matrix(self.shape) and thin_rank(self.w1) * thin_rank(self.w2) < min(self.shape[:2])

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return shape_misfit(self.shape, shape)

    def delta(self, weight: Tensor) -> Tensor:
        w1, w2 = dense(self.w1, weight.device), dense(self.w2, weight.device)
        w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim()))
        return (self.scale * torch.kron(w1, w2)).reshape(weight.shape)

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        """`kron(u1 d1, u2 d2) = kron(u1, u2) kron(d1, d2)`: the ranks multiply."""
        if not self.can_be_dynamic:
            return None
        (up_1, down_1), (up_2, down_2) = thin_factors(self.w1), thin_factors(self.w2)
        return Dynamic(torch.kron(down_1, down_2), self.scale * torch.kron(up_1, up_2))

    def pick(self, rows: Tensor) -> "PickedRows":
        return PickedRows(self, rows)


@dataclass(frozen=True, eq=False)
class Diff:
    """The change itself, in the weight's own shape: of a Linear or convolution (`diff`), or of a norm's weight (`norm`)."""

    value: Tensor
    kind: str = "diff"

    rank = None
    scale = 1.0
    reads_weight = False
    can_be_dynamic = False

    @property
    def rows(self) -> int:
        return self.value.shape[0]

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return shape_misfit(tuple(self.value.shape), shape)

    def delta(self, weight: Tensor) -> Tensor:
        return self.value.to(weight.device).float().reshape(weight.shape)

    def dynamic(self, weight: Tensor | None) -> None:
        return None

    def pick(self, rows: Tensor) -> "Diff":
        return replace(self, value=pick_rows(self.value, rows))


@dataclass(frozen=True, eq=False)
class IA3:
    """Rows of the weight, or with `on_input` its columns, multiplied by `1 + factor`. The bias is left as it is, as LyCORIS merges."""

    factor: Tensor  # [N] or [K]
    on_input: bool = False

    kind = "IA3"
    rank = None
    scale = 1.0
    reads_weight = True

    @property
    def rows(self) -> int | None:
        return None if self.on_input else self.factor.shape[0]

    @property
    def can_be_dynamic(self) -> bool:
        return not self.on_input

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        axis, word = (1, "columns") if self.on_input else (0, "rows")
        if len(shape) > axis and shape[axis] == self.factor.shape[0]:
            return None
        return f"scales the {self.factor.shape[0]} {word} of a weight, the model's is {times(shape)}"

    def delta(self, weight: Tensor) -> Tensor:
        axis = 1 if self.on_input else 0
        return weight.float() * along(self.factor.float().to(weight.device), axis, weight.dim())

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        return Dynamic(row_factor=self.factor.float()) if self.can_be_dynamic else None

    def pick(self, rows: Tensor) -> Core:
        if not self.on_input:
            return replace(self, factor=pick_rows(self.factor, rows))
        return PickedRows(self, rows) if (rows < 0).any() else self


@dataclass(frozen=True, eq=False)
class DoRA:
    """Another kind with trained norms: `delta = g * (W + c) - W`, c the other kind's change, `g = magnitude / ||W + c||`.

    The norm is that of each row, or with `on_input` of each input column over all rows, as LyCORIS and PEFT divide. At other
    strengths than 1 the rule is `W + t (W_dora - W)`.
    """

    core: Core
    magnitude: Tensor  # [N], or with on_input [K]
    on_input: bool = False

    kind = "DoRA"
    reads_weight = True

    @property
    def rank(self) -> int | None:
        return self.core.rank

    @property
    def scale(self) -> float:
        return self.core.scale

    @property
    def rows(self) -> int | None:
        return self.core.rows

    @property
    def can_be_dynamic(self) -> bool:
        return self.core.can_be_dynamic and not self.on_input

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        axis, word = (1, "columns") if self.on_input else (0, "rows")
        misfit = self.core.misfit(shape)
        if misfit is None and self.magnitude.shape[0] != shape[axis]:
            misfit = f"has DoRA norms for {self.magnitude.shape[0]} {word}, the model's weight is {times(shape)}"
        return misfit

    def delta(self, weight: Tensor) -> Tensor:
        original = weight.float()
        changed = original + self.core.delta(weight)
        axis = 1 if self.on_input else 0
        norm = changed.transpose(0, axis).flatten(1).norm(dim=1)
        return changed * along(self.ratio(norm), axis, weight.dim()) - original

    def dynamic(self, weight: Tensor | None) -> Dynamic | None:
        """Row by row: `g * (W + BA) - W = (g B) A + (g - 1) W`."""
        form = self.core.dynamic(weight) if self.can_be_dynamic else None
        if form is None:
            return None
        if weight is None or form.lora_A is None or form.lora_B is None:
            raise TypeError("DoRA divides by the norms of the weight: it has no form without a weight and a low-rank pair")
        ratio = self.ratio(row_norms(weight, form.lora_A, form.lora_B))
        return Dynamic(form.lora_A, ratio[:, None].to(form.lora_B.device) * form.lora_B, ratio - 1)

    def ratio(self, norm: Tensor) -> Tensor:
        """g, of the norms that are there; a row of zeros stays one."""
        return self.magnitude.float().to(norm.device) / norm.clamp_min(torch.finfo(torch.float32).tiny)

    def pick(self, rows: Tensor) -> Core:
        if self.on_input:
            raise LoraError(
                "its DoRA norms (dora_scale [1, in]) run over all rows of a matrix that the model splits or joins, and cannot be cut; "
                "use a file with row norms (dora_scale [out, 1]), or one made for this model's own layers"
            )
        if (rows < 0).any():  # rows of zeros have no magnitude
            return PickedRows(self, rows)
        return replace(self, core=self.core.pick(rows), magnitude=pick_rows(self.magnitude, rows))


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


@dataclass(frozen=True, eq=False)
class Change:
    """What a file does to one module: to its weight, its bias, or both.

    Args:
        core: the change of the weight.
        bias: the change of the bias at strength 1, [N]; alpha / r is in it where it belongs there.
    """

    core: Core | None
    bias: Tensor | None = None

    @property
    def kind(self) -> str:
        """The core's kind; `bias` without one."""
        return "bias" if self.core is None else self.core.kind

    @property
    def rows(self) -> int | None:
        """Output rows of the module; None: any number."""
        rows = None if self.core is None else self.core.rows
        return rows if rows is not None or self.bias is None else self.bias.shape[0]

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a module whose weight has this shape; None: it fits."""
        if self.core is not None and (misfit := self.core.misfit(shape)):
            return misfit
        if self.bias is not None and self.bias.shape != shape[:1]:
            return f"changes a bias of {self.bias.shape[0]}, the model's weight is {times(shape)}"
        return None

    def pick(self, rows: Tensor) -> "Change":
        """Row i is this change's row `rows[i]`, or 0 where that is -1. rows: int64 [N]."""
        return Change(
            None if self.core is None else self.core.pick(rows),
            None if self.bias is None else pick_rows(self.bias, rows),
        )

    def take_rows(self, rows: slice) -> "Change":
        """The part that changes these output rows of a fused matrix.

        Raises:
            LoraError: rows that are not there, or a kind that cannot be cut.
        """
        if self.rows is not None and not 0 <= rows.start < rows.stop <= self.rows:
            raise LoraError(f"has {self.rows} rows, the model's layers take rows {rows.start} to {rows.stop} of them")
        return self.pick(torch.arange(rows.start, rows.stop))

    def place_rows(self, start: int, total: int) -> "Change":
        """The same change as rows `start`... of a taller fused matrix with `total` rows, and 0 elsewhere.

        Raises:
            LoraError: rows that do not fit in, or a kind that cannot be placed.
        """
        if self.rows is None:
            raise LoraError(
                "is an IA3 on inputs, which does not say how many rows of the model's joined matrix are its own; "
                "load the model without fused projections"
            )
        if start < 0 or start + self.rows > total:
            raise LoraError(f"has {self.rows} rows, which do not fit from row {start} on into the model's matrix of {total}")
        rows = torch.full((total,), -1)
        rows[start : start + self.rows] = torch.arange(self.rows)
        return self.pick(rows)

    def swap_halves(self) -> "Change":
        """The first half of the output rows exchanged with the second.

        Raises:
            LoraError: an odd number of rows, or a kind that cannot be cut.
        """
        if self.rows is None:
            return self
        if self.rows % 2:
            raise LoraError(f"has {self.rows} rows, the model exchanges their halves: the number must be even")
        return self.pick(torch.arange(self.rows).roll(self.rows // 2))


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
