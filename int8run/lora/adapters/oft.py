"""OFT and BOFT: the weight is rotated, block by block (LyCORIS `modules/diag_oft.py` and `boft.py`, kohya
`networks/oft.py`, PEFT `tuners/oft` and `tuners/boft`).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta, WholeWeightDelta, broadcast_to_dim, format_shape
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
        if self.order is None:
            return self.rotate_blocks(x)
        order = self.order.to(x.device)
        rotated = self.rotate_blocks(x[order])
        return rotated[order.argsort()]

    def rotate_blocks(self, x: Tensor) -> Tensor:
        """x: [n, m] -> [n, m], whose rows are in the order of the blocks."""
        block_size = self.blocks.shape[-1]
        stacked = x.reshape(-1, block_size, x.shape[1])  # [n, m] -> [D, b, m]
        rotated = self.blocks.to(x.device) @ stacked  # [D, b, b] @ [D, b, m]
        return rotated.flatten(0, 1)  # [n, m]


@dataclass(frozen=True, eq=False)
class OFT(WholeWeightDelta):
    """`delta W = W' - W0` with `W' = rescale * (R W0)`, or `rescale * (W0 Rᵀ)` with `on_input`, where R is a
    product of block-diagonal rotations.

    OFT has one stage (Qiu et al. 2023, arXiv 2306.07280), BOFT a butterfly of several (Liu et al. 2023, arXiv
    2311.06243). LyCORIS and kohya rotate outputs, PEFT inputs. At a strength t other than 1 the rule is
    `W0 + t * (W' - W0)`, as kohya and LyCORIS have it for OFT; LyCORIS scales each stage of a BOFT.

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

    needs_weight = True

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every weight as it is."""
        if self.rescale is not None and bool((self.rescale != 1).any()):
            return False
        identity = torch.eye(self.block_size)
        return all((stage.blocks == identity).all() for stage in self.stages)

    @property
    def block_size(self) -> int:
        """Features that one block rotates."""
        return self.stages[0].blocks.shape[-1]

    @property
    def out_features(self) -> int | None:
        """N; where inputs are rotated, only `rescale` knows it."""
        if not self.on_input:
            return self.num_features
        if self.rescale is not None:
            return self.rescale.shape[0]
        return None

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has as many features as are rotated, and as many rows as are rescaled."""
        if self.on_input:
            num_in_model, features = math.prod(shape[1:]), "inputs"
        else:
            num_in_model, features = shape[0], "rows"
        if self.num_features is None:
            rotated = f"multiple of {self.block_size}"
            fits = num_in_model % self.block_size == 0
        else:
            rotated = str(self.num_features)
            fits = num_in_model == self.num_features
        if not fits or len(shape) < 2:
            return f"rotates {rotated} {features}, the model's weight is {format_shape(shape)}"

        if self.rescale is not None and self.rescale.shape[0] != shape[0]:
            return f"rescales {self.rescale.shape[0]} rows, the model's weight is {format_shape(shape)}"
        return None

    def compute_delta(self, weight: Tensor) -> Tensor:
        """`rescale * (R W0) - W0`, or `rescale * (W0 Rᵀ) - W0`: the weight is [N, K, *kernel]."""
        original = weight.float()
        matrix = original.flatten(1)  # [N, K * kernel]
        if self.on_input:
            matrix = matrix.T  # W0 Rᵀ = (R W0ᵀ)ᵀ
        rotated = self.rotate(matrix)
        if self.on_input:
            rotated = rotated.T
        rotated = rotated.reshape(weight.shape)
        if self.rescale is not None:
            rescale = self.rescale.float().to(weight.device)
            rotated = rotated * broadcast_to_dim(rescale, 0, weight.dim())
        return rotated - original

    def rotate(self, x: Tensor) -> Tensor:
        """R x, for x: [n, m], stage by stage."""
        for stage in self.stages:
            x = stage.rotate(x)
        return x

    def select_rows(self, index: Tensor) -> LoraDelta:
        """The change with these rows of this one.

        Raises:
            LoraError: when rows are left out that are mixed with those that are taken.
        """
        taken = index[index >= 0]
        if self.on_input:
            # each row is rotated by itself, so that any choice of them is the same rotation
            needs_no_index = self.rescale is None and len(taken) == len(index)
            return self if needs_no_index else SelectedRows(self, index)
        if count_unique(taken) == self.num_features:
            return SelectedRows(self, index)

        blocks = self.find_blocks(index)
        if blocks is None:
            raise LoraError(
                f"is a {self.adapter_type} whose rotation mixes rows of a matrix that the model splits, and "
                "cannot be cut; use a file made for this model's own layers"
            )
        rescale = self.rescale
        if rescale is not None:
            rescale = rescale[index.to(rescale.device)]
        stage = RotationStage(self.stages[0].blocks[blocks])
        return replace(self, stages=(stage,), num_features=len(index), rescale=rescale)

    def find_blocks(self, index: Tensor) -> Tensor | None:
        """The blocks that are all of these rows, in their order; None: the rows are no whole blocks."""
        is_one_plain_stage = len(self.stages) == 1 and self.stages[0].order is None
        if not is_one_plain_stage or len(index) % self.block_size:
            return None
        rows = index.reshape(-1, self.block_size)  # [blocks, b]
        first_rows = rows[:, 0]
        is_consecutive = bool((rows == first_rows[:, None] + torch.arange(self.block_size)).all())
        starts_with_block = not (first_rows % self.block_size).any()
        if not is_consecutive or not starts_with_block or (rows < 0).any():
            return None
        return first_rows // self.block_size


