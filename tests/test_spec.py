"""What of a config decides the built model, and what of it the tracker records."""

from pathlib import Path

import pytest
from jobs import make_spec

from int8run.spec import Job, flatten

STACK = ["lora=stack_a"]
SAME_BUILD = {
    "steps": ["sampler.steps=3"],
    "guidance": ["sampler.guidance=2"],
    "seed": ["seed=9"],
    "prompts": ["prompts.prompts=[fox]"],
    "tracker": ["tracker=none"],
    "metrics": ["metrics.baseline=none"],
    "progress": ["progress=false"],
    "strength of the stack": ["lora.strength=0.5"],
    "strength of one": ["lora.adapters.0.strength=2"],
}
OTHER_BUILD = {
    "model": ["model=flux"],
    "dtype": ["model.dtype=bfloat16"],
    "family": ["model_type=none"],
    "int8": ["int8.enable=false"],
    "fallback": ["int8.small_batch_fallback=never"],
    "outlier": ["outlier=convrot"],
    "outlier field": ["outlier=convrot", "outlier.group_size=64"],
    "backend": ["backend=reference"],
    "lora file": ["lora.adapters.0.path=other.safetensors"],
    "lora mode": ["lora.mode=bake"],
    "lora strict": ["lora.strict=false"],
    "no lora": ["lora=none"],
    "compile": ["compile=blocks"],
    "attention": ["attention=flash"],
    "device": ["device=cuda"],
}


@pytest.mark.parametrize("overrides", SAME_BUILD.values(), ids=SAME_BUILD)
def test_what_does_not_change_the_model_reuses_it(overrides):
    assert make_spec([*STACK, *overrides]).build_key == make_spec(STACK).build_key


@pytest.mark.parametrize("overrides", OTHER_BUILD.values(), ids=OTHER_BUILD)
def test_what_changes_the_model_builds_it_anew(overrides):
    assert make_spec([*STACK, *overrides]).build_key != make_spec(STACK).build_key


def test_all_builds_differ():
    keys = [make_spec([*STACK, *overrides]).build_key for overrides in OTHER_BUILD.values()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("override", ["lora.strength=0.5", "lora.adapters.0.strength=2"])
def test_a_baked_strength_is_part_of_the_build(override):
    baked = [*STACK, "lora.mode=bake"]
    assert make_spec([*baked, override]).build_key != make_spec(baked).build_key


def test_a_job_is_named_by_what_differs_from_the_defaults():
    assert Job({}, {}, ["seed=1", "lora=stack_a"], None, Path()).name == "seed=1 lora=stack_a"
    assert Job({}, {}, [], None, Path()).name == "defaults"


def test_parameters_are_the_words_of_the_command_line():
    settings = {
        "seed": 3,
        "model": {"_target_": "int8run.models.family.ModelSource", "location": None, "sampling": {"steps": 4}},
        "lora": {"adapters": [{"name": "ink", "strength": 0.8}, {"name": "gloss"}]},
        "prompts": {"prompts": ["a", "b"]},
        "families": {"flux": {"keep_float": [{"pattern": "x"}]}},
        "note": "x" * 251,
    }
    assert Job(settings, {"model": "tiny", "outlier": "none"}, [], None, Path()).params() == {
        "model": "tiny", "outlier": "none", "seed": "3", "model.location": "None", "model.sampling.steps": "4",
        "lora.adapters.0.name": "ink", "lora.adapters.0.strength": "0.8", "lora.adapters.1.name": "gloss", "prompts.prompts": "['a', 'b']",
    }  # fmt: skip


def test_an_option_is_not_overwritten_by_a_value_of_the_same_name():
    flat = {"compile": "chosen"}
    flatten("", {"compile": "none"}, flat)
    assert flat == {"compile": "chosen"}
