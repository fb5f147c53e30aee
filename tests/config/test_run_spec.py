"""What of a config decides the built model, and what of it the tracker records."""

import functools
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from support.run_job import make_spec

from int8run.config.job import Job, flatten_settings
from int8run.errors import ConfigError

STACK = ["lora=stack_a"]
SAME_BUILD = {
    "steps": ["sampler.steps=3"],
    "guidance": ["sampler.guidance=2"],
    "seed": ["seed=9"],
    "prompts": ["prompts.prompts=[fox]"],
    "tracker": ["tracker=none"],
    "what is measured": ["metrics.layers=false", "metrics.objective=speed/step_ms_p50"],
    "the cache": ["cache.limit_gb=1", "cache.folder=elsewhere"],
    "progress": ["progress=false"],
    "strength of the stack": ["lora.strength=0.5"],
    "strength of one": ["lora.adapters.0.strength=2"],
    "text strength": ["+lora.adapters.0.text_strength=0.3"],
    "scheduler": ["sampler.scheduler=FlowMatchHeunDiscreteScheduler"],
    "trigger words": ["lora.insert_triggers=true"],
}
OTHER_BUILD = {
    "model": ["model=flux"],
    "dtype": ["model.dtype=bfloat16"],
    "family": ["model_type=none"],
    "int8": ["int8.enable=false"],
    "fallback": ["int8.small_batch_fallback=never"],
    "outlier": ["outlier=convrot"],
    "outlier field": ["outlier=convrot", "outlier.group_size=64"],
    "rounding": ["rounding=mse"],
    "rounding field": ["rounding=mse", "rounding.candidates=8"],
    "what calibration is needed for": ["rounding=gptq"],
    "quality budget": ["model_type.mixed_precision=auto", "quality_db=40"],
    "another budget": ["model_type.mixed_precision=auto", "quality_db=41"],
    "checkpoint": ["int8.checkpoint=m.safetensors"],
    "save": ["save=m.safetensors"],
    "backend": ["backend=reference"],
    "lora file": ["lora.adapters.0.path=other.safetensors"],
    "lora mode": ["lora.mode=bake"],
    "lora strict": ["lora.strict=false"],
    "stochastic": ["lora.mode=stochastic"],
    "another seed of random rounding": ["lora.mode=stochastic", "seed=9"],
    "what a branch may cost": ["lora.max_overhead=0.1"],
    "a schedule": ["lora.adapters.0.strength=[[0,1],[0.5,0]]"],
    "components": ["+lora.adapters.0.components=[denoiser]"],
    "lora folder": ["lora_dir=loras"],
    "one lora": ["lora.adapters.1.enabled=false"],
    "no lora": ["lora=none"],
    "compile": ["compile=blocks"],
    "attention": ["attention=flash"],
    "device": ["device=cuda"],
    "no float model beside it": ["metrics.baseline=none"],
    "one that drew before": ["metrics.baseline=cached", "seed=1"],
    "offload": ["metrics.baseline=none", "offload=model"],
    "offload of blocks": ["metrics.baseline=none", "offload=group"],
    "a base": ["model.base=elsewhere"],
    "text encoders": ["clip=int8_rowwise"],
    "their kernels": ["clip=nvfp4", "clip.kernel_backend=dequantize"],
    "a text encoder's file": ["clip=auto", "clip.path=a.safetensors"],
    "text encoders alone": ["clip=nvfp4", "int8.enable=false"],
}


@functools.cache
def composed(*overrides):
    """The RunSpec of these overrides, which several tests look at; composing costs more than the rest of a
    test.
    """
    return make_spec([*overrides])


@pytest.mark.parametrize("overrides", SAME_BUILD.values(), ids=SAME_BUILD)
def test_what_does_not_change_the_model_reuses_it(overrides):
    assert composed(*STACK, *overrides).build_key == composed(*STACK).build_key


@pytest.mark.parametrize("overrides", OTHER_BUILD.values(), ids=OTHER_BUILD)
def test_what_changes_the_model_builds_it_anew(overrides):
    assert composed(*STACK, *overrides).build_key != composed(*STACK).build_key


