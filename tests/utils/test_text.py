"""Text of other people: what is obeyed becomes visible, and long texts are shortened with little work."""

import subprocess

import pytest

from int8run.utils.text import (
    find_longest,
    make_lines_visible,
    make_visible,
    quote_for_shell,
    shorten_error,
    shorten_text,
)


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("a fox, 狐, 🦊, ثعلب", "a fox, 狐, 🦊, ثعلب"),
        ("[red]x[/] [link=http://a]", "[red]x[/] [link=http://a]"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x9b31m \x07 \x00 \x7f", "\\x9b31m \\x07 \\x00 \\x7f"),
        ("over\rwritten\b", "over\\rwritten\\x08"),
        ("two\nlines\tand a tab", "two\\nlines\\tand a tab"),
        ("line\u2028separator", "line\\u2028separator"),
        ("exe\u202egpj.txt\u2066\u200f", "exe\\u202egpj.txt\\u2066\\u200f"),
        ("a name that is not UTF-8: \udce4", "a name that is not UTF-8: \\udce4"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text, visible):
    assert make_visible(text) == visible


def test_lines_stay_lines_where_a_text_may_have_some():
    assert make_lines_visible("first\nsecond\tthird\x1b[2J\r") == "first\nsecond\tthird\\x1b[2J\\r"


def test_values_that_are_no_text_are_spelled_as_python_does():
    assert make_visible(0.5) == "0.5" and make_visible(None) == "None"


@pytest.mark.parametrize("largest", range(11))
def test_the_largest_that_fits_is_found(largest):
    assert find_longest(11, lambda number: number <= largest) == largest


def test_the_largest_that_fits_is_found_with_a_try_for_each_doubling():
    tried = []

    def fits(number):
        tried.append(number)
        return number <= 333_333

    assert find_longest(1_000_000, fits) == 333_333
    assert len(tried) <= 20


@pytest.mark.parametrize(
    ("text", "max_length", "shortened"),
    [
        ("abcdefghij", 10, "abcdefghij"),
        ("abcdefghij", 7, "abcd…ij"),
        ("abcdefghij", 2, "a…"),
        ("abcdefghij", 1, "…"),
    ],
)
def test_a_shortened_text_keeps_both_ends(text, max_length, shortened):
    assert shorten_text(text, max_length) == shortened


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError("a few words more"), "a few …"),
        (ValueError("/a/path/without/spaces"), "/a/path/wi …"),
    ],
)
def test_an_error_of_another_library_is_one_line_cut_between_words(error, line):
    assert shorten_error(error, 10) == line


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("outlier=none", "outlier=none"),
        ("prompts.prompts=狐狸", "prompts.prompts=狐狸"),
        ("prompts=[fox,owl]", "'prompts=[fox,owl]'"),
        ("prompts=['a fox',owl]", "\"prompts=['a fox',owl]\""),
        ("prompts=['it\\'s',owl]", "\"prompts=['it\\'s',owl]\""),
        ("a='$HOME'", "'a='\"'\"'$HOME'\"'\"''"),
        ("", "''"),
    ],
)
def test_a_text_is_quoted_where_the_shell_needs_it(text, quoted):
    assert quote_for_shell(text) == quoted


@pytest.mark.parametrize(
    "text", ["a'b\\", "a'\\\\b", "~/x", "a=~", "it's `ls` !", "a b", "'\n'", "{a,b}", "x*?#;&|<>()"]
)
def test_a_shell_reads_a_quoted_text_as_it_was(text):
    result = subprocess.run(
        ["bash", "-c", f"printf %s {quote_for_shell(text)}"], capture_output=True, text=True
    )

    assert result.stdout == text
