"""`prompt=…`: any text reaches the config unchanged, past hydra's grammar and omegaconf's references."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from int8run.config.prompt_argument import rewrite_negative_prompt, rewrite_prompt_arguments
from int8run.errors import ConfigError


def read_back(override):
    """What hydra and omegaconf make of an override of `prompts.prompts`."""
    parsed = OverridesParser.create().parse_override(override)
    assert parsed.key_or_group == "prompts.prompts"
    return OmegaConf.to_container(OmegaConf.create({"value": parsed.value()}), resolve=True)["value"]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.text(alphabet="ab ${}\\'\",[]()=:#\n\t%~!é狐🦊", max_size=12), min_size=1, max_size=3))
@example(["ends in a backslash \\"])
@example([""])
@example(["${oc.env:HOME} \\${a}", "null", "1984", "~", "it's"])
def test_any_text_comes_back_unchanged(prompts):
    arguments = rewrite_prompt_arguments([f"prompt={prompt}" for prompt in prompts])

    assert len(arguments) == 1
    assert read_back(arguments[0]) == prompts


def test_other_arguments_stay_where_they_are():
    arguments = ["-m", "seed=1,2", "prompt=a, b", "lora=none", "prompt=c"]

    assert rewrite_prompt_arguments(arguments) == [
        "-m",
        "seed=1,2",
        "prompts.prompts=['a, b','c']",
        "lora=none",
    ]
    assert rewrite_prompt_arguments(["model=flux"]) == ["model=flux"]


@pytest.mark.parametrize("argument", ["--prompt", "--prompt=a fox"])
def test_a_flag_is_answered_with_the_setting(argument):
    with pytest.raises(ConfigError, match="--prompt is no flag; give a prompt without dashes"):
        rewrite_prompt_arguments([argument, "a fox"])


@pytest.mark.parametrize("other", ["prompts.prompts=[b]", "+prompts.path=p.txt"])
def test_prompts_that_are_given_twice_are_refused(other):
    with pytest.raises(ConfigError, match=r"prompt= and prompts\.\w+= both say what to generate"):
        rewrite_prompt_arguments(["prompt=a", other])


@pytest.mark.parametrize(
    "text", ["blurry, low (quality:1.2)", "it's ${oc.env:HOME}", "", "null", "[a]", "a=b"]
)
def test_a_negative_prompt_is_any_text(text):
    arguments = rewrite_negative_prompt(["-m", f"negative_prompt={text}", "seed=1,2"])

    assert (arguments[0], arguments[2]) == ("-m", "seed=1,2")
    parsed = OverridesParser.create().parse_override(arguments[1])
    value = OmegaConf.to_container(OmegaConf.create({"value": parsed.value()}), resolve=True)["value"]
    assert (parsed.key_or_group, value) == ("prompts.negative_prompt", text)
    assert rewrite_negative_prompt(["prompts.negative_prompt=null"]) == ["prompts.negative_prompt=null"]


@pytest.mark.parametrize("argument", ["--negative_prompt", "--negative-prompt=blurry"])
def test_a_flag_for_a_negative_prompt_is_answered_with_the_setting(argument):
    with pytest.raises(ConfigError, match="--negative_prompt is no flag; give it without dashes"):
        rewrite_negative_prompt([argument])


@pytest.mark.parametrize("other", ["negative_prompt=b", "+prompts.negative_prompt=b"])
def test_a_second_negative_prompt_is_refused(other):
    with pytest.raises(ConfigError, match="a command has one negative prompt; give one of them"):
        rewrite_negative_prompt(["negative_prompt=a", other])
