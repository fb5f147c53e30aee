"""A file of `--config-dir` describes an experiment and no more: each row is an attack that another file could
make, and each is refused by name.

Most are composed and no more: composing is where a file is checked, and it is before anything is made.
"""

from itertools import pairwise

import pytest
import yaml
from hydra.errors import ConfigCompositionException

from int8run.config.compose import compose_jobs, create_run_spec
from int8run.config.shared_settings import COMMAND_LINE_KEYS, check_settings, matches
from int8run.errors import ConfigError

SAMPLING = "_target_: int8run.models.sampling.Sampling\n"


@pytest.fixture
def compose_file(tmp_path):
    """Write a YAML into a shared folder, and compose with it."""

    def compose_with(file, text, *overrides, multirun=False):
        path = tmp_path / "shared" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        words = ["device=cpu", *overrides]
        return compose_jobs(words, config_dir=str(tmp_path / "shared"), multirun=multirun)[1]

    return compose_with


def globally(text):
    return f"# @package _global_\n{text}\n"


ANYWHERE = {
    # programs, packages and other machines, by a launcher
    "hydra.launcher.runtime_env": "hydra: {launcher: {runtime_env: {py_executable: touch pwned}}}",
    "hydra.launcher.runtime_env.pip": "hydra: {launcher: {runtime_env: {pip: [evil]}}}",
    "hydra.launcher.runtime_env.env_vars.A": "hydra: {launcher: {runtime_env: {env_vars: {A: b}}}}",
    "hydra.launcher.address": "hydra: {launcher: {address: 'evil:6379'}}",
    "hydra.launcher.include_dashboard": "hydra: {launcher: {include_dashboard: true}}",
    "hydra.launcher.folder": "hydra: {launcher: {folder: /tmp/pickles}}",
    "hydra.launcher.extra.mail_user": "hydra: {launcher: {extra: {mail_user: a@evil}}}",
    "hydra.launcher.extra.mail-user": "hydra: {launcher: {extra: {mail-user: a@evil}}}",
    "hydra.launcher.pre_dispatch": "hydra: {launcher: {pre_dispatch: all}}",
    "hydra.launcher._target_": "hydra: {launcher: {_target_: hydra_plugins.int8run.RayCluster}}",
    "hydra.sweeper._target_": "hydra: {sweeper: {_target_: hydra_plugins.int8run.Grid}}",
    # a whole section that is somewhere else
    "hydra.launcher": "hydra: {launcher: '${sampler.extra}'}",
    "hydra.launcher.extra": "hydra: {launcher: {extra: '${sampler.extra}'}}",
    "hydra": "hydra: '${sampler.extra}'",
    "hydra.sweeper.params": "hydra: {sweeper: {params: '${sampler.extra}'}}",
    "tracker": "tracker: '${sampler.extra}'",
    "cache": "cache: '${sampler.extra}'",
    # what hydra itself does
    "hydra.mode": "hydra: {mode: MULTIRUN}",
    "hydra.callbacks.mine._target_": "hydra: {callbacks: {mine: {_target_: pathlib.Path.touch}}}",
    "hydra.job.env_set.A": "hydra: {job: {env_set: {A: b}}}",
    "hydra.job.env_copy.0": "hydra: {job: {env_copy: [HF_TOKEN]}}",
    "hydra.job.chdir": "hydra: {job: {chdir: true}}",
    "hydra.job.name": "hydra: {job: {name: ../../log}}",
    "hydra.verbose": "hydra: {verbose: true}",
    "hydra.runtime.output_dir": "hydra: {runtime: {output_dir: /tmp}}",
    "hydra.help.template": "hydra: {help: {template: x}}",
    # the tracker, the cache and other folders
    "tracker.uri": "tracker: {uri: 'http://evil:5000'}",
    "tracker.folder": "tracker: {folder: /tmp/evil}",
    "cache.folder": "cache: {folder: /tmp/evil}",
    "recipe": "recipe: other.yaml",
    "sync": "sync: outputs",
    "plugins.0": "plugins: [my_package]",
    "task.upload": "task: {upload: true}",
    "task.private": "task: {private: false}",
    "task.repo": "task: {repo: evil/mine}",
    "task.folder": "task: {folder: /home/me}",
    "task.votes.0": "task: {votes: [/home/me/votes.json]}",
    "task.atlas.0": "task: {atlas: [../other]}",
    "metrics.measures.fid.reference": "metrics: {measures: {fid: {reference: /home/me/photos}}}",
    "attention=flash_hub": "attention: flash_hub",
    "attention=_flash_3_HUB": "attention: _flash_3_HUB",
    "hydra.run.dir": "hydra: {run: {dir: /etc}}",
    "hydra.run.dir ": "hydra: {run: {dir: 'a/../../b'}}",
    "hydra.run.dir  ": "hydra: {run: {dir: '${now:../..}'}}",
    "hydra.run.dir   ": "hydra: {run: {dir: '${oc.env:HOME}/x'}}",
    "hydra.run.dir    ": "hydra: {run: {dir: '~/x'}}",
    "hydra.sweep.dir": "hydra: {sweep: {dir: ../x}}",
    "hydra.sweep.subdir": "hydra: {sweep: {subdir: '${hydra.job.override_dirname}'}}",
    "hydra.output_subdir": "hydra: {output_subdir: .ssh}",
    "save": "save: ../../model.safetensors",
    "prompts.path": "prompts: {path: /home/me/notes.txt}",
    "prompts.path ": "prompts: {path: '~/.netrc'}",
    "prompts.path  ": "prompts: {path: .env}",
    "task.path": "task: {path: ../other}",
    "backend.table": "backend: {table: /tmp/table.json}",
    "backend.candidates.triton.table": "backend: {candidates: {triton: {table: /tmp/table.json}}}",
    # passwords of the environment
    "sampler.extra.a": "sampler: {extra: {a: '${oc.env:HF_TOKEN}'}}",
    "sampler.extra.a ": "sampler: {extra: {a: '${oc.env:AWS_SECRET_ACCESS_KEY,none}'}}",
    "sampler.extra.a  ": "sampler: {extra: {a: \"${oc.env:'HF_TOKEN'}\"}}",
    "sampler.extra.a   ": "sampler: {extra: {a: '${oc.env:${sampler.extra.b}}'}}",
    "prompts.prompts.0": "prompts: {prompts: ['${ oc.env : HF_TOKEN }']}",
    "attention": "attention: '${oc.env:HOME}${oc.env:HF_TOKEN}'",
    # a sweep in a file, whose entries are overrides
    "tracker.uri ": "hydra: {sweeper: {params: {tracker.uri: 'http://evil'}}}",
    "tracker.uri  ": "hydra: {sweeper: {params: {++tracker.uri: 'http://a,http://b'}}}",
    "tracker.uri   ": "hydra: {sweeper: {params: {tracker: '{uri: http://evil}'}}}",
    "hydra.launcher.runtime_env ": (
        "hydra: {sweeper: {params: {hydra.launcher.runtime_env: '{pip: [evil]}'}}}"
    ),
    "hydra.launcher ": "hydra: {sweeper: {params: {hydra/launcher: ray_cluster}}}",
    "hydra.job.env_set.A ": "hydra: {sweeper: {params: {+hydra.job.env_set.A: b}}}",
    "hydra.sweeper.params.+sampler.extra.b": (
        "hydra: {sweeper: {params: {+sampler.extra.b: '$\\{oc.env:HF_TOKEN\\}'}}}"
    ),
    "hydra.sweeper.params.sampler.extra.b": (
        "hydra: {sweeper: {params: {sampler.extra.b: '${oc.env:HF_TOKEN}'}}}"
    ),
}


