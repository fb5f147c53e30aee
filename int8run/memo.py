"""The only process-wide memory: the last thing that was built, so that a sweep in one process builds a model once.

It is keyed by value (the build part of the config), never by identity, so a run can only ever get a model that equals its own.
"""

from collections.abc import Callable
from typing import Any

_last: dict[str, Any] = {}


def reuse(key: str, make: Callable[[], Any]) -> tuple[Any, bool]:
    """The last built value if its key is equal, else a new one; and whether it was reused. The old one is dropped first."""
    if key in _last:
        return _last[key], True
    forget()
    value = make()
    _last[key] = value
    return value, False


def forget() -> None:
    """Drop the last built value."""
    _last.clear()
