"""Files of prompts in odd encodings, with odd lines, against a reader that goes byte by byte."""

from pathlib import Path
from random import Random

from int8run.generate.prompts import PromptSet, build_samples

PIECES = (
    *("red apple", "fox", " a fox ", "# a comment", "#", "", "   ", "\t", "a [red] (fox:1.2), b=c", "'\""),
    *(
        "狐狸",
        "🦊",
        "é",
        "e\u0301",
        "\u202eright to left",
        "\ufeff",
        "a\u2028b",
        "a\x85b",
        "a\x0bb",
        "a\x0cb",
    ),
    *(
        "a\x1cb",
        "a\x00b",
        "\x1b[31mred",
        "a" * 3000,
        "../../etc/passwd",
        "a/b\\c",
        "CON",
        ".",
        "..",
        "\ud7ff",
    ),
    *("\u3000fox\u3000", "#fox", " # fox", "-", "%s %d {0} ${oc.env:HOME}", "\x7f", "fox\u00a0"),
)
LINE_ENDS = ("\n", "\n", "\n", "\r\n", "\r", "\n\n")
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-32")


def make_text(chance: Random) -> bytes:
    """A file of some lines, perhaps with other bytes in it."""
    end = chance.choice(LINE_ENDS)
    lines = [chance.choice(PIECES) for _ in range(chance.randrange(6))]
    text = "".join(line + chance.choice((end, end, end, chance.choice(LINE_ENDS))) for line in lines)
    if chance.random() < 0.3:
        text = text.rstrip("\r\n")
    data = bytearray(text.encode(chance.choice(ENCODINGS), errors="replace"))
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        data.insert(chance.randrange(len(data) + 1), chance.choice((0, 10, 13, 35, 127, 128, 0xC3, 0xFF)))
    return bytes(data)


def read_prompts(data: bytes) -> list[str] | None:
    """The prompts of a file, by the documentation: UTF-8, one per line, without blank lines and comments.

    A line ends where an editor ends it: at a line feed, a carriage return, or both. None: no such file.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:  # UTF-16 without a mark
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    prompts = [line.strip() for line in text.split("\n")]
    return [prompt for prompt in prompts if prompt and not prompt.startswith("#")] or None


def check_prompts(chance: Random, folder: Path) -> bool:
    """Read a file of prompts both ways, and name its images."""
    path = folder / "prompts.txt"
    path.write_bytes(make_text(chance))
    found = [row.prompt for row in PromptSet(path=str(path), seeds_per_prompt=2).read_rows()]
    expected = read_prompts(path.read_bytes())
    assert expected is not None, f"read, and it is no text: {found}"
    assert found == expected, f"{found}, {expected}"
    keys = [sample.key for sample in build_samples(found, 2, 0)]
    assert len(set(keys)) == 2 * len(expected), keys
    for key in keys:
        is_name = "/" not in key and "\\" not in key and key.isprintable() and len(key.encode()) < 240
        assert is_name, f"no name of a file: {key!r}"
    return True
