"""A backend that hands everything to int8run's reference, under a name of its own."""

from dataclasses import dataclass
from typing import ClassVar

from int8run.backends.reference import Reference


@dataclass(frozen=True)
class ReferenceCopy(Reference):
    """The reference, renamed."""

    name: ClassVar[str] = "reference_copy"