@pytest.mark.parametrize(("key", "text"), ANYWHERE.items(), ids=[key.replace(" ", "+") for key in ANYWHERE])
def test_a_setting_that_a_file_may_not_have_is_refused_by_name(key, text):
    with pytest.raises(ConfigError) as error:
        check_settings(yaml.safe_load(text), "", "x/x.yaml")
    assert str(error.value).startswith(f"x/x.yaml sets {key.strip()}"), error.value
    assert "command line" in str(error.value)


@pytest.mark.parametrize("rule", COMMAND_LINE_KEYS, ids=lambda rule: rule.key)
def test_every_key_of_the_command_line_is_refused_with_its_reason(rule):
    tree = "somewhere"
    for part in reversed(rule.key.split(".")):
        tree = {part: tree}
    with pytest.raises(ConfigError, match=rule.reason):
        check_settings(tree, "", "x/x.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {launcher: {runtime_env: {py_executable: touch pwned}}}",
        "hydra: {mode: MULTIRUN}",
        "sampler: {extra: {a: '${oc.env:HF_TOKEN}'}}",
    ],
)
def test_the_rules_hold_for_a_command(command, text):
    (command.folder / "shared" / "x").mkdir(parents=True)
    (command.folder / "shared" / "x" / "x.yaml").write_text(globally(text))
    before = command.made()
    outcome = command("--config-dir", "shared", "+x=x", "hydra/launcher=ray_cluster", "tracker=none")
    assert outcome.code == 2 and outcome.message.startswith("x/x.yaml sets ")
    assert command.made() == before


