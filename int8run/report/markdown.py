"""Text in Markdown: cards, exported tables and the atlas write it."""

from collections.abc import Sequence

from int8run.utils.text import make_visible

MARKDOWN_SPECIAL = "\\`*_{}[]<>#|~!&$"  # GitHub sets formulas between dollars


def escape_markdown(text: str) -> str:
    """A text in one line that Markdown shows as it is."""
    shown = make_visible(text)
    return "".join(f"\\{letter}" if letter in MARKDOWN_SPECIAL else letter for letter in shown)


def join_markdown_row(texts: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(texts)} |"
