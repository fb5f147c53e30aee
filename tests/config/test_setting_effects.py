"""What each setting affects: declared at its field, and equal to what the hand-written keys of 0.1 said."""

import random
from dataclasses import dataclass, field, fields, replace

import pytest
from support.run_job import make_spec

from int8run.config.effects import BUILD, METADATA_KEY, NOTHING, Effects, affects, make_settings_key
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError

# -- declarations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", fields(RunSpec), ids=lambda setting: setting.name)
def test_every_setting_declares_what_it_affects(setting):
    assert isinstance(setting.metadata.get(METADATA_KEY), Effects)


@dataclass(frozen=True)
class Settings:
    size: int = field(metadata=BUILD)
    title: str = field(metadata=NOTHING)
    seed: int = field(metadata=affects(build=lambda settings: settings.seed % 2, float_baseline=True))


def test_a_key_has_what_counts_of_each_setting():
    settings = Settings(size=3, title="x", seed=5)

    assert make_settings_key(settings, "build") == "size=3, seed=1"
    assert make_settings_key(settings, "float_baseline") == "seed=5"


def test_a_setting_without_a_declaration_is_an_error():
    @dataclass(frozen=True)
    class Forgotten:
        size: int

    with pytest.raises(KeyError, match=METADATA_KEY):
        make_settings_key(Forgotten(3), "build")


# -- the keys of release 0.1 --------------------------------------------------------------------------


def old_float_key(spec):
    stack = spec.lora
    loras = [(a.get_source(spec.model.lora_base), a.components, a.schedule) for a in stack.adapters]
    strengths = (stack.strength, stack.text_strengths, stack.strict, spec.lora_dir)
    return repr((spec.model, spec.sampling, loras, strengths, spec.compile, spec.attention, spec.device))


def old_build_key(spec):
    stack = spec.lora
    adapters = [(a.name, a.get_source(spec.model.lora_base), a.components) for a in stack.adapters]
    strengths = stack.strengths if stack.is_baked else stack.is_scheduled
    integers = spec.int8.checkpoint is not None or not spec.needs_float_denoiser
    rounds = stack.adapters and (stack.mode == "stochastic" or (stack.mode == "auto" and integers))
    lora = (
        stack.mode,
        strengths,
        stack.strict,
        spec.lora_dir,
        stack.max_overhead,
        spec.seed if rounds else None,
        adapters,
    )
    sampling = spec.sampling
    shape = (sampling.height, sampling.width, sampling.batch)
    calibration = (spec.calibration, sampling, spec.quality_db) if spec.needs_calibration else None
    parts = (
        spec.needs_float_denoiser,
        spec.needs_float_encoders,
        spec.model,
        spec.model_type,
        spec.int8,
        spec.outlier,
        spec.rounding,
        calibration,
        spec.save,
        spec.backend,
        lora,
        spec.clip,
        spec.compile,
        spec.attention,
        spec.offload,
        spec.device,
        shape,
        spec.has_step_cache and spec.compile != "none",  # not of 0.1
    )
    return repr(parts)


# where to start: together they take every branch of the keys
BASES = {
    "defaults": [],
    "a stack": ["lora=stack_a"],
    "a baked stack": ["lora=stack_a", "lora.mode=bake"],
    "a stochastic stack": ["lora=stack_a", "lora.mode=stochastic"],
    "a stack on integers": ["lora=stack_a", "metrics.baseline=none"],
    "a stack on a checkpoint": ["lora=stack_a", "int8.checkpoint=m.safetensors"],
    "a schedule": ["lora=stack_a", "lora.adapters.0.strength=[[0,1],[0.5,0]]"],
    "a calibration": ["outlier=smoothquant"],
    "mixed precision": ["model_type.mixed_precision=auto", "quality_db=40"],
    "float": ["int8.enable=false"],
    "text encoders": ["clip=nvfp4"],
    "text encoders without a baseline": ["clip=nvfp4", "metrics.baseline=none"],
    "few steps": ["lora=lcm"],
    "a step cache": ["cache_steps=first_block"],
    "another rounding": ["rounding=mse"],
    "another backend": ["backend=reference"],
    "offloading": ["metrics.baseline=none", "offload=model"],
}
# (settings path, value): one of each kind that a setting can have
CHANGES = [
    ("model.dtype", "bfloat16"),
    ("model.revision", "v2"),
    ("model_type.name", "other"),
    ("int8.small_batch_fallback", "never"),
    ("int8.checkpoint", "other.safetensors"),
    ("int8.enable", False),
    ("calibration.seed", 5),
    ("calibration.num_timesteps", 2),
    ("lora.strength", 0.5),
    ("lora.strict", False),
    ("lora.mode", "bake"),
    ("lora.mode", "dynamic"),
    ("lora.max_overhead", 0.1),
    ("lora.insert_triggers", True),
    ("lora.adapters", ()),
    ("clip.kernel_backend", "dequantize"),
    ("sampler.steps", 3),
    ("sampler.height", 64),
    ("sampler.batch", 2),
    ("sampler.guidance", 2.0),
    ("prompts.seeds_per_prompt", 2),
    ("metrics.baseline", "none"),
    ("metrics.baseline", "cached"),
    ("metrics.layers", False),
    ("cache.limit_gb", 1.0),
    ("save", "m.safetensors"),
    ("lora_dir", "loras"),
    ("compile", "blocks"),
    ("attention", "flash"),
    ("seed", 9),
    ("device", "cuda"),
    ("progress", False),
    ("resume", True),
    ("sync", "elsewhere"),
]


def change(spec, path, value):
    """The spec with one other setting; None where the settings do not go together."""
    group, _, key = path.partition(".")
    try:
        new = replace(getattr(spec, group), **{key: value}) if key else value
        return replace(spec, **{group: new})
    except ConfigError:
        return None


@pytest.fixture(scope="module")
def specs():
    """Some hundred specs: every base with each change, and with a few random pairs of changes."""
    draw = random.Random(0)
    made = []
    for overrides in BASES.values():
        base = make_spec(overrides)
        once = [changed for path, value in CHANGES if (changed := change(base, path, value)) is not None]
        twice = [
            changed
            for spec in once
            for path, value in draw.sample(CHANGES, 3)
            if (changed := change(spec, path, value)) is not None
        ]
        made += [base, *once, *twice]
    return made


@pytest.mark.parametrize(
    ("new", "old"),
    [(lambda spec: spec.build_key, old_build_key), (lambda spec: spec.float_key, old_float_key)],
    ids=["build", "float"],
)
def test_keys_are_equal_exactly_where_they_were(specs, new, old):
    new_keys, old_keys = [new(spec) for spec in specs], [old(spec) for spec in specs]

    pairs = set(zip(new_keys, old_keys, strict=True))

    assert len(specs) > 500 and 20 < len(set(new_keys)) < len(specs)
    assert len(pairs) == len(set(new_keys)) == len(set(old_keys)), "one new key for one old key"


def test_the_changes_reach_every_setting_that_counts():
    changed = {path.partition(".")[0] for path, _ in CHANGES}
    options = {override.partition("=")[0].partition(".")[0] for base in BASES.values() for override in base}

    counting = {setting.name for setting in fields(RunSpec) if setting.metadata[METADATA_KEY] != Effects()}

    assert counting <= changed | options
