"""Places in the config by dotted paths in which `*` stands for any one part: `lora.adapters.*.path`."""


def is_at(pattern: str, key: str) -> bool:
    """Whether a key is at the place of a pattern."""
    return pattern.count(".") == key.count(".") and begins_at(pattern, key)


def is_below(pattern: str, key: str) -> bool:
    """Whether a key is a part of what is at the place of a pattern."""
    return pattern.count(".") < key.count(".") and begins_at(pattern, key)


def begins_at(pattern: str, key: str) -> bool:
    """Whether each part of a pattern is `*` or the part of the key in its place; further parts may follow."""
    pairs = zip(pattern.split("."), key.split("."), strict=False)
    return all(wanted in ("*", part) for wanted, part in pairs)
