"""`int8.steps`: which steps are float and which INT8."""

import pytest

from int8run.errors import ConfigError
from int8run.layers.plan import Int8Settings
from int8run.layers.step_precision import computes_in_float, describe_step_counts, describe_steps


@pytest.mark.parametrize(
    ("steps", "is_shared"),
    [
        (None, False),
        ([[0.0, "int8"]], False),
        ([[0.0, "float"], [0.1, "int8"]], True),
        ([[0.0, "int8"], [0.9, "float"]], True),
        ([[0.0, "float"], [0.1, "int8"], [0.9, "float"]], True),
    ],
)
def test_the_float_model_is_needed_where_it_computes_a_step(
    steps: list[list[object]], is_shared: bool
) -> None:
    assert computes_in_float(steps) == Int8Settings(steps=steps).has_float_steps == is_shared


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("float", r"^int8\.steps is 'float'; a schedule is \[\[fraction of the steps, float or int8\], …\] "),
        (
            [[0.1, "int8"]],
            r"^int8\.steps is .* with rising fractions from 0 on, such as \[\[0,float\],\[0\.1,int8",
        ),
        ([[0, "int8"], [0.5, "float"], [0.2, "int8"]], r"^int8\.steps is .*; a schedule is "),
        ([[0, "float"], [2, "int8"]], r"^fraction in the int8\.steps is 2; allowed is a number from 0 to 1$"),
        ([[0, "fp8"]], r"^a precision of int8\.steps is 'fp8'; choose from float, int8$"),
        (
            [[0, "flaot"], [0.1, "int8"]],
            r"^a precision of int8\.steps is 'flaot'; did you mean 'float'\? choose",
        ),
        (
            [[0, "float"]],
            r"^int8\.steps is .*, and no step is INT8; for the float model set int8\.enable=false$",
        ),
        ([[0, "float"], [1, "int8"]], r"^int8\.steps is .*, and no step is INT8; for"),
    ],
)
def test_what_is_no_share_of_steps_is_refused(steps: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Int8Settings(steps=steps)  # type: ignore[arg-type]


def test_steps_are_described_in_their_order() -> None:
    assert describe_steps([[0.0, "float"], [0.1, "int8"]]) == "float, int8 from 10 % of the steps on"
    assert describe_steps([[0, "int8"]]) == "int8"
    assert describe_step_counts({"int8": 18.0, "float": 2.5}) == "2.5 float, 18 int8"
