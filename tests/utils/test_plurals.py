"""Numbers with the word that they count."""

import pytest

from int8run.utils.plurals import count_noun


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "thread", "1 thread"),
        (2, "thread", "2 threads"),
        (0, "entry", "0 entries"),
        (1, "entry", "1 entry"),
        (3, "key", "3 keys"),
        (2, "matrix", "2 matrices"),
        (2, "process", "2 processes"),
    ],
)
def test_a_noun_has_the_number_of_what_it_counts(number: int, noun: str, text: str) -> None:
    assert count_noun(number, noun) == text
