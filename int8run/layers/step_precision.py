"""Which steps of an image the denoiser computes in float, and which in INT8: the setting `int8.steps`.

The first steps decide what an image becomes, the last ones its details. Float steps take the time of the
float model, and its memory.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from int8run.errors import ConfigError, check_choice
from int8run.utils.step_schedule import Schedule, ScheduleKind, check_schedule

FLOAT, INT8 = "float", "int8"
STEP_PRECISIONS = (FLOAT, INT8)
SETTING = "int8.steps"


def check_step_precisions(steps: Schedule) -> None:
    """Check `int8.steps`.

    Raises:
        ConfigError: for what is no schedule of precisions, or one without a single INT8 step.
    """
    check_precision = partial(check_choice, f"a precision of {SETTING}", allowed=STEP_PRECISIONS)
    kind = ScheduleKind("float or int8", "[[0,float],[0.1,int8]]", check_precision)
    check_schedule(SETTING, steps, kind)
    starts = [fraction for fraction, precision in steps if precision == INT8]
    if not starts or starts[0] == 1:
        raise ConfigError(
            f"{SETTING} is {list(steps)!r}, and no step is INT8; for the float model set int8.enable=false"
        )


def computes_in_float(steps: Schedule | None) -> bool:
    """Whether any step is computed by the float denoiser; None: all steps are INT8."""
    return steps is not None and any(precision == FLOAT for _, precision in steps)


def describe_steps(steps: Schedule) -> str:
    """`float, int8 from 10 % of the steps on`.

    Args:
        steps: of the setting.
    """
    _, first = steps[0]
    later = [f"{precision} from {100 * fraction:g} % of the steps on" for fraction, precision in steps[1:]]
    return ", ".join([first, *later])


def describe_step_counts(counts: Mapping[str, float]) -> str:
    """`2 float, 18 int8`: how many steps each precision computed.

    Args:
        counts: by precision, in whatever order.
    """
    known: Sequence[str] = [name for name in STEP_PRECISIONS if name in counts]
    return ", ".join(f"{counts[name]:g} {name}" for name in known)