OPTIONS = {
    "a launcher of one's own": (
        "hydra/launcher/x.yaml",
        "_target_: hydra_plugins.int8run.RayCluster\nruntime_env: {py_executable: evil}\n",
        ["hydra/launcher=x"],
        "hydra.launcher.runtime_env",
    ),
    "a tracker of one's own": (
        "tracker/x.yaml",
        "_target_: int8run.tracking.mlflow_tracker.MlflowTracker\nuri: http://evil\n",
        ["tracker=x"],
        "tracker.uri",
    ),
    "another place by its first line": (
        "sampler/x.yaml",
        "# @package hydra.launcher\naddress: evil:1\n",
        ["sampler=x"],
        "hydra.launcher.address",
    ),
    "another place by the command line": (
        "sampler/x.yaml",
        "uri: http://evil\n",
        ["+sampler@tracker=x"],
        "tracker.uri",
    ),
    "another place by a defaults list": (
        "x/x.yaml",
        globally("defaults:\n  - /sampler@tracker: y"),
        ["+x=x"],
        "tracker.uri",
    ),
    "the launcher by a defaults list": (
        "x/x.yaml",
        globally("defaults:\n  - override /hydra/launcher: ray_cluster"),
        ["+x=x"],
        "hydra/launcher in its defaults list",
    ),
    "a launcher's file by a defaults list": (
        "x/x.yaml",
        globally("defaults:\n  - /hydra/launcher/ray_cluster"),
        ["+x=x"],
        "hydra/launcher/ray_cluster in its defaults list",
    ),
    "a sampler in the place of the launcher": (
        "x/x.yaml",
        globally("defaults:\n  - /sampler@_global_.hydra.launcher: default"),
        ["+x=x"],
        "sampler in its defaults list",
    ),
    "another hydra group by a launcher": (
        "hydra/launcher/x.yaml",
        "defaults:\n  - basic\n  - /hydra/job_logging: int8run\n",
        ["hydra/launcher=x"],
        "hydra/job_logging in its defaults list",
    ),
}


@pytest.mark.parametrize(("file", "text", "words", "key"), OPTIONS.values(), ids=OPTIONS)
def test_no_place_of_a_file_gets_round_the_rules(compose_file, tmp_path, file, text, words, key):
    (tmp_path / "shared" / "sampler").mkdir(parents=True)
    (tmp_path / "shared" / "sampler" / "y.yaml").write_text("uri: http://evil\n")
    with pytest.raises(ConfigError, match=rf"\.yaml sets {key}[\w.]*; .*command line alone"):
        compose_file(file, text, *words)


