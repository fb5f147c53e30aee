"""Which cases of a parametrized test run every time, and which only among the slow ones."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(daily: Collection[object], cases: Iterable[Any]) -> list[Any]:
    """All cases, for `pytest.mark.parametrize`; those that are not in `daily` are marked slow.

    Args:
        daily: the cases that stay in the fast tier: one of each kind that breaks alone.
        cases: every case, as parametrize takes them.
    """
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in daily else pytest.mark.slow
        marked.append(pytest.param(*values, marks=marks))
    return marked
