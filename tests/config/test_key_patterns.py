"""Places in the config: `*` stands for one part of a dotted path."""

import pytest

from int8run.config.key_patterns import is_at, is_below

PATTERN = "lora.adapters.*.path"


@pytest.mark.parametrize(
    ("key", "at", "below"),
    [
        ("lora.adapters.0.path", True, False),
        ("lora.adapters.0.path.flux", False, True),
        ("lora.adapters.0", False, False),
        ("lora.adapters.path", False, False),
        ("clip.adapters.0.path", False, False),
        ("clip.adapters.0.path.flux", False, False),
    ],
)
def test_a_key_is_at_a_place_or_below_it(key, at, below):
    assert is_at(PATTERN, key) is at
    assert is_below(PATTERN, key) is below


def test_the_whole_config_is_at_the_empty_pattern_alone():
    assert is_at("", "") and not is_at("", "seed")