@pytest.mark.parametrize(
    "entry", ["override /outlier: ../../outside/secret", "/outlier/../../outside/secret"]
)
def test_a_defaults_list_stays_in_its_folders(compose_file, tmp_path, entry):
    for folder in ("outside", "shared/outlier"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "outside" / "secret.yaml").write_text("a: b\n")
    with pytest.raises(ConfigError, match=r"x/x\.yaml has '.*' in its defaults list; name a group"):
        compose_file("x/x.yaml", globally(f"defaults:\n  - {entry}"), "+x=x")


@pytest.mark.parametrize(
    "text",
    ["defaults: x", "defaults: [1]", "defaults: ['???']", "defaults: [{a: b, c: d}]", "defaults: [{1: b}]"],
)
def test_a_defaults_list_that_is_none_is_one_line(compose_file, text):
    with pytest.raises(ConfigError, match=r"x\.yaml: defaults is .*; it is a list of options"):
        compose_file("x/x.yaml", globally(text), "+x=x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: x", "the config has the key 1, which YAML reads as something else than text"),
        ("true: null", "the config has the key True, which"),
        ("2.5: {a: b}", "the config has the key 2.5, which"),
        ("sampler: {1: 2}", "sampler has the key 1, which"),
    ],
)
def test_a_setting_whose_name_is_no_text_is_refused(compose_file, text, message):
    with pytest.raises(ConfigError, match=message):
        compose_file("x/x.yaml", globally(text), "+x=x")


def test_a_file_brings_no_further_folders(compose_file):
    with pytest.raises(ConfigCompositionException, match=r"hydra\.searchpath is only supported"):
        compose_file("x/x.yaml", globally("hydra: {searchpath: ['pkg://evil']}"), "+x=x")


# -- what a file may do ------------------------------------------------------------------------------------

ALLOWED = {
    "plain settings of a launcher": (
        "hydra/launcher/x.yaml",
        "defaults: [slurm, _self_]\npartition: gpu\ntime_min: 5\nextra: {account: vision}\n",
        ["hydra/launcher=x"],
    ),
    "a copy of a launcher": (
        "hydra/launcher/x.yaml",
        "_target_: hydra_plugins.int8run.RayCluster\n"
        "address: null\nruntime_env: null\ninclude_dashboard: false\n",
        ["hydra/launcher=x"],
    ),
    "a copy of the tracker": (
        "tracker/x.yaml",
        "_target_: int8run.tracking.mlflow_tracker.MlflowTracker\n"
        "uri: ${oc.env:MLFLOW_TRACKING_URI,null}\nexperiment: mine\nfolder: .\n",
        ["tracker=x"],
    ),
    "variables without a password": (
        "sampler/x.yaml",
        SAMPLING + "extra: {a: '${oc.env:USER,me}'}\n",
        ["sampler=x"],
    ),
    "folders below": (
        "x/x.yaml",
        globally(
            "save: out/x.safetensors\nhydra: {run: {dir: 'mine/${now:%Y-%m-%d}/${now:%H-%M-%S}'}, "
            "sweep: {subdir: 'job${hydra.job.num}'}, output_subdir: .hydra}"
        ),
        ["+x=x"],
    ),
    "options of our groups": (
        "x/x.yaml",
        globally("defaults:\n  - override /outlier: convrot\n  - override /lora: stack_a\nseed: 3"),
        ["+x=x"],
    ),
    "a hub id, a size and a scheduler": (
        "x/x.yaml",
        globally(
            "model: {location: org/model, revision: main}\n"
            "sampler: {scheduler_settings: {shift: 3.0}, extra: {negative_prompt: blurry}}"
        ),
        ["+x=x"],
    ),
}


