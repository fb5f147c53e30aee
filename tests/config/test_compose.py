"""Every option that ships composes and becomes a RunSpec, says what it is, and stands on the help page."""

import functools
import re

import pytest
import yaml
from hydra import compose, initialize_config_module
from support.helpers import CONF
from support.tiers import slow_except

from int8run.config.compose import compose_jobs, create_run_spec, int8run_options
from int8run.config.help import Setting, parse_settings, read_description, render_help
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.models.family import AutoFamily, load_families, read_model_options
from int8run.quant.formats import FORMATS

FILES = sorted(CONF.rglob("*.yaml"))
METRIC_FILES = [file for file in FILES if file.parent.name == "metric"]
OPTIONS = [
    tuple(f.relative_to(CONF).with_suffix("").as_posix().rsplit("/", 1))
    for f in FILES
    if f.parent != CONF and f not in METRIC_FILES  # metrics.perceptual names those, no group chooses one
]
GROUPS = sorted({group for group, _ in OPTIONS if not group.startswith("hydra/")})
ROOT = yaml.safe_load((CONF / "config.yaml").read_text())
# settings without which an option is refused, by design
NEEDS = {
    "prompts=file": ["prompts.path=some.txt"],
    "lora=file": ["lora.adapters.0.path=some.safetensors"],
    "clip=nvfp4_modelopt": ["clip.path=some.safetensors"],
    "clip=mxfp8_rows": ["clip.path=some.safetensors"],
    "lora=turbo": ["model=flux"],
    "lora=hyper": ["model=flux"],
}


def composed(*overrides):
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
        return compose("config", ["device=cpu", *overrides], return_hydra_config=True)


def as_id(option):
    return "=".join(option)


def find_daily_options():
    """All but those of `model`, of which there are many of a kind: one of each family."""
    families = {}
    for name, option in read_model_options().items():
        families.setdefault(option.family, name)
    return [(o,) for o in OPTIONS if o[0] != "model" or o[1] in families.values()]


@functools.cache
def spec_of(option):
    """The RunSpec with an option and what it needs."""
    return create_run_spec(composed(as_id(option), *NEEDS.get(as_id(option), [])))


def test_the_walk_finds_the_options():
    assert {("task", "run"), ("model", "tiny"), ("hydra/job_logging", "int8run")} <= set(OPTIONS)
    assert set(GROUPS) == {
        group
        for default in ROOT["defaults"]
        if isinstance(default, dict)
        for group in default
        if " " not in group
    }


@pytest.mark.parametrize("option", slow_except(find_daily_options(), [(o,) for o in OPTIONS]), ids=as_id)
def test_every_option_becomes_a_run_spec(option):
    group, name = option
    spec = spec_of(option)
    assert isinstance(spec, RunSpec)
    if group in GROUPS:
        # a YAML without _target_ stays a dict and fails much later, in the middle of a run
        assert type(getattr(spec, group)).__module__.startswith("int8run."), (
            f"{group}={name} names no class of int8run"
        )


def test_every_metric_that_ships_can_be_asked_for():
    names = [file.stem for file in METRIC_FILES]

    spec = create_run_spec(composed(f"metrics.perceptual=[{','.join(names)}]"))

    assert {name: measure.name for name, measure in spec.metrics.measures.items()} == {
        name: name for name in names
    }


@pytest.mark.parametrize(
    "option",
    [o for o in OPTIONS if o[0] in ("backend", "outlier", "rounding", "clip", "model_type")],
    ids=as_id,
)
def test_an_option_and_its_class_use_the_same_word(option):
    group, name = option
    chosen = getattr(spec_of(option), group)
    assert (chosen.format if group == "clip" else chosen.name) == name


@pytest.mark.parametrize("option", NEEDS)
def test_the_options_that_need_a_value_need_it(option):
    message = (
        r"(prompts|lora\.adapters\.0)\.path=<|has no source for base "
        r"model 'tiny'; it has one for flux|, or set clip\.path$"
    )
    with pytest.raises(ConfigError, match=message):
        create_run_spec(composed(option))


def test_auto_family_knows_every_family():
    families = {name for group, name in OPTIONS if group == "model_type"} - {"auto", "none"}
    assert create_run_spec(composed("model_type=auto")).model_type == AutoFamily()
    assert {key: family.name for key, family in load_families().items()} == {name: name for name in families}


def test_every_model_names_a_family_that_there_is():
    families = {name: option.family for name, option in read_model_options().items()}

    assert families.pop("tiny") is None, (
        "the tiny model's settings are used for models of any family in tests"
    )
    assert set(families.values()) <= set(load_families())


def test_a_model_may_choose_its_lora_and_prompts():
    chosen = composed("model=tiny_edit")
    asked_for = composed("model=tiny_edit", "lora=none", "prompts=tiny")

    choices, asked_choices = chosen.hydra.runtime.choices, asked_for.hydra.runtime.choices
    assert (choices["lora"], choices["prompts"]) == ("edit", "tiny_edit")
    assert (asked_choices["lora"], asked_choices["prompts"]) == ("none", "tiny")
    assert [adapter.name for adapter in create_run_spec(chosen).lora.adapters] == ["edit"]
    assert not create_run_spec(asked_for).lora.adapters
    assert composed("model=tiny").hydra.runtime.choices["lora"] == "none"


def test_a_sweep_over_models_gives_each_its_own_lora():
    _, configs = compose_jobs(["device=cpu", "model=tiny,tiny_edit"], multirun=True)

    assert [len(config.lora.adapters) for config in configs] == [0, 1]


