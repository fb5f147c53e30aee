"""Fonts of captions: letters of every script are drawn, or spelled with Latin ones; none becomes a box."""

import pytest
from matplotlib.ft2font import FT2Font

from int8run.report import caption_fonts
from int8run.report.caption_fonts import choose_caption_font


@pytest.fixture
def only_own_font(monkeypatch):
    """A machine on which no font is installed."""
    from matplotlib.font_manager import fontManager

    monkeypatch.setattr(fontManager, "ttflist", [])
    caption_fonts.find_font_file.cache_clear()
    yield
    caption_fonts.find_font_file.cache_clear()


@pytest.mark.parametrize("text", ["лиса ёж · seed 0", "Füchse…", "αλεπού", "ثعلب"])
def test_a_font_with_the_letters_is_chosen(only_own_font, text):
    shown, font = choose_caption_font(text, 20)

    assert shown == text
    assert {ord(letter) for letter in text} <= set(FT2Font(font.path).get_charmap())


@pytest.mark.parametrize(("text", "spelled"), [("狐狸 · seed 0", "HuLi · seed 0"), ("🦊 a…", ":fox: a…")])
def test_letters_that_no_font_has_are_spelled_in_latin(only_own_font, text, spelled):
    shown, font = choose_caption_font(text, 20)

    assert shown == spelled
    assert font.getlength(shown) > 0


@pytest.mark.parametrize("letter", [chr(code) for code in range(33, 127)] + list(caption_fonts.PUNCTUATION))
def test_pillows_own_font_has_what_it_is_used_for(letter):
    shown, font = choose_caption_font(letter, 20)
    box = font.getmask("\ue000")  # of private use, which no font has

    assert shown == letter
    assert bytes(font.getmask(letter)) != bytes(box)


def test_a_file_that_is_no_font_is_passed_over(tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"not a font")

    assert caption_fonts.read_letters(str(tmp_path / "a.ttf")) == frozenset()
