"""Numbers and facts as text for the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from int8run.utils.text import find_longest, make_visible, shorten_text


def format_duration(seconds: float) -> str:
    """`1:05:09` or `0:42`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def format_megabytes(nbytes: float) -> str:
    """Bytes in MB of 10^6."""
    return f"{nbytes / 1e6:.1f} MB"


def format_decibels(value: float) -> str:
    """A ratio in dB, or `equal`: identical images have no noise to compare with."""
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def format_pairs(facts: Sequence[tuple[str, object]]) -> Text:
    """`model tiny · backend auto · …`, with the values in bold."""
    pairs = [Text.assemble(f"{name} ", (make_visible(value), "bold")) for name, value in facts]
    return Text(" · ").join(pairs)


def shorten_to_width(text: str, width: int) -> str:
    """A text that takes at most so many columns of a terminal, shortened in its middle.

    A character may take two columns, or none.
    """
    if cell_len(text) <= width:
        return text

    def fits(length: int) -> bool:
        return cell_len(shorten_text(text, length)) <= width

    length = find_longest(len(text), fits)
    return shorten_text(text, length) if length else ""


def describe_identical(entry: Mapping[str, Any]) -> str:
    """How many samples a mean PSNR leaves out: `5 of 6 identical`; empty where it leaves out none, or all.

    Args:
        entry: of the PSNR in `statistics` of metrics.json; empty where there is none.
    """
    num_identical, num_others = entry.get("infinite", 0), entry.get("samples", 0)
    if not num_identical or not num_others:
        return ""
    return f"{num_identical} of {num_identical + num_others} identical"
