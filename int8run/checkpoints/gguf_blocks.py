"""Turns the bytes of a GGUF file's tensors into the numbers that they stand for.

Blocks are dequantized by the library `gguf` of llama.cpp's authors, some at a time, in float32: exactly
scale times integer for Q4_0, Q5_0 and Q8_0; for the others rounded as the library rounds. What llama.cpp's
converter did to a tensor besides (`gguf_names`) is undone here. `reader` asks for rows.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from math import prod
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from int8run.checkpoints.gguf_types import BlockType
from int8run.checkpoints.header import DTYPES
from int8run.errors import FileError

CHUNK_NUMBERS = 2**18  # that are dequantized at a time; the library keeps several copies of them
INSTALL_GGUF = "pip install 'gguf>=0.19,<1' (int8run's extra 'gguf')"
FLOAT32 = "F32"


@dataclass(frozen=True)
class StoredForm:
    """How a file holds a tensor whose numbers do not simply lie there row by row.

    Args:
        block: how they are packed; None: they are plain.
        dtype: of plain ones, by safetensors' name.
        paired_heads: of how many heads the rows are that lie as llama.cpp rotates them, the two of a pair
            beside each other; the model has the first ones of all pairs of a head, then the second ones. 0:
            the rows lie as in the model.
        added: what was added to every number.
        may_lack_rows: whether its last rows may have been cut off, which nobody looks up.
    """

    block: BlockType | None
    dtype: str = FLOAT32
    paired_heads: int = 0
    added: float = 0.0
    may_lack_rows: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the numbers lie row by row, and all of them."""
        return self.block is None and not (self.paired_heads or self.added or self.may_lack_rows)

    @property
    def read_dtype(self) -> str:
        """The dtype of what is read: plain numbers keep theirs, unless something is subtracted."""
        if self.block is not None or self.added:
            return FLOAT32
        return self.dtype

    @property
    def label(self) -> str:
        """Short description: the name of the blocks, or of the dtype."""
        return self.dtype if self.block is None else self.block.name

    def find_head_rows(self, num_rows: int, rows: tuple[int, int]) -> tuple[int, int]:
        """The rows of whole heads that these rows are among.

        Args:
            num_rows: of the tensor.
            rows: the first, and the one after the last.
        """
        if not self.paired_heads:
            return rows
        head = num_rows // self.paired_heads
        first, stop = rows
        return first // head * head, -(-stop // head) * head

    def find_bytes(self, shape: tuple[int, ...], rows: tuple[int, int]) -> tuple[int, int]:
        """The bytes that some rows are read from, counted from those of the tensor.

        Args:
            shape: of the tensor.
            rows: the first, and the one after the last.

        Returns:
            The first byte, and how many there are.
        """
        row_numbers = prod(shape[1:])
        first, stop = self.find_head_rows(get_row_count(shape), rows)
        numbers, nbytes = self.get_unit()
        first_unit = first * row_numbers // numbers
        stop_unit = -(-stop * row_numbers // numbers)
        return first_unit * nbytes, (stop_unit - first_unit) * nbytes

    def get_unit(self) -> tuple[int, int]:
        """How many numbers lie together, and how many bytes they take."""
        if self.block is None:
            return 1, DTYPES[self.dtype].bits // 8
        return self.block.numbers, self.block.nbytes

    def decode(self, data: Tensor, shape: tuple[int, ...], rows: tuple[int, int]) -> Tensor:
        """The numbers of some rows.

        Args:
            data: uint8, what `find_bytes` names.
            shape: of the tensor.
            rows: the first, and the one after the last.

        Returns:
            [rows, ...], in `read_dtype`.
        """
        row_numbers = prod(shape[1:])
        first, stop = self.find_head_rows(get_row_count(shape), rows)
        numbers, _ = self.get_unit()
        offset = first * row_numbers % numbers  # rows of a reshaped tensor may begin inside of a block
        values = self.decode_numbers(data)[offset : offset + (stop - first) * row_numbers]
        values = values.reshape(stop - first, *shape[1:])
        if self.paired_heads:
            values = separate_pairs(values, get_row_count(shape) // self.paired_heads)
        values = values[rows[0] - first : rows[1] - first]
        if self.added:
            values = values.float() - self.added
        return values if shape else values.reshape(())

    def decode_numbers(self, data: Tensor) -> Tensor:
        """All numbers of some bytes. data: uint8 [bytes] -> [numbers]."""
        if self.block is not None:
            return dequantize_blocks(data, self.block)
        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype].torch_name)
        return data.view(dtype)


def get_row_count(shape: tuple[int, ...]) -> int:
    """The size of the first dimension; a single number is one row."""
    return shape[0] if shape else 1


def separate_pairs(rows: Tensor, head: int) -> Tensor:
    """Rows of heads as the model has them: the first ones of all pairs, then the second ones.

    Args:
        rows: [heads x head, ...], the two of a pair beside each other.
        head: rows of a head, even.
    """
    pairs = rows.reshape(-1, head // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def dequantize_blocks(data: Tensor, block: BlockType) -> Tensor:
    """The numbers that blocks stand for. data: uint8 [bytes of whole blocks] -> float32 [numbers].

    A damaged scale that is NaN or infinite gives numbers that are; whoever uses them refuses those.
    """
    library = load_library()
    kind = library.GGMLQuantizationType[block.name]
    num_blocks = data.numel() // block.nbytes
    values = torch.empty(num_blocks * block.numbers, dtype=torch.float32)
    step = max(1, CHUNK_NUMBERS // block.numbers)
    with np.errstate(all="ignore"):
        for start in range(0, num_blocks, step):
            stop = min(start + step, num_blocks)
            chunk = data[start * block.nbytes : stop * block.nbytes].numpy()
            # as one row: the library loops over groups of rows in Python
            found = library.quants.dequantize(chunk.reshape(1, -1), kind)
            values[start * block.numbers : stop * block.numbers] = torch.from_numpy(found.reshape(-1))
    return values


@cache
def load_library() -> ModuleType:
    """The library `gguf`, imported when it is first needed."""
    import gguf

    library: ModuleType = gguf
    return library


def check_library(where: object) -> None:
    """Raise FileError where the library that dequantizes blocks is not installed.

    Args:
        where: the file that needs it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise FileError(
            f"{where} is a GGUF file, and the library that reads its numbers is not installed: {INSTALL_GGUF}"
        )
