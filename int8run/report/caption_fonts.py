"""A font for the captions of image grids that has their letters, whatever script they are in.

Pillow's own font has ASCII only, and draws a box for every other one. `image_files.py` asks here.
"""

from functools import cache
from pathlib import Path

from anyascii import anyascii
from PIL import ImageFont

# what Pillow's own font has besides ASCII, of what our captions need
PUNCTUATION = "·…"
# has a box for every letter
PLACEHOLDER_FONT = "Last Resort"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def choose_caption_font(text: str, size: float) -> tuple[str, Font]:
    """Find a font that has all letters of a text.

    Args:
        text: a caption.
        size: of the font, in pixels.

    Returns:
        The text and its font. Where no installed font has all letters, the text is spelled with Latin ones:
        `狐狸` becomes `HuLi`.
    """
    if all(map(is_plain, text)):
        return text, ImageFont.load_default(size=size)
    path = find_font_file(frozenset(text))
    if path is None:
        return spell_with_latin(text), ImageFont.load_default(size=size)
    return text, ImageFont.truetype(path, size=size)


def spell_with_latin(text: str) -> str:
    """A text with the letters that Pillow's own font lacks spelled in Latin ones."""
    letters = []
    for letter in text:
        letters.append(letter if is_plain(letter) else anyascii(letter))
    return "".join(letters)


def is_plain(letter: str) -> bool:
    """Whether Pillow's own font has a letter."""
    return letter.isascii() or letter in PUNCTUATION


@cache
def find_font_file(letters: frozenset[str]) -> str | None:
    """The file of the first font that has all letters: matplotlib's own, then the installed ones."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    codes = {ord(letter) for letter in letters}
    own = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    regular = set()
    for font in fontManager.ttflist:
        is_regular = font.style == "normal" and font.weight == 400
        if is_regular and not font.name.startswith(PLACEHOLDER_FONT):
            regular.add(font.fname)
    for path in [own, *sorted(regular)]:
        if codes <= read_letters(path):
            return path
    return None


@cache
def read_letters(path: str) -> frozenset[int]:
    """The code points that a font has; none where it has one size only, as fonts of color emoji."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # a font that was removed, or that FreeType does not read
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
