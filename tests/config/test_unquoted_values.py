"""Values with a comma on the command line."""

from int8run.config.unquoted_values import quote_keep_blocks

SETTING = "model_type.keep_blocks"


def test_both_ends_need_no_quotes() -> None:
    arguments = [f"{SETTING}=first:2,last:3", f"{SETTING}=first:2", "seed=1,2"]

    assert quote_keep_blocks(arguments) == [f"{SETTING}='first:2,last:3'", *arguments[1:]]


def test_in_a_sweep_a_comma_parts_two_values() -> None:
    arguments = ["-m", f"{SETTING}=first:2,last:3"]

    assert quote_keep_blocks(arguments) == arguments
