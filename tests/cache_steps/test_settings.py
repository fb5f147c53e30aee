"""The settings of step caches: what is refused, and how."""

import re
import shlex

import pytest
from support.run_job import make_spec

from int8run.cache_steps.registry import list_cache_names
from int8run.errors import ConfigError
from int8run.tasks.run_settings import list_other_settings, list_other_words


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["taylorseer", "cache_steps.interval=1"],
            "cache_steps.interval is 1; allowed is a whole",
        ),
        (
            ["taylorseer", "cache_steps.warm_up=16"],
            "cache_steps.warm_up=16 computes 16 steps in any",
        ),
        (["taylorseer", "cache_steps.stop=3"], "cache_steps.warm_up=3 computes 3 steps in any case, of 3"),
        (["taylorseer", "cache_steps.dtype=int8"], "cache_steps.dtype is 'int8'; choose from bfloat16"),
        (["taylorseer", "compile=blocks"], "cache_steps=taylorseer decides inside each block"),
        (["pab", "compile=blocks"], "which compile=blocks would compile anew in each step; set compile=none"),
        (
            ["magcache", "cache_steps.warm_up_share=1"],
            "warm_up_share=1 computes 16 steps in any case",
        ),
        (["magcache", "cache_steps.ratios=[]"], "cache_steps.ratios is []; give one number above 0 for each"),
        (["magcache", "cache_steps.ratios=[1,-1]"], "give one number above 0 for each step"),
        (["magcache", "cache_steps.ratios=best"], "cache_steps.ratios is 'best'; give one number above 0"),
        (["magcache", "cache_steps.max_skipped=0"], "cache_steps.max_skipped is 0"),
        (
            ["seacache", "cache_steps.warm_up=15"],
            "warm_up=15 with cache_steps.cool_down=1 computes",
        ),
        (
            ["seacache", "cache_steps.order=2"],
            "cache_steps.order is 2; allowed is a whole",
        ),
        (["seacache", "cache_steps.power=0"], "cache_steps.power is 0"),
        (
            ["seacache", "offload=model", "metrics.baseline=none"],
            "cache_steps=seacache has a hook on the whole denoiser, which offload=model replaces",
        ),
        (
            ["pab", "cache_steps.timesteps=[800,100]"],
            "give two whole numbers from -1 to 1001",
        ),
        (["pab", "cache_steps.timesteps=[1]"], "cache_steps.timesteps is [1]"),
        (["pab", "cache_steps.spatial=0"], "cache_steps.spatial is 0"),
        (["fastercache", "cache_steps.weight=-1"], "cache_steps.weight is -1"),
        (["fastercache", "cache_steps.guidance=1"], "cache_steps.guidance is 1; choose true or false"),
        (["fastercache", "cache_steps.guidance_timesteps=all"], "cache_steps.guidance_timesteps is 'all'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_cache_checks_its_settings(words: list[str], message: str) -> None:
    cache, *others = words

    with pytest.raises(ConfigError, match=re.escape(message)):
        make_spec([f"cache_steps={cache}", *others])


def test_lite_taylorseer_skips_blocks_and_takes_compiled_ones() -> None:
    spec = make_spec(["cache_steps=taylorseer", "cache_steps.lite=true", "compile=blocks"])

    assert spec.cache_steps.skips == "blocks"


@pytest.mark.parametrize("name", list_cache_names())
def test_the_command_of_an_image_gives_back_each_cache(name: str) -> None:
    spec = make_spec([f"cache_steps={name}"])

    words = list_other_words(list_other_settings(spec, is_int8=True), {})

    again = make_spec([shlex.split(word)[0] for word in words if word.startswith("cache_steps")])
    assert again.cache_steps == spec.cache_steps


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="cache_steps"):
        make_spec(["cache_steps=first_block", "+cache_steps.treshold=0.1"])


def test_a_cache_changes_neither_the_build_nor_what_the_float_model_draws() -> None:
    plain, cached = make_spec([]), make_spec(["cache_steps=first_block"])

    assert cached.build_key == plain.build_key
    assert cached.float_key == plain.float_key
    assert not cached.float_only.has_step_cache
