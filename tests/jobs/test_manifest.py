"""The identity of a sweep."""

import re
from pathlib import Path

import pytest

from int8run.jobs.manifest import make_sweep_id


@pytest.mark.parametrize(
    ("folder", "beginning"),
    [
        ("multirun/2026-11-21/22-30-00", "2026-11-21_22-30-00"),
        ("sweeps/strengths", "strengths"),
        ("sweeps/lr=1,x=[2]", "lr-1-x-2"),
        ('sweeps/it\'s "mine"', "it-s-mine"),
        ("sweeps/狐", "sweep"),
        ("sweeps/a b%c?d#e", "a-b-c-d-e"),
        (f"sweeps/{'x' * 250}", "x" * 100),
    ],
)
def test_the_id_of_a_sweep_is_a_name_that_everything_takes(folder, beginning):
    sweep = make_sweep_id(Path(folder))

    assert re.fullmatch(re.escape(beginning) + "-[0-9a-f]{4}", sweep)


def test_two_sweeps_of_one_folder_have_different_ids():
    assert len({make_sweep_id(Path("a")) for _ in range(20)}) > 10