@pytest.mark.parametrize(("file", "text", "words"), ALLOWED.values(), ids=ALLOWED)
def test_a_file_may_describe_an_experiment(compose_file, file, text, words):
    (config,) = compose_file(file, text, *words)
    create_run_spec(config)


def test_a_sweep_may_stand_in_a_file(compose_file):
    text = globally("hydra: {sweeper: {params: {seed: '0,1', +sampler.extra.a: '\"x y\",z'}}}")
    configs = compose_file("x/x.yaml", text, "+x=x", multirun=True)
    assert [(config.seed, config.sampler.extra.a) for config in configs] == [
        (0, "x y"),
        (0, "z"),
        (1, "x y"),
        (1, "z"),
    ]


COMMAND_LINE = [
    "tracker.uri=http://mine:5000",
    "cache.folder=/tmp/x",
    "attention=flash_hub",
    "+sampler.extra.a='${oc.env:HF_TOKEN,none}'",
    "hydra.run.dir=/tmp/x",
]


def test_the_command_line_may_have_all_of_it(compose_file):
    launcher = [
        "hydra/launcher=ray_cluster",
        "hydra.launcher.address=head:1",
        "hydra.launcher.runtime_env={pip: [x], env_vars: {A: b}}",
    ]
    (config,) = compose_file("x/x.yaml", globally("seed: 1"), "+x=x", *COMMAND_LINE, *launcher)
    spec = create_run_spec(config)
    assert (spec.tracker.uri, spec.attention) == ("http://mine:5000", "flash_hub")
    assert config.hydra.launcher.runtime_env == {"pip": ["x"], "env_vars": {"A": "b"}}


def test_patterns_match_one_part_and_at_the_end_all():
    assert matches("a.*.c", "a.b.c") and not matches("a.*.c", "a.c") and not matches("a.*.c", "a.b.b.c")
    assert matches("a.*", "a.b") and matches("a.*", "a.b.c") and not matches("a.*", "a")


# -- what a file may be ------------------------------------------------------------------------------------

LETTERS = "abcdefghij"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{inner}'] * 9)}]\n" for inner, name in pairwise(LETTERS)
)
TEXTS = {
    "aliases of aliases": (BOMB, "stands for more than 20,000 values"),
    "merged aliases": (BOMB + "z: {<<: *j}\n", "stands for more than 20,000 values"),
    "an alias in itself": ("a: &a [*a]\n", r"\*a stands inside of &a"),
    "an unknown alias": ("a: *b\n", "which does not stand before it"),
    "too deep": ("a: " + "[" * 2000 + "]" * 2000, "more than 40 mappings and lists"),
    "deep by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)),
        "more than 40 mappings and lists",
    ),
    "a Python object": ("a: !!python/object/apply:os.system [touch pwned]\n", "has the YAML tag"),
    "a set": ("a: !!set {x, y}\n", "has the YAML tag"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "cannot be read as YAML: .*digits"),
    "large": ("a: " + "x" * 2_000_001, "has 2,000,004 characters"),
    "not UTF-8": ("a: é", "is not UTF-8 text"),
    "no YAML": ("a: [1\n", "line 2: this is not YAML"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_config_is_refused_at_once(tmp_path, text, message):
    (tmp_path / "x").mkdir()
    encoding = "latin-1" if "é" in text else "utf-8"
    (tmp_path / "x" / "x.yaml").write_text(text, encoding=encoding)
    with pytest.raises(ConfigError, match=rf"x\.yaml.*{message}"):
        compose_jobs(["+x=x"], config_dir=str(tmp_path))


def test_a_thousand_prompts_in_a_file_are_no_bomb(compose_file):
    prompts = "".join(f"  - prompt number {number}\n" for number in range(1000))
    text = f"_target_: int8run.generate.prompts.PromptSet\nprompts:\n{prompts}"
    (config,) = compose_file("prompts/x.yaml", text, "prompts=x")
    assert len(create_run_spec(config).prompts.prompts) == 1000
