"""The tensors in what models and text encoders take and return. Backends and metrics look through it here."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and mappings, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from iter_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iter_tensors(item)
