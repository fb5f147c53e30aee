"""What a file of key mappings may hold: every fault is an error that names the file, and the field or rule.

`key_mapping` calls these for each file and rule that it reads; its head shows the layout. Nothing here knows
the classes that are made of them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from int8run.errors import ConfigError
from int8run.models.name_pattern import count_wildcards, is_name_pattern

REQUIRED_FIELDS = {"classes", "names"}
OPTIONAL_FIELDS = {"prefix", "drop", "lora_names", "parameters", "needs", "lacks"}


def check_fields(file: str, data: Any) -> None:
    """Raise ConfigError unless a file has the fields of key mappings, and no others."""
    known = REQUIRED_FIELDS | OPTIONAL_FIELDS
    if not isinstance(data, dict) or not REQUIRED_FIELDS <= set(data) <= known:
        optional = ", ".join(sorted(OPTIONAL_FIELDS))
        raise ConfigError(
            f"{file}: a file of key mappings is a mapping with classes and names, and may have {optional}"
        )


def check_classes(file: str, classes: Any) -> None:
    """Raise ConfigError unless `classes` is a list of names with at least one."""
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ConfigError(f"{file}: classes is {classes!r}; it takes a list of class names")


def check_prefix(file: str, data: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `prefix`, where it is given, is parts of a name up to a dot."""
    if "prefix" not in data:
        return
    prefix = data["prefix"]
    if not isinstance(prefix, str) or not re.fullmatch(r"([^.*]+\.)+", prefix):
        raise ConfigError(
            f"{file}: prefix is {prefix!r}; it takes the beginning of a name up to a dot, such as 'net.'"
        )


def check_drop(file: str, drop: Any) -> None:
    """Raise ConfigError unless `drop` maps patterns of keys to reasons."""
    has_reasons = isinstance(drop, dict) and all(
        reason and isinstance(reason, str) for reason in drop.values()
    )
    if not has_reasons:
        raise ConfigError(f"{file}: drop is {drop!r}; it takes a mapping of a key's pattern to the reason")
    for pattern in drop:
        if not is_single_pattern(pattern):
            raise ConfigError(
                f"{file}: drop has the pattern {pattern!r}; "
                "it takes a key with * for numbers and one ** at most"
            )


def check_module_lists(file: str, data: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `needs` and `lacks` are lists of module names."""
    for name in ("needs", "lacks"):
        modules = data.get(name, [])
        if not isinstance(modules, list) or not all(map(is_name_pattern, modules)):
            raise ConfigError(f"{file}: {name} is {modules!r}; it takes a list of module names")


def check_options(where: str, options: Mapping[Any, Any], allowed: Sequence[str]) -> None:
    """Raise ConfigError unless a rule has `to` and, besides, only options of its section."""
    if "to" not in options or not set(options) <= {"to", *allowed}:
        raise ConfigError(
            f"{where} has the fields {', '.join(map(str, options))}; "
            f"it takes to, and may have {' or '.join(allowed)}"
        )


def check_shape(where: str, options: Mapping[str, Any], targets: Sequence[str]) -> None:
    """Raise ConfigError unless `shape` and `transposed` are valid and for one target."""
    has_shape = "shape" in options
    transposed = options.get("transposed", False)
    changes_shape = has_shape or transposed
    if changes_shape and len(targets) > 1:
        raise ConfigError(f"{where} changes the shape of several parameters; only a rule with one can")
    if has_shape and not is_target_shape(options["shape"]):
        raise ConfigError(
            f"{where} has the shape {options['shape']!r}; "
            "it takes a list of whole numbers above 0, and -1 for one of them"
        )
    if not isinstance(transposed, bool):
        raise ConfigError(f"{where} has transposed {transposed!r}; choose true or false")


def check_swap_halves(where: str, swap_halves: Any, original: str, targets: Sequence[str]) -> None:
    """Raise ConfigError unless `swap_halves` is one of its choices, and is possible for these names."""
    if not isinstance(swap_halves, bool) and swap_halves != "last":
        raise ConfigError(f"{where} has swap_halves {swap_halves!r}; choose true, false or last")
    if swap_halves and len(targets) > 1:
        raise ConfigError(f"{where} swaps the halves of several modules; only a rule with one module can")
    if swap_halves == "last" and "*" not in original.split("."):
        raise ConfigError(f"{where} swaps halves in the last block but has no * for its number")


def check_without(where: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `without`, where it is given, is the pattern of a module."""
    if "without" in options and not is_single_pattern(options["without"]):
        raise ConfigError(
            f"{where} has without {options['without']!r}; it takes the pattern of a module name"
        )


def check_part(where: str, options: Mapping[str, Any], targets: Sequence[str]) -> None:
    """Raise ConfigError unless `part`, where it is given, is one of several parts, of one module."""
    if "part" not in options:
        return
    part = options["part"]
    match = re.fullmatch(r"([1-9])/([2-9])", part) if isinstance(part, str) else None
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"{where} has part {part!r}; it takes a number and how many there are, such as 1/2")
    if len(targets) > 1 or "swap_halves" in options:
        raise ConfigError(f"{where} is a part of a module; such a rule has one module and no swap_halves")


def check_wildcards(where: str, original: str, targets: Sequence[str]) -> None:
    """Raise ConfigError unless all names of a rule have the same wildcards, and one `**` at most."""
    counts = {count_wildcards(pattern) for pattern in (original, *targets)}
    if len(counts) > 1 or not is_single_pattern(original):
        raise ConfigError(f"{where}: both sides need the same number of *, and the same ** (one at most)")


def is_single_pattern(pattern: Any) -> bool:
    """Return whether this is the pattern of a name with one `**` at most."""
    return is_name_pattern(pattern) and count_wildcards(pattern)[1] <= 1


def is_target_shape(shape: Any) -> bool:
    """Return whether this is a list of sizes, one of which may be -1."""
    if not isinstance(shape, list) or not shape or shape.count(-1) > 1:
        return False
    return all(is_target_size(size) for size in shape)


def is_target_size(size: Any) -> bool:
    """Return whether this is a whole number above 0, or -1. YAML's true and false are numbers in Python."""
    if not isinstance(size, int) or isinstance(size, bool):
        return False
    return size > 0 or size == -1
