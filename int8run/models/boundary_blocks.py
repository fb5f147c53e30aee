"""The setting `model_type.keep_blocks=first:2,last:3`: how many blocks at both ends of a denoiser stay float.

`block_rules` makes rules of it, once the denoiser is known.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from int8run.errors import ConfigError, check_range

SETTING = "model_type.keep_blocks"
END = re.compile(r"(?P<end>first|last):(?P<count>\d+)")
MAX_BLOCKS = 1000


@dataclass(frozen=True)
class BoundaryBlocks:
    """How many blocks stay float.

    Args:
        first: at the beginning.
        last: at the end.
    """

    first: int = 0
    last: int = 0

    def __str__(self) -> str:
        counts = {"first": self.first, "last": self.last}
        return ",".join(f"{end}:{count}" for end, count in counts.items() if count)


def parse_boundary_blocks(value: object) -> BoundaryBlocks:
    """The setting as numbers.

    Args:
        value: `first:2,last:3`, one of both, or a mapping `{first: 2, last: 3}`.

    Raises:
        ConfigError: for anything else, and for no block at all.
    """
    counts: dict[str, object] = {}
    if isinstance(value, Mapping):
        counts = {str(end): count for end, count in value.items()}
    elif isinstance(value, str):
        for part in value.split(","):
            match = END.fullmatch(part.strip())
            if match is None or match["end"] in counts:
                raise refuse_blocks(value)
            counts[match["end"]] = int(match["count"])
    if not counts or not counts.keys() <= {"first", "last"}:
        raise refuse_blocks(value)
    for end, count in counts.items():
        check_range(f"{end} of {SETTING}", count, 0, MAX_BLOCKS, whole=True)  # type: ignore[arg-type]
    blocks = BoundaryBlocks(**counts)  # type: ignore[arg-type]
    if blocks == BoundaryBlocks():
        raise refuse_blocks(value)
    return blocks


def refuse_blocks(value: object) -> ConfigError:
    """The error for what does not say which blocks."""
    return ConfigError(
        f"{SETTING} is {value!r}; it takes the numbers of blocks that stay float: first:2, last:3 or "
        "first:2,last:3 (with -m as {first:2,last:3}), or null for none"
    )


def normalize_boundary_blocks(value: object) -> str | None:
    """The setting as `first:2,last:3`, however it was given; None: no block.

    Raises:
        ConfigError: as `parse_boundary_blocks`.
    """
    return None if value is None else str(parse_boundary_blocks(value))
