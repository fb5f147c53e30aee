"""Fingerprints: how files are recognized by the names of the tensors in them.

Model families and text encoders are described with them. Only names are looked at; no file is opened here.
"""

import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


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
