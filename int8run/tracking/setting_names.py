"""Settings and their values as tables, labels, plots and trackers show them: which vary, and short names.

Used by the record of a job, by trackers and by the report, so that all of them call a setting alike. It knows
settings as text and nothing of jobs.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

MAX_VALUE_LENGTH = 250  # characters of a setting in status.json, in MLflow and in tables


def split_override(override: str) -> tuple[str, str]:
    """An override of the command line as key and value: `+a.b=1` -> (`a.b`, `1`)."""
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def select_keys(overrides: Sequence[str], names: Collection[str]) -> list[str]:
    """The keys of overrides that are among these names, or below one of them that is a group."""
    keys = dict.fromkeys(split_override(override)[0] for override in overrides)
    return [key for key in keys if key in names or key.partition(".")[0] in names]


def shorten_overrides(overrides: Sequence[str]) -> str:
    """Overrides of a sweep's job with short keys, and options without theirs.

    Args:
        overrides: each with a `=`.
    """
    pairs = []
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        pairs.append((key, value))
    short_keys = shorten_keys([key for key, _ in pairs])
    counts = Counter(value for _, value in pairs)
    texts = []
    for key, value in pairs:
        is_option = "." not in key and value.isidentifier()
        stands_alone = is_option and counts[value] == 1 and len(pairs) > 1
        if stands_alone:
            texts.append(value)
        else:
            texts.append(f"{short_keys[key]}={value}")
    return " ".join(texts)


def find_varying_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that do not have the same value in all mappings, in the order of their first appearance.

    A key that only some of them have varies. A sweep's table, the report and the dashboard all ask this.

    Args:
        settings: of each run, by key.
    """
    keys: dict[str, None] = {}
    for values in settings:
        keys.update(dict.fromkeys(values))
    return [key for key in keys if len({values.get(key) for values in settings}) > 1]


def shorten_value(text: str, max_length: int = MAX_VALUE_LENGTH) -> str:
    """A value of at most so many characters: of a longer one its beginning, its length and a hash, so that
    two long values that differ anywhere still differ. The whole one is in config.yaml.
    """
    if len(text) <= max_length:
        return text
    note = f"… ({len(text):,} characters, {hash_text(text)[:8]})"
    return text[: max_length - len(note)] + note


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other key ends with: `lora.strength` -> `strength`.

    Tables, plots, labels and names of runs all head a setting with this, so that no two look the same.
    """
    counts = Counter(end for key in dict.fromkeys(keys) for end in list_ends(key))
    shortened = {}
    for key in keys:
        unique_ends = [end for end in list_ends(key) if counts[end] == 1]
        shortened[key] = unique_ends[0] if unique_ends else key
    return shortened


def list_ends(key: str) -> list[str]:
    """The ends of a dotted key, the shortest first: `strength`, `lora.strength`."""
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def replace_unusual(name: str) -> str:
    """A name of characters that every tracker takes in names and in filters: `lr=1,x` -> `lr-1-x`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def hash_text(text: str) -> str:
    """16 hexadecimal digits of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
