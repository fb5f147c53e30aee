"""A part of a file's tensor that becomes a parameter of the model, or a part of one.

`state_dict_adapter` and `original_names` plan with parts; readers and writers extract them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

Shape = tuple[int, ...]
# one of several equal parts of a tensor's rows: index and count
Portion = tuple[int, int]
WHOLE: Portion = (0, 1)


@dataclass(frozen=True)
class TensorPart:
    """Rows of one tensor.

    Args:
        key: the tensor.
        rows: which of its rows; None: all.
        swap_halves: whether the two halves of these rows change places.
        shape: what the values are reshaped to, -1 for the number that follows from the rest; None: they keep
            their shape.
        transposed: whether the matrix is transposed.
        portion: index and count where it is one of several equal parts of the rows, until their number is
            known; `rows` says the same then.
    """

    key: str
    rows: slice | None = None
    swap_halves: bool = False
    shape: Shape | None = None
    transposed: bool = False
    portion: Portion | None = None

    def count_rows(self, num_rows: int) -> int:
        """Return how many of a tensor's rows these are."""
        if self.portion is not None:
            return num_rows // self.portion[1]
        first, end, _ = (self.rows or slice(None)).indices(num_rows)
        return end - first

    def extract(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor.

        Args:
            tensor: that of `key`, or one with as many rows: a bias [N], scales [N, 1]. A single value belongs
                to every row and is returned as it is.
        """
        if tensor.numel() == 1 and self.shape is None:
            return tensor
        part = tensor if self.rows is None else tensor[self.rows]
        if self.swap_halves:
            part = part.roll(len(part) // 2, 0)
        if self.transposed:
            part = part.T  # [N, K] -> [K, N]
        return part if self.shape is None else part.reshape(self.shape)


def join_shapes(parts: Iterable[TensorPart], shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the shape of the tensor that whole tensors make, one after the other; None where they cannot.

    Args:
        parts: as `to_original` gives them.
        shapes: of the tensors that they name.
    """
    parts = list(parts)
    if len(parts) == 1:
        return join_single_shape(parts[0], shapes[parts[0].key])
    joined = [tuple(shapes[part.key]) for part in parts]
    row_shape = joined[0][1:]
    if not all(shape and shape[1:] == row_shape for shape in joined):
        return None
    return (sum(shape[0] for shape in joined), *row_shape)


def join_single_shape(part: TensorPart, shape: Shape) -> Shape | None:
    """Return the shape of a tensor that is (rows of) one, transposed and reshaped as the part says.

    None where it cannot be: rows that are not a multiple of their parts.
    """
    if part.portion is not None or part.rows is not None:
        if not shape or (part.portion is not None and shape[0] % part.portion[1]):
            return None
        shape = (part.count_rows(shape[0]), *shape[1:])
    turned = tuple(shape)[::-1] if part.transposed else tuple(shape)
    return turned if part.shape is None else complete_shape(part.shape, prod(turned))


def complete_shape(shape: Shape, count: int) -> Shape | None:
    """Return a shape with its -1 replaced so that it holds `count` values; None when no number does."""
    fixed = prod(size for size in shape if size > 0)
    completed = tuple(count // fixed if size < 0 else size for size in shape)
    return completed if prod(completed) == count else None
