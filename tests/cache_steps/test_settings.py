"""The settings of step caches: what is refused, and how."""

import re

import pytest
from support.run_job import make_spec

from int8run.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache_steps.threshold=1.5"], "cache_steps.threshold is 1.5; allowed is a number from 0 to 1"),
        (["cache_steps.threshold=-0.1"], "cache_steps.threshold is -0.1"),
        (["cache_steps.models=all"], "cache_steps.models is 'all'; choose from both, int8"),
        (["cache_steps.split=maybe"], "cache_steps.split is 'maybe'; choose true or false"),
        (["int8.enable=false"], "cache_steps=first_block is put on the INT8 model, and int8.enable=false"),
        (
            ["cache_steps.models=both", "metrics.baseline=none"],
            "cache_steps.models=both generates with the float model once more, and metrics.baseline=none",
        ),
        (["compile=full"], "cache_steps=first_block decides between blocks .* set compile=blocks or none"),
        (["compile=reduce-overhead"], "compile=reduce-overhead makes one graph of all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message if ".*" in message else re.escape(message)):
        make_spec(["cache_steps=first_block", *words])


def test_a_cache_changes_neither_the_build_nor_what_the_float_model_draws() -> None:
    plain, cached = make_spec([]), make_spec(["cache_steps=first_block"])

    assert cached.build_key == plain.build_key
    assert cached.float_key == plain.float_key
    assert not cached.float_only.has_step_cache
