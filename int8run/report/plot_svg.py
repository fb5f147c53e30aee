"""A figure of matplotlib as SVG inside a page: text stays text, and colors are the page's variables.

So one drawing serves light and dark pages.
"""

import io
import re
import warnings
from collections.abc import Mapping
from html import escape

from matplotlib.figure import Figure

# Colors that stand for the page's variables until the SVG is written.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#05{i:02x}05" for i in range(8))
PAGE_COLORS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES)},
}


def to_svg(figure: Figure, name: str, description: str, titles: Mapping[str, str]) -> str:
    """The figure as an SVG element for the page.

    Args:
        figure: to write.
        name: begins every id, so that several plots can stand on one page.
        description: for screen readers.
        titles: by id, shown when the pointer rests on that part.
    """
    svg = write_svg(figure)
    # In tags alone: a label is free to say `#010101` or `id="x"`.
    svg = re.sub(r"<[^>]+>", lambda match: adapt_tag(match.group(), name), svg)

    def add_title(match: re.Match[str]) -> str:
        title = titles.get(match[1])
        if title is None:
            return match.group()
        return f"{match.group()}<title>{escape(title)}</title>"

    svg = re.sub(rf'<g id="{name}-([^"]*)">', add_title, svg)

    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = (
        f'<svg class="plot" role="img" aria-label="{escape(description)}" '
        f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px">'
    )
    after_opening = svg[svg.index(">") + 1 :]
    return re.sub(r"\s*\n\s*", "\n", opening + after_opening)


def write_svg(figure: Figure) -> str:
    """What matplotlib writes, without what stands before the element, its metadata and its style."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)


def adapt_tag(tag: str, name: str) -> str:
    """A tag of the SVG with the page's font and colors, and with ids of this plot."""
    tag = re.sub(r" font-family: [^;]*;", "", tag)
    tag = re.sub("|".join(PAGE_COLORS), lambda match: PAGE_COLORS[match.group()], tag)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
