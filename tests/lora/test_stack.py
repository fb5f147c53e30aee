"""A LoRA stack as configured: ranges, names, modes, sources."""

import pytest

from int8run.errors import ConfigError
from int8run.lora.stack import Adapter, LoraStack

HUB = {"repo": "user/style", "weight_name": "style.safetensors"}


@pytest.mark.parametrize("strength", [-20.01, 21, float("nan"), True, "1.0"], ids=repr)
def test_strength_of_an_adapter(strength):
    with pytest.raises(ConfigError, match=r"strength of LoRA 'ink' is .*; allowed is a number from -20 to 20"):
        Adapter("ink", "ink.safetensors", strength)


@pytest.mark.parametrize("strength", [-20.01, 21, float("inf"), False], ids=repr)
def test_strength_of_the_stack(strength):
    with pytest.raises(ConfigError, match=r"lora\.strength is .*; allowed is a number from -20 to 20"):
        LoraStack([Adapter("ink", "ink")], strength=strength)


def test_strengths_times_the_stacks_own():
    with pytest.raises(ConfigError, match=r"strength of LoRA 'gloss' times lora\.strength is -25\.0; allowed is a number from -20 to 20"):
        LoraStack([Adapter("ink", "ink"), Adapter("gloss", "gloss", -5.0)], strength=5.0)
    assert LoraStack([Adapter("ink", "ink", 0.5), Adapter("gloss", "gloss", -20)], strength=0.5).strengths == [0.25, -10.0]


def test_the_ends_of_the_range_are_allowed():
    assert LoraStack([Adapter("ink", "ink", -20), Adapter("gloss", "gloss", 20)]).strengths == [-20, 20]


def test_names_are_given_once():
    with pytest.raises(ConfigError, match=r"lora\.adapters has the name 'ink' twice; give each adapter its own name"):
        LoraStack([Adapter("ink", "a"), Adapter("gloss", "b"), Adapter("ink", "c")])


@pytest.mark.parametrize(("mode", "hint"), [("dynamik", r"did you mean 'dynamic'\? "), ("zzz", "")])
def test_unknown_mode(mode, hint):
    with pytest.raises(ConfigError, match=rf"lora\.mode is '{mode}'; {hint}choose from .*auto, bake, dynamic"):
        LoraStack(mode=mode)


@pytest.mark.parametrize(("mode", "bakes"), [("auto", False), ("dynamic", False), ("bake", True)])
def test_only_bake_makes_strengths_part_of_the_build(mode, bakes):
    assert LoraStack(mode=mode).bakes is bakes


@pytest.mark.parametrize(
    ("path", "weight_name", "source"),
    [
        ("ink", None, ("ink", None)),
        ("user/style", "style.safetensors", ("user/style", "style.safetensors")),
        ({"tiny": "ink", "flux": HUB}, None, ("user/style", "style.safetensors")),
        ({"tiny": HUB, "flux": "style.safetensors"}, None, ("style.safetensors", None)),
    ],
    ids=["path", "hub", "mapping to hub", "mapping to path"],
)
def test_source(path, weight_name, source):
    assert Adapter("ink", path, weight_name=weight_name).source("flux") == source


def test_a_base_model_without_a_source_is_told_which_have_one():
    with pytest.raises(ConfigError, match=r"LoRA 'ink' has no source for base model 'sdxl'; it has one for flux, tiny; add an entry under"):
        Adapter("ink", {"tiny": "ink", "flux": HUB}).source("sdxl")


@pytest.mark.parametrize("missing", ["repo", "weight_name"])
def test_a_hub_source_needs_both_words(missing):
    entry = {key: value for key, value in HUB.items() if key != missing}
    with pytest.raises(ConfigError, match=rf"LoRA 'ink'.*{missing}"):
        Adapter("ink", {"flux": entry}).source("flux")


def test_adapters_may_be_plain_mappings():
    stack = LoraStack(adapters=[{"name": "a", "path": "a.safetensors", "strength": 0.5}])
    assert stack.adapters == (Adapter("a", "a.safetensors", 0.5),)


@pytest.mark.parametrize("entry", ["a.safetensors", {"name": "a"}, {"name": "a", "path": "b", "strenght": 1}], ids=repr)
def test_an_adapter_of_another_form_is_named(entry):
    with pytest.raises(ConfigError, match=r"an entry of lora\.adapters is .*; it takes name and path, and may have strength, weight_name"):
        LoraStack(adapters=[entry])


def test_an_adapter_without_a_path_is_named():
    with pytest.raises(ConfigError, match=r"LoRA 'file' has no path; set lora\.adapters\.0\.path="):
        Adapter("file", None)
