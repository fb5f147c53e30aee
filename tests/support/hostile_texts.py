"""Texts that a terminal, rich or a page would obey, if they were not shown as they are."""

HOSTILE_TEXTS = (
    "[red]x[/red]",
    "[/]",
    "[link=http://example.org]x[/link]",
    "[bold",
    "\\[x]",
    ":fox:",
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://example.org\x07link",
    "over\rwritten\b\x00\x9b2J",
    "exe\u202egpj.txt\u2069",
    "\u200fleft",
    "not UTF-8 \udce4",
    "狐狸🦊" * 30,
    "<script>alert(1)</script>&amp;",
)
