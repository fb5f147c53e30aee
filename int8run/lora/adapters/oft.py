"""OFT and BOFT: the weight is rotated, block by block (LyCORIS `modules/diag_oft.py` and `boft.py`, kohya
`networks/oft.py`, PEFT `tuners/oft` and `tuners/boft`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta, broadcast_to_dim, format_shape
from int8run.lora.adapters.row_selection import SelectedRows


@dataclass(frozen=True, eq=False)
class RotationStage:
    """One block-diagonal rotation, in an order of its own: `x[order]` is cut into blocks, each is rotated.

    Args:
        blocks: orthogonal, float32 [D, b, b], applied from the left; one block (D = 1) may stand for all.
        order: int64 [n]; None: the vectors are cut as they are.
    """

    blocks: Tensor
    order: Tensor | None = None

    def rotate(self, x: Tensor) -> Tensor:
        """x: [n, m] -> [n, m], float32."""
        blocks = self.blocks.to(x.device)
        order = None if self.order is None else self.order.to(x.device)
        if order is not None:
            x = x[order]
        x = (blocks @ x.unflatten(0, (-1, blocks.shape[-1]))).flatten(0, 1)
        return x if order is None else x[order.argsort()]


@dataclass(frozen=True, eq=False)
class OFT:
    """`W' = rescale * (R W)`, or `rescale * (W Rᵀ)` with `on_input`, R a product of block-diagonal rotations.

    OFT has one stage (Qiu et al. 2023, arXiv 2306.07280), BOFT a butterfly of several (Liu et al. 2023, arXiv
    2311.06243). LyCORIS and kohya rotate outputs, PEFT inputs. At a strength t other than 1 the rule is
    `W + t * (W' - W)`, as kohya and LyCORIS have it for OFT; LyCORIS scales each stage of a BOFT.

    Args:
        stages: in the order in which they are applied.
        num_features: that are rotated; None: any multiple of the block size, all by the same block.
        rescale: [N], of the rows afterwards; None: 1.
        on_input: the columns of the weight are rotated, and not its rows.
        adapter_type: `OFT` or `BOFT`.
    """

    stages: tuple[RotationStage, ...]
    num_features: int | None
    rescale: Tensor | None = None
    on_input: bool = False
    adapter_type: str = "OFT"

    rank = None
    scale = 1.0
    needs_weight = True
    has_branch = False

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every weight as it is."""
        has_rescale = self.rescale is not None and bool((self.rescale != 1).any())
        identity = torch.eye(self.block_size)
        return not has_rescale and all((stage.blocks == identity).all() for stage in self.stages)

    @property
    def block_size(self) -> int:
        """Features that one block rotates."""
        return self.stages[0].blocks.shape[-1]

    @property
    def out_features(self) -> int | None:
        if not self.on_input:
            return self.num_features
        return None if self.rescale is None else self.rescale.shape[0]

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        columns = 1
        for size in shape[1:]:
            columns *= size
        rotated, words = (columns, "inputs") if self.on_input else (shape[0], "rows")
        own = f"multiple of {self.block_size}" if self.num_features is None else str(self.num_features)
        fits = rotated % self.block_size == 0 if self.num_features is None else rotated == self.num_features
        if not fits or len(shape) < 2:
            return f"rotates {own} {words}, the model's weight is {format_shape(shape)}"
        if self.rescale is not None and self.rescale.shape[0] != shape[0]:
            return f"rescales {self.rescale.shape[0]} rows, the model's weight is {format_shape(shape)}"
        return None

    def compute_delta(self, weight: Tensor) -> Tensor:
        original = weight.float()
        x = original.flatten(1)
        x = x.T if self.on_input else x
        for stage in self.stages:
            x = stage.rotate(x)
        rotated = (x.T if self.on_input else x).reshape(weight.shape)
        if self.rescale is not None:
            rescale = self.rescale.float().to(weight.device)
            rotated = rotated * broadcast_to_dim(rescale, 0, weight.dim())
        return rotated - original

    def make_branch(self, weight: Tensor | None) -> None:
        return None

    def select_rows(self, index: Tensor) -> LoraDelta:
        """The change with these rows of this one.

        Raises:
            LoraError: when rows are left out that are mixed with those that are taken.
        """
        taken = index[index >= 0]
        if self.on_input:  # the rows do not know each other
            is_whole = self.rescale is None and len(taken) == len(index)
            return self if is_whole else SelectedRows(self, index)
        if len(taken.unique()) == self.num_features:
            return SelectedRows(self, index)
        blocks = self.find_blocks(index)
        if blocks is None:
            raise LoraError(
                f"is a {self.adapter_type} whose rotation mixes rows of a matrix that the model splits, and "
                "cannot be cut; use a file made for this model's own layers"
            )
        rescale = None if self.rescale is None else self.rescale[index.to(self.rescale.device)]
        stage = RotationStage(self.stages[0].blocks[blocks])
        return replace(self, stages=(stage,), num_features=len(index), rescale=rescale)

    def find_blocks(self, index: Tensor) -> Tensor | None:
        """The blocks that are all of these rows, in their order; None: the rows are no whole blocks."""
        if len(self.stages) != 1 or self.stages[0].order is not None or len(index) % self.block_size:
            return None
        rows = index.reshape(-1, self.block_size)
        is_in_step = (rows == rows[:, :1] + torch.arange(self.block_size)).all()
        if not is_in_step or (rows[:, 0] % self.block_size).any() or (rows < 0).any():
            return None
        return rows[:, 0] // self.block_size


@dataclass(frozen=True, eq=False)
class StackedRows:
    """Changes of parts of a fused matrix, one below the other: kohya's OFT of FLUX has one for q, k, v each.

    Args:
        parts: all of which know their number of rows.
    """

    parts: tuple[OFT, ...]

    rank = None
    scale = 1.0
    needs_weight = True
    has_branch = False

    @property
    def adapter_type(self) -> str:
        return self.parts[0].adapter_type

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every weight as it is."""
        return all(part.is_identity for part in self.parts)

    @property
    def sizes(self) -> list[int]:
        """Rows of each part."""
        return [part.out_features or 0 for part in self.parts]

    @property
    def out_features(self) -> int:
        return sum(self.sizes)

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) >= 2 and shape[0] == self.out_features:
            return None
        return f"rotates {self.out_features} rows, the model's weight is {format_shape(shape)}"

    def compute_delta(self, weight: Tensor) -> Tensor:
        pieces = weight.split(self.sizes)
        deltas = [part.compute_delta(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.cat(deltas)

    def make_branch(self, weight: Tensor | None) -> None:
        return None

    def select_rows(self, index: Tensor) -> LoraDelta:
        """The change with these rows of this one.

        Raises:
            LoraError: when rows are left out that are mixed with those that are taken.
        """
        taken = index[index >= 0]
        if len(taken.unique()) == self.out_features:
            return SelectedRows(self, index)
        start, found = 0, []
        for part, size in zip(self.parts, self.sizes, strict=True):
            inside = index[(index >= start) & (index < start + size)] - start
            if len(inside):
                found.append(part.select_rows(inside) if len(inside) != size else part)
            start += size
        is_in_order = len(taken) == len(index) and bool((index.diff() == 1).all())
        if not is_in_order or not all(isinstance(part, OFT) for part in found):
            raise LoraError(
                f"is a {self.adapter_type} of parts of a matrix, whose rows the model has in another order; "
                "use a file made for this model's own layers"
            )
        parts = tuple(part for part in found if isinstance(part, OFT))
        return parts[0] if len(parts) == 1 else StackedRows(parts)
