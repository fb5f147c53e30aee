"""Times of calls that take turns."""

from collections.abc import Callable, Sequence

import pytest
from support.helpers import CPU

from int8run.utils import timing
from int8run.utils.timing import is_steady, time_in_turns, time_medians


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Sequence[float]], Callable[[], None]]:
    """Calls that take the given times by a clock of their own, and note their names in `taking.order`."""
    clock = [0.0]
    monkeypatch.setattr(timing, "read_clock", lambda device: clock[0])

    def taking(name: str, seconds: Sequence[float]) -> Callable[[], None]:
        durations = iter(seconds)

        def call() -> None:
            taking.order.append(name)
            clock[0] += next(durations)

        return call

    taking.order = []
    return taking


def test_calls_take_turns_and_the_first_round_warms_up(taking: Callable) -> None:
    calls = [taking("a", [100, 1, 2, 3]), taking("b", [100, 7, 8, 9])]
    assert time_in_turns(calls, CPU, 3) == [[1, 2, 3], [7, 8, 9]] and taking.order == ["a", "b"] * 4


def test_the_median_counts(taking: Callable) -> None:
    assert time_medians(
        [taking("a", [100, *range(1, 12)]), taking("b", [100, *[7] * 5, 999, *[7] * 5])], CPU, 11
    ) == [6, 7]


@pytest.mark.parametrize(
    ("times", "quiet"),
    [([1, 1, 1], True), ([1, 2, 2], True), ([1, 2.1, 3], False), ([1, 1, 9], True)],
    ids=str,
)
def test_a_median_far_above_the_shortest_time_is_a_busy_machine(times: list[float], quiet: bool) -> None:
    assert is_steady(times) is quiet