@dataclass(frozen=True, eq=False)
class StackedRows(WholeWeightDelta):
    """Changes of parts of a fused matrix, one below the other: kohya's OFT of FLUX has one for q, k, v each.

    Args:
        parts: all of which know their number of rows.
    """

    parts: tuple[OFT, ...]

    needs_weight = True

    @property
    def adapter_type(self) -> str:
        """That of the parts."""
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
        """Rows of all parts together."""
        return sum(self.sizes)

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """The weight has as many rows as the parts together."""
        if len(shape) >= 2 and shape[0] == self.out_features:
            return None
        return f"rotates {self.out_features} rows, the model's weight is {format_shape(shape)}"

    def compute_delta(self, weight: Tensor) -> Tensor:
        """The change of each part's rows, one below the other."""
        deltas, start = [], 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            deltas.append(part.compute_delta(weight[start : start + size]))
            start += size
        return torch.cat(deltas)

    def select_rows(self, index: Tensor) -> LoraDelta:
        """The change with these rows of this one.

        Raises:
            LoraError: when rows are left out that are mixed with those that are taken.
        """
        taken = index[index >= 0]
        if count_unique(taken) == self.out_features:
            return SelectedRows(self, index)

        selected = self.select_rows_of_parts(index)
        parts = tuple(part for part in selected if isinstance(part, OFT))
        is_one_range = len(taken) == len(index) and bool((index.diff() == 1).all())
        if not is_one_range or len(parts) < len(selected):
            raise LoraError(
                f"is a {self.adapter_type} of parts of a matrix, whose rows the model has in another order; "
                "use a file made for this model's own layers"
            )
        if len(parts) == 1:
            return parts[0]
        return StackedRows(parts)

    def select_rows_of_parts(self, index: Tensor) -> list[LoraDelta]:
        """The parts that have some of these rows, each with those rows."""
        selected: list[LoraDelta] = []
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            inside = index[(index >= start) & (index < start + size)] - start  # rows of this part
            start += size
            if len(inside) == size:
                selected.append(part)
            elif len(inside):
                selected.append(part.select_rows(inside))
        return selected


def count_unique(index: Tensor) -> int:
    """How many different rows an index has."""
    return len(set(index.tolist()))
