"""The only process-wide memory: the last thing that was built, and what the float model drew, so that a sweep does neither twice.

Both are keyed by value (the part of the config that decides them), never by identity, so a run can only ever get what equals its own.
"""

from collections.abc import Callable
from typing import Any

# what may be remembered of drawn pictures, in bytes; the oldest go first
MAX_BYTES = 2**30
_last: dict[str, Any] = {}
_drawn: dict[str, tuple[Any, int]] = {}


def get_or_build(key: str, make: Callable[[], Any]) -> tuple[Any, bool]:
    """The last built value if its key is equal, else a new one; and whether it was reused. The old one is dropped first."""
    if key in _last:
        return _last[key], True
    _last.clear()
    value = make()
    _last[key] = value
    return value, False


def clear_build() -> None:
    """Drop the last built value."""
    _last.clear()


def get(key: str) -> Any | None:
    """What was remembered under an equal key, or None."""
    return _drawn[key][0] if key in _drawn else None


def put(key: str, value: Any, size: int) -> None:
    """Keep what a model drew, and no more than MOST_BYTES of it."""
    _drawn.pop(key, None)
    _drawn[key] = (value, size)
    while sum(s for _, s in _drawn.values()) > MAX_BYTES:
        del _drawn[next(iter(_drawn))]


def clear() -> None:
    """Drop everything."""
    clear_build()
    _drawn.clear()
