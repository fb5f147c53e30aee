"""The weight of the base that belongs to one tensor of an audited file, read a few rows at a time.

It may be several tensors there, or rows of one, in another order or shape. `compare_layer` and
`float_tensors` read it.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.models.tensor_part import TensorPart, join_shapes

WEIGHT = ".weight"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class BaseReadError(FileError):
    """The base cannot be read, which says nothing about the audited file."""


@dataclass(frozen=True, eq=False)
class BaseFiles:
    """A float checkpoint to compare with.

    Args:
        files: of the checkpoint.
        layers: its weights by name; some may be quantized themselves.
        shapes: logical shapes of all tensors by key.
    """

    files: TensorFiles
    layers: Mapping[str, CheckpointLayer]
    shapes: Mapping[str, tuple[int, ...]]

    def find_quantized(self, key: str) -> CheckpointLayer | None:
        """The layer whose weight a key is, where that is quantized; else None."""
        if not key.endswith(WEIGHT):
            return None
        layer = self.layers.get(key.removesuffix(WEIGHT))
        if layer is None or not layer.granularity:
            return None
        return layer

    def list_float_keys(self, prefix: str) -> list[str]:
        """The float tensors of the model but its weights, and what belongs to quantized ones.

        Args:
            prefix: before the keys of the model.
        """
        of_weights = {layer.key for layer in self.layers.values()}
        of_weights |= {key for layer in self.layers.values() for key in layer.sibling_keys}
        return [
            key
            for key, info in self.files.items()
            if key.startswith(prefix) and key not in of_weights and info.dtype in FLOAT_DTYPES
        ]

    def read(self, key: str, rows: slice | None) -> Tensor:
        """Some rows of a tensor, of a quantized weight as floats.

        Raises:
            BaseReadError: when it cannot be read.
        """
        layer = self.find_quantized(key)
        try:
            if layer is not None:
                return layer.read_weight(self.files, rows)
            data = self.files.read(key, rows)
        except FileError as error:
            raise BaseReadError(str(error)) from error
        self.files.drop_from_page_cache(key, rows)
        return data


@dataclass(frozen=True, eq=False)
class BaseTensor:
    """One tensor of an audited file, as the base has it.

    Args:
        base: the checkpoint.
        parts: what it is made of, one part after the other.
    """

    base: BaseFiles
    parts: Sequence[TensorPart]

    @property
    def keys(self) -> list[str]:
        """Of the tensors of the base."""
        return [part.key for part in self.parts]

    @property
    def nbytes(self) -> int:
        """Of these tensors; a part of one counts whole."""
        return sum(self.base.files[key].nbytes for key in dict.fromkeys(self.keys))

    @functools.cached_property
    def shape(self) -> tuple[int, ...] | None:
        """Of the whole; None where the parts do not go together."""
        return join_shapes(self.parts, self.base.shapes)

    @property
    def is_plain(self) -> bool:
        """Whether rows of it are rows of the parts, so that a few can be read alone."""
        return not any(
            part.swap_halves
            or part.transposed
            or part.shape is not None
            or part.portion is not None
            or not self.base.shapes[part.key]
            for part in self.parts
        )

    def count_rows(self) -> int:
        """N of it."""
        if not self.is_plain:
            return len(self.whole)
        return sum(part.count_rows(self.base.shapes[part.key][0]) for part in self.parts)

    def read_rows(self, start: int, stop: int, *, allow_infinity: bool = False) -> Tensor:
        """Rows of the tensor as a matrix.

        Args:
            start: the first row.
            stop: the one after the last.
            allow_infinity: of tensors that are no quantized weight: masks are made of it.

        Returns:
            [stop - start, K], in the base's dtype.

        Raises:
            BaseReadError: NaN or infinity in them, or a damaged base.
        """
        found = self.read_plain_rows(start, stop) if self.is_plain else self.whole[start:stop]
        rows = found.reshape(stop - start, -1).contiguous()
        # a sum is finite if all numbers are, but for overflow
        if torch.isfinite(rows.sum(dtype=torch.float32)):
            return rows
        if rows.isnan().any():
            raise BaseReadError(f"{self.base.files.path}: {self.parts[0].key} holds NaN")
        if not allow_infinity and rows.isinf().any():
            raise BaseReadError(f"{self.base.files.path}: {self.parts[0].key} holds infinity")
        return rows

    def read_plain_rows(self, start: int, stop: int) -> Tensor:
        """The same where rows are rows of the parts."""
        found = []
        offset = 0  # of the part's first row in the tensor
        for part in self.parts:
            num_rows = self.base.shapes[part.key][0]
            first, end, _ = (part.rows or slice(None)).indices(num_rows)
            low, high = max(start, offset), min(stop, offset + end - first)
            if low < high:
                rows = slice(first + low - offset, first + high - offset)
                found.append(self.base.read(part.key, rows))
            offset += end - first
        return found[0] if len(found) == 1 else torch.cat(found)

    @functools.cached_property
    def whole(self) -> Tensor:
        """All of it, for parts that are turned or reshaped."""
        tensors = [part.extract(torch.atleast_1d(self.base.read(part.key, None))) for part in self.parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
