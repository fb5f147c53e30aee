"""Readable ids for parameters of tests that pytest would only number (`shapes0`): `ids=name_parameter`."""

from collections.abc import Iterable, Mapping

MOST_NAMES = 3
Plain = str | int | float | bool | None


def name_parameter(value: object) -> str | None:
    """The id of a mapping or a sequence, from what is in it; None: pytest's own id."""
    if isinstance(value, Mapping):
        return join_names(name_entry(key, entry) for key, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return join_names(name_item(item) for item in value)
    return None


def join_names(names: Iterable[str]) -> str:
    """`a, b`, `nothing`, or of many the first ones: `a, b, c and 2 more`."""
    names = list(names)
    joined = ", ".join(names[:MOST_NAMES]) or "nothing"
    if len(names) > MOST_NAMES:
        joined += f" and {len(names) - MOST_NAMES} more"
    return joined


def name_entry(key: object, value: object) -> str:
    """`key=value` where the value is plain or a shape, else the key alone."""
    if isinstance(value, Plain):
        return f"{key}={value}"
    if isinstance(value, tuple) and all(isinstance(length, int) for length in value):
        return f"{key}={'x'.join(map(str, value))}"
    return str(key)


def name_item(item: object) -> str:
    """An item that is plain or a sequence as it is; another by its `module`, else by its type."""
    if isinstance(item, Plain):
        return str(item)
    if isinstance(item, list | tuple):
        return f"({join_names(name_item(part) for part in item)})"
    return str(getattr(item, "module", type(item).__name__))
