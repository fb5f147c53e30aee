"""What the second reader of LoRA files says about a module: one reading, or none."""

from collections.abc import Callable
from dataclasses import dataclass

from text_encoders.oracle_file import Array


class Broken(Exception):  # noqa: N818
    """A module has no reading.

    Args:
        reason: for messages.
        shape: of the weight that it is for, which it does not fit; None: it is for none.
    """

    def __init__(self, reason: str, shape: tuple[int, ...] | None = None):
        super().__init__(reason)
        self.shape = shape


@dataclass(frozen=True)
class Reading:
    """What is done to one module.

    Args:
        shape: of its weight; None: its weight is not changed.
        change: the weight -> the change at strength 1.
        bias: change of the bias.
    """

    shape: tuple[int, ...] | None
    change: Callable[[Array], Array] | None
    bias: Array | None = None