def test_all_builds_differ():
    keys = [composed(*STACK, *overrides).build_key for overrides in OTHER_BUILD.values()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("override", ["lora.strength=0.5", "lora.adapters.0.strength=2"])
def test_a_baked_strength_is_part_of_the_build(override):
    baked = [*STACK, "lora.mode=bake"]
    assert make_spec([*baked, override]).build_key != make_spec(baked).build_key


NEEDS_CALIBRATION = {
    "method": ["outlier=smoothquant"],
    "choice of methods": ["outlier=auto"],
    "rounding": ["rounding=gptq"],
    "budget": ["model_type.mixed_precision=auto", "quality_db=40"],
    "budget of a checkpoint": [
        "model_type.mixed_precision=auto",
        "quality_db=40",
        "int8.checkpoint=m.safetensors",
    ],
}
NEEDS_NONE = {
    "nothing": [],
    "method": ["outlier=hadanorm"],
    "rounding": ["rounding=mse"],
    "checkpoint": ["outlier=smoothquant", "rounding=gptq", "int8.checkpoint=m.safetensors"],
    "float": ["outlier=smoothquant", "rounding=gptq", "int8.enable=false"],
}
DRAWN_BY = {
    "calibration": [{"prompts": ["fox"]}, {"seed": 5}, {"num_timesteps": 1}, {"max_tokens_per_layer": 9}],
    "sampler": [{"steps": 3}, {"guidance": 2.0}],
}


def drawn_otherwise(spec):
    """The same run with other calibration images, in every way that there is."""
    for part, changes in DRAWN_BY.items():
        yield from (replace(spec, **{part: replace(getattr(spec, part), **change)}) for change in changes)


@pytest.mark.parametrize("overrides", NEEDS_CALIBRATION.values(), ids=NEEDS_CALIBRATION)
def test_calibration_counts_where_something_is_fitted_to_it(overrides):
    spec = make_spec(overrides)
    keys = {other.build_key for other in drawn_otherwise(spec)}
    assert spec.needs_calibration and len(keys) == 6 and spec.build_key not in keys


@pytest.mark.parametrize("overrides", NEEDS_NONE.values(), ids=NEEDS_NONE)
def test_calibration_does_not_count_where_nothing_looks_at_it(overrides):
    spec = make_spec(overrides)
    assert not spec.needs_calibration and {other.build_key for other in drawn_otherwise(spec)} == {
        spec.build_key
    }


def test_a_job_is_named_by_what_differs_from_the_defaults():
    assert Job({}, {}, ["seed=1", "lora=stack_a"], Path()).name == "seed=1 lora=stack_a"
    assert Job({}, {}, [], Path()).name == "defaults"


def test_a_job_of_a_sweep_is_named_by_what_differs_from_the_others():
    words = ["seed=1", "lora=stack_a", "+a.b=2", "~c"]
    assert Job({}, {}, words, Path(), varying=["a.b", "lora"]).name == "lora=stack_a +a.b=2"
    assert Job({}, {}, words, Path(), varying=["c"]).name == "~c"
    assert Job({}, {}, words, Path(), varying=[]).name == "seed=1 lora=stack_a +a.b=2 ~c"


def test_parameters_are_the_words_of_the_command_line():
    settings = {
        "seed": 3,
        "model": {
            "_target_": "int8run.models.family.ModelSource",
            "location": None,
            "sampling": {"steps": 4},
        },
        "lora": {"adapters": [{"name": "ink", "strength": 0.8}, {"name": "gloss"}]},
        "prompts": {"prompts": ["a", "b"]},
        "families": {"flux": {"ignore": [{"pattern": "x"}]}},
        "note": "x" * 251,
        "tracker": {"uri": "http://x"},
        "cache": {"folder": "y"},
        "resume": True,
        "sync": "z",
        "progress": False,  # say nothing of a result
    }
    assert Job(settings, {"model": "tiny", "outlier": "none"}, [], Path()).get_params() == {
        "model": "tiny",
        "outlier": "none",
        "seed": "3",
        "model.location": "None",
        "model.sampling.steps": "4",
        "lora.adapters.0.name": "ink",
        "lora.adapters.0.strength": "0.8",
        "lora.adapters.1.name": "gloss",
        "prompts.prompts": "['a', 'b']",
        "families.flux.ignore": "[{'pattern': 'x'}]",
        "note": f"{'x' * 222}… (251 characters, {hashlib.sha256(b'x' * 251).hexdigest()[:8]})",
    }


@pytest.mark.parametrize("key", ["prompt", "model_type.ignore"])
def test_long_values_are_parameters_that_differ_where_the_values_do(key):
    def read_param(end):
        text = "a very long prompt " * 300 + end
        value = text if key == "prompt" else [{"pattern": text, "reason": "r"}]
        settings = {"prompt": value} if key == "prompt" else {"model_type": {"ignore": value}}
        return Job(settings, {}, [], Path()).get_params()[key]

    assert read_param("fox") != read_param("owl") and len(read_param("fox")) == 250


def test_a_password_is_not_cut_out_of_its_address():
    flat = {}
    flatten_settings("", {"note": "x" * 200 + "http://user:" + "secret" * 20 + "@host"}, flat)

    assert "secret" not in flat["note"]


def test_an_option_is_not_overwritten_by_a_value_of_the_same_name():
    flat = {"compile": "chosen"}
    flatten_settings("", {"compile": "none"}, flat)
    assert flat == {"compile": "chosen"}


# -- settings that cannot be together --------------------------------------------------------------

REFUSED = {
    "two models to move": (
        ["offload=model"],
        r"^offload=model moves one model to a GPU and back, metrics\.baseline=run holds two; set ",
    ),
    "two models to move by blocks": (
        ["offload=group"],
        r"^offload=group moves one model to a .* or none$",
    ),
    "graphs of what is moved": (
        ["compile=reduce-overhead", "offload=model", "metrics.baseline=none"],
        r"^compile=reduce-overhead records where each tensor lies, and offload=model moves them; choose ",
    ),
    "steps without INT8": (
        ["int8.enable=false", "int8.steps=[[0,float],[0.5,int8]]"],
        r"^int8\.enable=false and int8\.steps contradict each other: no step is INT8; set int8\.steps=null$",
    ),
    "steps with a step cache": (
        ["int8.steps=[[0,float],[0.5,int8]]", "cache_steps=first_block"],
        r"^cache_steps=first_block reuses what the INT8 .*; set int8\.steps=null, or cache_steps=none$",
    ),
    "steps with copies for streams": (
        ["int8.steps=[[0,float],[0.5,int8]]", "offload=group_stream", "metrics.baseline=none"],
        r"^offload=group_stream keeps a copy of every weight .*; choose offload=group or model$",
    ),
    "unknown offload": (
        ["offload=disk"],
        r"^offload is 'disk'; choose from group, group_stream, model, none$",
    ),
    "unknown baseline": (
        ["metrics.baseline=never"],
        r"^metrics\.baseline is 'never'; .*choose from cached, none, run$",
    ),
    "a file of another kind": (
        ["save=m.ckpt"],
        r"^save=m\.ckpt is neither a \.safetensors file nor a folder \(a name ",
    ),
    "no INT8 to save": (
        ["save=m.safetensors", "int8.enable=false"],
        r"^int8\.enable=false makes no INT8 layers; quality_db, save and",
    ),
    "a checkpoint of nothing": (
        ["int8.checkpoint=m.safetensors", "int8.enable=false"],
        r"^int8\.enable=false makes no INT8 layer",
    ),
    "nothing to compare with": (
        ["metrics.baseline=none", "metrics=perceptual"],
        r"^metrics\.perceptual=.* compares with the ",
    ),
    "a cache below nothing": (
        ["cache.limit_gb=-1"],
        r"^cache\.limit_gb is -1; allowed is a number from 0 to",
    ),
    "a misspelt family": (
        ["model.family=sdx"],
        r"^model\.family is 'sdx'; did you mean 'sdxl'\? choose from anima, chroma, .*, z_image$",
    ),
    "latents for images": (["+sampler.extra.output_type=latent"], r"^sampler\..*latent makes no images to "),
    "arrays for images": (
        ["+sampler.extra.output_type=np"],
        r"^sampler\.extra\.output_type is 'np'; choose from pil$",
    ),
    "a budget without mixed_precision": (
        ["quality_db=40"],
        r"^model_type\.mixed_precision=auto keeps layers float until quality_db is met",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_be_together_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(overrides)


@pytest.mark.parametrize("baseline", ["cached", "none"])
def test_one_model_can_be_moved(baseline):
    assert make_spec(["offload=model", f"metrics.baseline={baseline}"]).offload == "model"
    assert make_spec(["offload=group", "int8.enable=false"]).offload == "group", (
        "the float model alone is one"
    )


NEEDS_FLOAT = {
    "a run beside it": [],
    "float alone": ["int8.enable=false", "metrics.baseline=none"],
    "calibration": ["outlier=smoothquant", "metrics.baseline=none"],
    "budget": [*NEEDS_CALIBRATION["budget"], "metrics.baseline=cached"],
}
STREAMED = {
    "none": ["metrics.baseline=none"],
    "cached": ["metrics.baseline=cached"],
    "hadanorm": ["metrics.baseline=none", "outlier=hadanorm"],
    "checkpoint": ["metrics.baseline=none", "outlier=smoothquant", "int8.checkpoint=m.safetensors"],
}


@pytest.mark.parametrize("overrides", NEEDS_FLOAT.values(), ids=NEEDS_FLOAT)
def test_the_float_model_is_held_where_it_generates(overrides):
    assert make_spec(overrides).needs_float_denoiser


@pytest.mark.parametrize("overrides", STREAMED.values(), ids=STREAMED)
def test_the_float_model_is_not_held_otherwise(overrides):
    assert not make_spec(overrides).needs_float_denoiser


@pytest.mark.parametrize(
    "override",
    [
        "offload=model",
        "cache.limit_gb=3",
        "outlier=convrot",
        "save=m.safetensors",
        "backend=reference",
        "clip=nvfp4",
    ],
)
def test_what_the_float_model_generates_does_not_depend_on_int8(override):
    words = ["metrics.baseline=cached"]
    assert make_spec([*words, override]).float_key == composed(*words).float_key


@pytest.mark.parametrize(
    "override",
    [
        "model.dtype=bfloat16",
        "sampler.steps=3",
        "attention=flash",
        "compile=blocks",
        "lora=stack_a",
        "device=cuda",
    ],
)
def test_what_the_float_model_generates_depends_on_the_rest(override):
    assert make_spec([override]).float_key != composed().float_key


@pytest.mark.parametrize(
    ("overrides", "held"),
    [
        ([], True),
        (["clip=auto", "metrics.baseline=none"], True),
        (["clip=nvfp4"], True),
        (["clip=nvfp4", "metrics.baseline=none"], False),
        (["clip=nvfp4", "metrics.baseline=cached"], False),
        (["clip=nvfp4", "metrics.baseline=none", "outlier=smoothquant"], True),
        (["clip=auto", "clip.path=a.safetensors", "metrics.baseline=none", "int8.enable=false"], False),
    ],
    ids=str,
)
def test_float_text_encoders_are_held_where_somebody_reads_with_them(overrides, held):
    assert make_spec(overrides).needs_float_encoders == held


@pytest.mark.parametrize(
    ("overrides", "candidate"),
    [
        ([], "int8"),
        (["clip=nvfp4"], "int8"),
        (["int8.enable=false"], "float"),
        (["int8.enable=false", "clip=auto"], "float"),
        (["int8.enable=false", "clip=nvfp4"], "clip"),
        (["int8.enable=false", "clip=auto", "clip.path=a.safetensors"], "clip"),
    ],
)
def test_what_is_compared_with_the_float_model(overrides, candidate):
    spec = make_spec(overrides)
    assert spec.candidate == candidate and spec.has_comparison == (candidate != "float")


@pytest.mark.parametrize(("words", "steps", "is_kept"), [([], 8, True), (["sampler.steps=20"], 20, False)])
def test_noise_levels_of_a_model_hold_for_its_own_number_of_steps(
    words: list[str], steps: int, is_kept: bool
) -> None:
    sampling = make_spec(["model=ltx25", *words]).sampling

    assert (sampling.steps, "sigmas" in sampling.extra) == (steps, is_kept)
    assert sampling.extra["stg_scale"] == 0.0
