"""A GGUF file as other readers see it: names and shapes of a model's tensors, and how each is stored.

`checkpoint_files` asks for files that begin with the letters GGUF. Everything above it (`reader`, `detect`,
`layer`) reads such a file as it reads a safetensors file, whose tensors are float32 where the file has
blocks of a few bits.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from int8run.checkpoints.gguf_blocks import StoredForm, check_library
from int8run.checkpoints.gguf_cursor import Value
from int8run.checkpoints.gguf_header import GgufTensor, read_gguf_header
from int8run.checkpoints.gguf_names import adapt_tensor, find_architecture
from int8run.errors import FileError

KEPT_PREFIX = "general."  # of the metadata that says what the file is


class StoredTensor(NamedTuple):
    """A tensor under the name that a model has for it.

    Args:
        key: its name.
        dtype: of what is read, by safetensors' name.
        form: how it is stored; None: its numbers lie row by row.
        stored: as the header describes it.
    """

    key: str
    dtype: str
    form: StoredForm | None
    stored: GgufTensor


class GgufContent(NamedTuple):
    """What a GGUF file holds, in the order of its bytes, and the metadata that says what it is, as texts."""

    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]


def read_gguf_content(path: Path) -> GgufContent:
    """Read what a GGUF file holds, from its header.

    Raises:
        FileError: for a header that is not read, a language model of an unknown architecture, or where the
            library that reads the numbers is not installed.
    """
    header = read_gguf_header(path)
    architecture = find_architecture(path, header)
    tensors: list[StoredTensor] = []
    for tensor in header.tensors:
        key, form = adapt_tensor(path, tensor, architecture, header.metadata)
        dtype = tensor.dtype if form is None else form.read_dtype
        tensors.append(StoredTensor(key, dtype, form, tensor))
    check_names(path, tensors)
    if any(tensor.block is not None for tensor in header.tensors):
        check_library(path)
    return GgufContent(tuple(tensors), keep_metadata(header.metadata))


def check_names(path: Path, tensors: Iterable[StoredTensor]) -> None:
    """Raise FileError where two tensors of a file are one of the model."""
    keys: dict[str, str] = {}
    for tensor in tensors:
        if tensor.key in keys:
            raise FileError(
                f"{path} is damaged: {keys[tensor.key]} and {tensor.stored.name} are both {tensor.key}"
            )
        keys[tensor.key] = tensor.stored.name


def keep_metadata(metadata: Mapping[str, Value]) -> dict[str, str]:
    """The entries that say what a file is, as texts; not those about a tokenizer."""
    return {
        key: str(value)
        for key, value in metadata.items()
        if key.startswith(KEPT_PREFIX) and not isinstance(value, tuple)
    }


def count_types(forms: Iterable[tuple[str, StoredForm | None]]) -> Counter[str]:
    """How many tensors have each type of a GGUF file.

    Args:
        forms: dtype and form of each tensor.
    """
    return Counter(dtype if form is None else form.label for dtype, form in forms)
