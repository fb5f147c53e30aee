"""Files that are damaged in every way.

Each is an error of int8run's, or every weight of it is what the oracle reads.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_encoders.compare_files import (
    BASES,
    WHOLE,
    base,
    compare_encoder,
    compare_file,
    make_mutated_file,
    read_by_int8run,
    whole,
)
from text_encoders.mutations import MUTATIONS, Draft

REPEATABLE = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
CHANGES = st.lists(st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 2**16)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", BASES)
def test_unchanged_files_are_read_right(name: str, tmp_path: Path) -> None:
    path = base(name).write(tmp_path / "x.safetensors")

    assert compare_file(path) == "read"

    found = read_by_int8run(path)

    assert {layer: found[layer][1] for layer in base(name).words} == base(name).words
    for layer, weight in base(name).real.items():
        assert np.allclose(found[layer][0], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_mutated_files_are_read_right_or_are_an_error(tmp_path: Path) -> None:
    path, counts = tmp_path / "x.safetensors", Counter[str]()

    @settings(REPEATABLE, max_examples=2000)
    @given(st.sampled_from([*BASES]), CHANGES)
    def run(name: str, changes: list[tuple[Callable[[Draft, Random], None], int]]) -> None:
        counts[compare_file(make_mutated_file(base(name), changes, path))] += 1

    run()

    # no use if all of them are broken beyond recognition
    assert counts["read"] > 400 and counts["refused, rightly"] > 400, counts


@pytest.mark.slow
def test_mutated_encoders_are_built_right_or_are_an_error(tmp_path: Path) -> None:
    path, counts = tmp_path / "x.safetensors", Counter[str]()

    @settings(REPEATABLE, max_examples=200)
    @given(st.sampled_from([*WHOLE]), CHANGES)
    def run(name: str, changes: list[tuple[Callable[[Draft, Random], None], int]]) -> None:
        counts[compare_encoder(make_mutated_file(whole(name), changes, path))] += 1

    run()

    assert counts["read"] > 40 and counts["refused"] > 40, counts
