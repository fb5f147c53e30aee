"""Numbers and facts as text for the terminal."""

import math
from collections.abc import Sequence

from rich.markup import escape


def format_duration(seconds: float) -> str:
    """`1:05:09` or `0:42`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_megabytes(nbytes: float) -> str:
    """Bytes in MB of 10^6."""
    return f"{nbytes / 1e6:.1f} MB"


def format_decibels(value: float) -> str:
    """A ratio in dB, or `equal`: identical images have no noise to compare with."""
    return "equal" if math.isinf(value) else f"{value:.1f} dB"


def format_pairs(facts: Sequence[tuple[str, object]]) -> str:
    """`model tiny · backend auto · …`, with rich's markup for bold values."""
    return " · ".join(f"{name} [bold]{escape(str(value))}[/bold]" for name, value in facts)
