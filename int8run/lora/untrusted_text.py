"""Reading what strangers wrote: metadata of LoRA files, and the files that lie beside them.

Values are cut to a length before they are looked at, parsed only as JSON, and lose their control characters
before anybody sees them. Nothing that a file contains can make these functions fail.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from int8run.utils.untrusted_json import parse_untrusted_json

MAX_JSON_CHARS = 10_000_000  # the tag counts of a large data set are a few million
MAX_SIDECAR_BYTES = 4_000_000
# what some programs write for a value that is not there
EMPTY_VALUES = ("", "none", "null", "n/a", "false", "undefined")
# larger integers are not numbers for people
LARGEST_INTEGER = 10**18


def sanitize_text(value: object, max_chars: int) -> str:
    """A value as one line for people.

    Args:
        value: a text or a number; anything else gives an empty text.
        max_chars: the line is cut there. Control, direction and other invisible characters become spaces.
    """
    text = format_value(value)[: 4 * max_chars]
    visible = "".join(" " if unicodedata.category(char)[0] == "C" else char for char in text)
    line = " ".join(visible.split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def format_value(value: object) -> str:
    """A text as it is, a number as text, and nothing for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool) or not isinstance(value, int):
        return ""
    return str(value) if abs(value) < LARGEST_INTEGER else ""


def is_empty(text: str) -> bool:
    """Whether a text says nothing."""
    return text.lower() in EMPTY_VALUES


def parse_json(text: object) -> Any:
    """The content of a JSON text, or None for anything else."""
    if not isinstance(text, str) or len(text) > MAX_JSON_CHARS:
        return None
    try:
        return parse_untrusted_json(text, allows_repeats=True)
    except ValueError:
        return None


def get_nested(content: object, keys: Sequence[str]) -> Any:
    """The value under these keys, one inside the other, or None."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def as_list(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_dict(value: object) -> dict[Any, Any]:
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_optional_text(path: Path) -> str | None:
    """The text of a file that may be there, or None."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_SIDECAR_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: not UTF-8, or a name that no file can have
        return None


def read_front_matter(path: Path) -> dict[str, str]:
    """`name: value` lines at the top of the README beside a LoRA; empty where the folder has other LoRAs."""
    text = read_optional_text(path.with_name("README.md"))
    if text is None or not text.startswith("---\n"):
        return {}
    if len(list(path.parent.glob("*.safetensors"))) != 1:
        return {}
    front_matter = text.removeprefix("---\n").split("\n---", 1)[0]
    # no YAML loader: a few hundred bytes of nested references would fill the memory
    lines = re.findall(r"^([a-z_]+):[ \t]+(\S.*?)[ \t]*$", front_matter, re.MULTILINE)
    return {name: value.strip("'\"") for name, value in lines}