def test_a_family_of_the_users_own_is_chosen_by_its_name(tmp_path):
    (tmp_path / "model_type").mkdir()
    rows = "ignore:\n  - { pattern: head, reason: final projection }\ninputs:\n  'blocks.*.to_k': 64\n"
    (tmp_path / "model_type" / "mine.yaml").write_text(
        f"_target_: int8run.models.family.ModelFamily\nname: mine\n{rows}"
    )
    _, (config,) = compose_jobs(["device=cpu", "model_type=mine"], config_dir=str(tmp_path))
    family = create_run_spec(config).model_type
    assert family.find_skip_reason("head") == "final projection" and family.inputs == {"blocks.*.to_k": 64}


def test_auto_backend_tries_every_backend():
    backends = {name for group, name in OPTIONS if group == "backend"} - {"auto"}
    auto = create_run_spec(composed("backend=auto")).backend
    assert {key: backend.name for key, backend in auto.candidates.items()} == {
        name: name for name in backends - {"reference", "float"}
    }
    assert auto.last_resort.name == "reference"


def test_every_format_of_text_encoders_is_an_option():
    assert {name for group, name in OPTIONS if group == "clip"} == {"keep", "auto", *FORMATS}


def test_auto_outlier_tries_every_method_and_the_plainest_first():
    methods = {name for group, name in OPTIONS if group == "outlier"} - {"auto"}
    candidates = create_run_spec(composed("outlier=auto")).outlier.candidates
    assert {method.name for method in candidates.values()} == methods and next(iter(candidates)) == "none"
    assert len({repr(method) for method in candidates.values()}) == len(candidates), (
        "the same candidate twice"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(CONF).as_posix())
def test_every_file_begins_with_what_it_is(file):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @")]
    assert re.match(r"# \S+ \S+", lines[0]), f"{file} does not begin with a description"
    assert read_description(file) == lines[0].removeprefix("# ")
    assert not lines[1].startswith("#"), f"{file}: the help page shows one line, the description has more"


def uncommented(text):
    """Keys with a value but without a comment beside or above them; parts that explain themselves by the key
    above are left out.
    """
    missing, above, path = [], "", []
    for line in text.splitlines():
        found = re.match(r"^(?P<indent> *)(?P<key>[a-z_]\w*):(?P<rest>.*)$", line)
        if found:
            path = [*path[: len(found["indent"]) // 2], found["key"]]
            explained = {
                "ignore",
                "deferred_gelu",
                "deferred_norms",
                "fingerprints",
                "adapters",
                "sampling",
                "candidates",
                "defaults",
                "hydra",
            }
            inner = explained & {*path[:-1]} or path[0] in ("defaults", "hydra")
            value = found["rest"].strip()
            if (
                value
                and "# " not in value
                and not above.startswith("#")
                and found["key"] != "_target_"
                and not inner
            ):
                missing.append(".".join(path))
        above = line.strip()
    return missing


@pytest.mark.parametrize(
    "file", [f for f in FILES if "hydra" not in f.parts], ids=lambda f: f.relative_to(CONF).as_posix()
)
def test_every_key_has_a_comment(file):
    assert uncommented(file.read_text()) == []


def test_uncommented_keys_are_found():
    text = (
        "# what\n_target_: a.B\nx: 1\n# why\ny: 2\nz: [a, b] # list\nsub:\n  deep: 3\nsampling:\n  steps: 4\n"
    )
    assert uncommented(text) == ["x", "sub.deep"]


@pytest.mark.parametrize("group", GROUPS)
def test_help_of_a_group_names_every_option_with_its_description(group):
    page = render_help(group)
    default = next(d[group] for d in ROOT["defaults"] if group in d)

    assert page.startswith(f"{group}=OPTION (default: {default})\n")
    rows = re.findall(r"^  (\w+) +(.*(?:\n {18,}.*)*)$", page.partition("\nSettings")[0], flags=re.MULTILINE)
    descriptions = {name: " ".join(text.split()) for name, text in rows}
    assert descriptions == {
        name: " ".join(read_description(CONF / group / f"{name}.yaml").split())
        for g, name in OPTIONS
        if g == group
    }
    assert rows[0][0] == default, "the default comes first"


def test_help_is_a_screen_wide_and_the_overview_a_screen_long():
    overview = render_help()
    assert len(overview.splitlines()) <= 60
    for group in GROUPS:
        assert f"\n  {group}=" in overview, f"{group} is not on the first page"
    assert max(len(line) for line in render_help("all").splitlines()) <= 120


def top_level_keys():
    """`seed`, `int8.enable`, ...: what config.yaml itself sets."""
    own = {key: value for key, value in ROOT.items() if key not in ("defaults", "hydra", "_target_")}
    nested = [
        f"{key}.{inner}"
        for key, value in own.items()
        if isinstance(value, dict)
        for inner in value
        if inner != "_target_"
    ]
    return [key for key, value in own.items() if not isinstance(value, dict)] + nested


@pytest.mark.parametrize("key", top_level_keys())
def test_help_names_every_top_level_key_with_its_default(key):
    value = ROOT
    for part in key.split("."):
        value = value[part]
    shown = (
        {True: "true", False: "false", None: "null"}.get(value, value)
        if value is None or isinstance(value, bool)
        else value
    )
    shown = f"[{', '.join(value)}]" if isinstance(value, list) else shown
    section = key.partition(".")[0] if "." in key else None
    page = " ".join(render_help(section).split())
    found = re.search(rf"(?:^| ){re.escape(f'{key}={shown}')} (\S+)", page)
    assert found and "=" not in found[1], "no description"


def test_help_shows_nested_keys_with_their_path():
    text = "# a thing\nouter:\n  inner: 1 # how many\nbare: 2\nhydra:\n  x: 3 # no\n"

    assert parse_settings(text, prefix="g.") == [Setting("g.outer.inner", value="1", comment="how many")]
