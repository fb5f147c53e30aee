"""Fingerprints: how files are recognized by the names of the tensors in them, and by their shapes.

Model families, models without a class and text encoders are described with them. No file is opened here.
"""

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from int8run.models.tensor_part import Shape

# how many rows tensors have, by their names; a list: one of these
RowCounts = Mapping[str, int | Sequence[int]]


@dataclass(frozen=True)
class Fingerprint:
    """How the weights of a denoiser are recognized by their names in a file.

    The names are without the prefix that a file may put before all of them.

    Args:
        denoiser: the diffusers class that such weights belong to.
        all: fnmatch patterns; each matches some key.
        none: fnmatch patterns; none matches any key.
    """

    denoiser: str
    all: Sequence[str]
    none: Sequence[str] = ()

    def matches(self, keys: Collection[str]) -> bool:
        """Return whether these are the keys of such weights."""
        return has_names(keys, required=self.all, forbidden=self.none)


@dataclass(frozen=True)
class SizedFingerprint:
    """How a model is recognized by the names and the shapes in a file.

    Args:
        all: fnmatch patterns; each matches some key.
        none: fnmatch patterns; none matches any key.
        rows: tensors and how many rows they have; a list: one of these.
        not_rows: tensors and how many rows they do not have; one that the file lacks does not count.
    """

    all: Sequence[str]
    none: Sequence[str] = ()
    rows: RowCounts = field(default_factory=dict)
    not_rows: RowCounts = field(default_factory=dict)

    def matches(self, shapes: Mapping[str, Shape]) -> bool:
        """Return whether these are the tensors of such a model."""
        if not has_names(shapes, required=self.all, forbidden=self.none):
            return False
        if not all(has_rows(shapes, key, counts) for key, counts in self.rows.items()):
            return False
        return not any(has_rows(shapes, key, counts) for key, counts in self.not_rows.items())


def has_names(keys: Collection[str], *, required: Iterable[str], forbidden: Iterable[str]) -> bool:
    """Return whether every required fnmatch pattern matches some key, and no forbidden one any."""
    if not all(has_match(pattern, keys) for pattern in required):
        return False
    return not any(has_match(pattern, keys) for pattern in forbidden)


def has_match(pattern: str, keys: Collection[str]) -> bool:
    """Return whether a key matches an fnmatch pattern."""
    # a plain name is looked up: files have thousands of keys
    if not re.search(r"[*?[]", pattern):
        return pattern in keys
    matches = re.compile(fnmatch.translate(pattern)).match
    return any(matches(key) for key in keys)


def has_rows(shapes: Mapping[str, Shape], key: str, counts: int | Sequence[int]) -> bool:
    """Return whether a tensor is there and has this number of rows, or one of these numbers."""
    allowed = [counts] if isinstance(counts, int) else counts
    return key in shapes and count_rows(shapes[key]) in allowed


def count_rows(shape: Shape) -> int:
    """Return how many rows a tensor has; a single number has none."""
    return shape[0] if len(shape) else 0
