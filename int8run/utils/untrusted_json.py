"""JSON out of files that somebody else wrote: headers, indexes, configs and markers beside weights.

Text is refused in a time that grows with its length alone, and before it fills the memory: many parts, deep
nesting, and a name that an object has twice, of which a reader would silently take one. Every reader of such
JSON stands on `parse_untrusted_json`.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

# Commas and opening brackets, those in texts too: a header of 20,000 tensors has 180,000. A million take a
# second, and 300 MB while they are parsed.
MAX_PARTS = 1_000_000
MAX_NESTING = 64


def parse_untrusted_json(text: bytes | str, *, allows_repeats: bool = False) -> Any:
    """Parse JSON that may have been made to do harm.

    Args:
        text: the JSON; bytes are UTF-8.
        allows_repeats: whether an object may have a name twice; the last one counts then.

    Raises:
        ValueError: for anything else than JSON of a usual size and depth; the message says what is wrong, as
            the second half of a sentence (`is not JSON (...)`).
    """
    if isinstance(text, str):
        text = text.encode(errors="surrogatepass")
    if count_parts(text) > MAX_PARTS:
        raise ValueError(f"has more than {MAX_PARTS} parts, more than int8run parses")
    make_object: Callable[..., Any] = dict if allows_repeats else build_object
    try:
        found = json.loads(text, object_pairs_hook=make_object)
    except RecursionError as error:
        raise ValueError(f"is nested in more than {MAX_NESTING} levels") from error
    except RepeatedNameError:
        raise
    except ValueError as error:  # also a number with thousands of digits, and bytes that are not UTF-8
        raise ValueError(f"is not JSON ({str(error)[:200]})") from error
    check_nesting(found)
    return found


class RepeatedNameError(ValueError):
    """An object has a name twice."""


def count_parts(text: bytes) -> int:
    """An upper bound for the number of values in a JSON text, without parsing it."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object.

    Raises:
        RepeatedNameError: for a name that stands in it twice.
    """
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise RepeatedNameError(f"has {name[:80]!r} twice")
        seen.add(name)
    raise AssertionError("a repeated name is among the pairs")


def check_nesting(found: Any) -> None:
    """Raise ValueError for values nested so deeply that functions which follow them could fail."""
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(MAX_NESTING):
        children = list_nested(level)
        if not children:
            return
        level = children
    raise ValueError(f"is nested in more than {MAX_NESTING} levels")


def list_nested(values: Iterable[Any]) -> list[Any]:
    """The objects and arrays that stand directly in some objects and arrays."""
    nested = []
    for value in values:
        items = value.values() if isinstance(value, dict) else value
        nested += [item for item in items if isinstance(item, dict | list)]
    return nested
