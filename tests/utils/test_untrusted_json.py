"""JSON of strangers: it is parsed as `json` does it, or refused before it takes much time or memory."""

import json
import sys

import pytest

from int8run.utils.untrusted_json import (
    MAX_NESTING,
    MAX_PARTS,
    RepeatedNameError,
    count_parts,
    parse_untrusted_json,
)

VALUES = ["{}", "[]", "3", '"a"', "null", '{"a": [1, {"b": null}], "c": "[,{"}', ' [true, 1e3, "\\ud800"] ']


@pytest.mark.parametrize("text", VALUES)
def test_usual_json_is_parsed_as_by_the_library(text: str) -> None:
    assert parse_untrusted_json(text) == json.loads(text) == parse_untrusted_json(text.encode())


@pytest.mark.parametrize("text", ["", "{", "nothing", b"\xff", "[1,]", "1" * 5000])
def test_other_text_raises(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^is not JSON \("):
        parse_untrusted_json(text)


def nest(levels: int, opening: str, closing: str) -> str:
    return opening * levels + "1" + closing * levels


@pytest.mark.parametrize(
    ("opening", "closing", "levels"),
    [("[", "]", MAX_NESTING), ('{"a":', "}", MAX_NESTING), ('[{"a":', "}]", MAX_NESTING // 2)],
)
def test_nesting_has_a_limit_however_deep_it_is(opening: str, closing: str, levels: int) -> None:
    parse_untrusted_json(nest(levels, opening, closing))
    for more in (levels + 1, sys.getrecursionlimit() // 2, 100_000):
        with pytest.raises(ValueError, match=rf"^is nested in more than {MAX_NESTING} levels$"):
            parse_untrusted_json(nest(more, opening, closing))


def test_number_of_parts_has_a_limit() -> None:
    text = "[" + "1," * (MAX_PARTS - 1) + "1]"
    assert count_parts(text.encode()) == MAX_PARTS
    assert len(parse_untrusted_json(text)) == MAX_PARTS
    with pytest.raises(ValueError, match=r"^has more than 1000000 parts"):
        parse_untrusted_json("[1," + text[1:])


def test_name_that_an_object_has_twice_raises_unless_it_may() -> None:
    text = '{"x": {"a": 1, "b": 2, "a": 3}}'
    with pytest.raises(RepeatedNameError, match=r"^has 'a' twice$"):
        parse_untrusted_json(text)
    assert parse_untrusted_json(text, allows_repeats=True) == {"x": {"a": 3, "b": 2}}
