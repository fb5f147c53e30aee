"""Every setting that takes a mapping takes any key, as one value or key by key."""

import dataclasses
import typing
from collections.abc import Mapping

import pytest
from hydra.utils import get_class

from int8run.config.allowed_classes import list_own_classes
from int8run.config.compose import compose_jobs, create_run_spec
from int8run.config.open_mappings import OPEN_MAPPINGS
from int8run.errors import ConfigError
from int8run.jobs.hydra_plugins import POOL_CLASSES


def compose_one(*words):
    (config,) = compose_jobs(["device=cpu", *words])[1]
    return config


OPTIONS = ["model=hidream", "lora=stack_a", "outlier=auto", "hydra/launcher=ray_cluster"]
# the others belong to options that cannot be chosen together with these
MAPPINGS = [pattern.replace("*", "0") for pattern in OPEN_MAPPINGS if pattern != "hydra.launcher.extra"]


def read(config, key):
    for part in key.split("."):
        config = config[int(part) if part.isdigit() else part]
    return config


@pytest.mark.parametrize(
    "words",
    [
        [key + "={anything: 3.0}" for key in MAPPINGS],
        [key + ".anything=3.0" for key in MAPPINGS],
        ["+sampler.extra.anything=3.0", "++lora.adapters.0.path.anything=3.0"],
    ],
    ids=["whole", "key by key", "added"],
)
def test_a_mapping_takes_any_key(words):
    config = compose_one(*OPTIONS, *words)
    for word in words:
        key = word.lstrip("+").partition("=")[0].removesuffix(".anything")
        assert read(config, key)["anything"] == 3.0, word


def test_options_of_sbatch_are_a_mapping():
    config = compose_one("hydra/launcher=slurm", "hydra.launcher.extra.account=vision")
    assert config.hydra.launcher.extra == {"account": "vision"}


def test_the_keys_that_stand_there_stay():
    config = compose_one("model=qwen_image", "model.sampling.extra={negative_prompt: blurry}")
    assert config.model.sampling.extra == {"true_cfg_scale": 4.0, "negative_prompt": "blurry"}


def test_another_value_takes_the_place_of_the_mapping():
    assert compose_one("int8.checkpoint=a.safetensors").int8.checkpoint == "a.safetensors"
    assert compose_one("lora=stack_a", "lora.adapters.0.path=ink").lora.adapters[0].path == "ink"


def test_the_mappings_of_a_sweep(tmp_path):
    words = ["device=cpu", "sampler.scheduler_settings={shift: 1.0},{shift: 3.0}"]
    configs = compose_jobs(words, multirun=True)[1]
    assert [create_run_spec(config).sampler.scheduler_settings for config in configs] == [
        {"shift": 1.0},
        {"shift": 3.0},
    ]


def test_a_misspelled_setting_is_still_found():
    for word in ("sampler.extras.a=1", "sampler.step=3", "lora.adapters={a: 1}"):
        with pytest.raises(Exception, match=r"Could not override|Error merging"):
            compose_one("lora=stack_a", word)


def test_a_key_that_needs_a_mapping_says_so():
    with pytest.raises(ConfigError, match=r"sampler\.extra is 3; it takes names and values"):
        create_run_spec(compose_one("sampler.extra=3"))


def takes_mapping(hint):
    parts = typing.get_args(hint)
    return typing.get_origin(hint) is Mapping or any(
        takes_mapping(part) for part in parts if typing.get_origin(hint) is not tuple
    )


def test_no_setting_that_takes_a_mapping_is_forgotten():
    """By the types of the classes that the options name."""
    classes = [get_class(name) for name in sorted(list_own_classes()) if name[name.rindex(".") + 1].isupper()]
    names = {pattern.rpartition(".")[2] for pattern in OPEN_MAPPINGS}
    missing = []
    for cls in [*classes, *POOL_CLASSES]:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            is_mapping = Mapping in (typing.get_origin(part) for part in (hint, *typing.get_args(hint)))
            if field.init and is_mapping and field.name not in names:
                missing.append(f"{cls.__name__}.{field.name}")
    assert missing == []
