"""Text of other people as it may be shown: prompts, names of files, values of settings, errors of libraries.

A terminal obeys control characters, and a page and a terminal both obey the marks that turn the direction of
writing. Both would let a file name change what else stands on the screen. They are shown as escapes instead.
"""

import re
import shlex
from bisect import bisect_left
from collections.abc import Callable

MAX_ERROR_LENGTH = 300

# Control characters (those above 127 are obeyed by some terminals, too), separators of lines and paragraphs,
# the marks that turn the direction of writing, and halves of surrogate pairs, which no output can encode:
# they come from file names that are not UTF-8.
UNSAFE_CHARACTERS = "\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE = re.compile(f"[{UNSAFE_CHARACTERS}]")
UNSAFE_BUT_LINES = re.compile(f"(?![\\n\\t])[{UNSAFE_CHARACTERS}]")

# What a shell does not take as it is: all but letters of any script, digits and some punctuation.
SHELL_SPECIAL = re.compile(r"[^\w@%+=:,./-]")
# What has a meaning between double quotes, too, such as a backslash before another or before the end.
DOUBLE_QUOTES_SPECIAL = re.compile(r"[\"$`!]|\\(\\|\n|$)")


def make_visible(value: object) -> str:
    """A value as text of one line, in which nothing is obeyed: `a\\x1b[31mb`, `two\\nlines`."""
    return UNSAFE.sub(escape_character, str(value))


def make_lines_visible(text: str) -> str:
    """A text with its control characters escaped as in `make_visible`; line breaks and tabs stay."""
    return UNSAFE_BUT_LINES.sub(escape_character, text)


def escape_character(match: re.Match[str]) -> str:
    """A character as Python writes it: `\\n`, `\\x1b`, `\\u202e`."""
    return match.group().encode("unicode_escape").decode()


def quote_for_shell(text: str) -> str:
    """A text as one argument of a POSIX shell: bare where it may be, else in quotes that it does not have."""
    if text and not SHELL_SPECIAL.search(text):
        return text
    if "'" in text and not DOUBLE_QUOTES_SPECIAL.search(text):
        return f'"{text}"'
    return shlex.quote(text)


def find_longest(length: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `length` that fits, found by halving: a long text costs a few tries, not
    thousands.

    Args:
        length: is known not to fit.
        fits: whether a number fits; what is smaller than a number that fits does, too.

    Returns:
        0 where not even 1 fits.
    """
    numbers = range(1, length)
    return bisect_left(numbers, 1, key=lambda number: 0 if fits(number) else 1)


def shorten_error(error: object, max_length: int = MAX_ERROR_LENGTH) -> str:
    """What another library says went wrong, as one line of about `max_length` characters."""
    text = " ".join(str(error).split())
    if len(text) <= max_length:
        return text
    beginning = text[:max_length]
    whole_words = beginning.rpartition(" ")[0]
    return f"{whole_words or beginning} …"


def shorten_text(text: str, max_length: int) -> str:
    """A text of at most so many characters: `…` stands for what is left out of its middle, so that both the
    key at the beginning and the value at the end can be told apart.
    """
    if len(text) <= max_length:
        return text
    kept = max_length - 1
    end_length = kept // 3
    beginning = text[: kept - end_length]
    end = text[len(text) - end_length :]
    return f"{beginning}…{end}"
