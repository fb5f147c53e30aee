"""Settings that change during the steps: which are schedules, and which value holds when."""

import pytest

from int8run.errors import ConfigError, check_range
from int8run.utils.step_schedule import ScheduleKind, check_schedule, find_value_at

KIND = ScheduleKind("speed", "[[0,1],[0.5,2]]", lambda value: check_range("a speed", value, 0, 9))
FORM = (
    r"a schedule is \[\[fraction of the steps, speed\], …\] with rising fractions from 0 on, such as "
    r"\[\[0,1\],\[0\.5,2\]\]$"
)


@pytest.mark.parametrize("entries", [[[0, 1]], ((0.0, 1), (0.5, 2)), [[0, 1], [1, 2]]])
def test_rising_fractions_from_0_on_make_a_schedule(entries: object) -> None:
    check_schedule("pace", entries, KIND)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], rf"^pace is \[\]; {FORM}"),
        ("fast", rf"^pace is 'fast'; {FORM}"),
        (3, rf"^pace is 3; {FORM}"),
        ([1, 2], rf"^pace is \[1, 2\]; {FORM}"),
        ([[0, 1, 2]], rf"^pace is \[\[0, 1, 2\]\]; {FORM}"),
        (["01"], rf"^pace is \['01'\]; {FORM}"),
        ([[0.1, 1]], rf"^pace is \[\[0\.1, 1\]\]; {FORM}"),
        ([[0, 1], [0.5, 2], [0.5, 3]], rf"^pace is .*; {FORM}"),
        ([[0, 1], [0.5, 2], [0.2, 3]], rf"^pace is .*; {FORM}"),
        ([[0, 1], [1.5, 2]], r"^fraction in the pace is 1\.5; allowed is a number from 0 to 1$"),
        ([[-0.1, 1]], r"^fraction in the pace is -0\.1; allowed is a number from 0 to 1$"),
        ([["0", 1]], r"^fraction in the pace is '0'; allowed is"),
        ([[0, 99]], r"^a speed is 99; allowed is a number from 0 to 9$"),
    ],
)
def test_anything_else_is_refused(entries: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_schedule("pace", entries, KIND)


def test_a_value_holds_until_the_next_one() -> None:
    schedule = [[0, "a"], [0.25, "b"], [0.5, "c"]]

    found = [find_value_at(schedule, fraction) for fraction in (0, 0.2, 0.25, 0.49, 0.5, 0.9, 1)]

    assert found == ["a", "a", "b", "b", "c", "c", "c"]
