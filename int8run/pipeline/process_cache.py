"""The only memory of a process: the last model that was built, and what the float model generated.

With it, the jobs of a sweep do neither twice. Both are found by a key that holds all settings that decide
them, so a job gets only what it would have made itself.
"""

from collections.abc import Callable
from typing import Any

MAX_BYTES = 2**30  # of what was generated; the oldest goes first
_last_build: dict[str, Any] = {}  # at most one
_generated: dict[str, tuple[Any, int]] = {}


def get_or_build(key: str, build: Callable[[], Any]) -> tuple[Any, bool]:
    """Get the last built value if its key is equal, else build a new one. The old one is dropped first.

    Args:
        key: of the settings that decide the value.
        build: makes it.

    Returns:
        The value, and whether it was built before.
    """
    if key in _last_build:
        return _last_build[key], True
    _last_build.clear()
    value = build()
    _last_build[key] = value
    return value, False


def clear_build() -> None:
    """Drop the last built value."""
    _last_build.clear()


def get(key: str) -> Any | None:
    """What was generated under an equal key, or None."""
    value, _ = _generated.get(key, (None, 0))
    return value


def put(key: str, value: Any, num_bytes: int) -> None:
    """Keep what a model generated, and no more than MAX_BYTES of all.

    Args:
        key: of the settings that decide the value.
        value: what was generated.
        num_bytes: its size.
    """
    _generated.pop(key, None)
    _generated[key] = (value, num_bytes)
    while sum(size for _, size in _generated.values()) > MAX_BYTES:
        del _generated[next(iter(_generated))]


def clear() -> None:
    """Drop everything."""
    clear_build()
    _generated.clear()
