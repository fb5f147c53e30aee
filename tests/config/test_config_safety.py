"""A shared YAML may not run code: whatever a config could make hydra call is refused before anything is
instantiated.

Every attack here would create a file if it got through, with functions that hydra itself does not block.
"""

import pickle
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from int8run.config.config_safety import check_targets
from int8run.errors import ConfigError

# what hydra would call: creates the file `pwned` in the working folder
TOUCH = "{_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: [pwned]}]}"
INNER_TOUCH = TOUCH.replace("pathlib.", "int8run.cli.")
SAMPLING = "_target_: int8run.models.sampling.Sampling\n"
LAZY_FILE = "logging.handlers.WatchedFileHandler, filename: pwned"  # opens its file at once


@pytest.fixture
def attack(command):
    """Put a YAML into the user's folder, run it, and see what became of it."""

    def run(file, text, *arguments):
        path = command.folder / "shared" / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
        before = command.made()
        outcome = command(
            "--config-dir", "shared", "tracker=none", "prompts=file", "prompts.path=absent.txt", *arguments
        )
        assert not (command.folder / "pwned").exists(), "the config ran its code"
        return outcome, [made for made in command.made() if made not in before]

    return run


def globally(text):
    return f"# @package _global_\n{text}\n"


FOREIGN = {
    "the option itself": ("outlier/x.yaml", "_target_: os.system\ncommand: touch pwned\n", ["outlier=x"]),
    "a function that hydra allows": (
        "outlier/x.yaml",
        f"_target_: int8run.outlier.convrot.ConvRot\ngroup_size: {TOUCH}\n",
        ["outlier=x"],
    ),
    "in a list": (
        "lora/x.yaml",
        (
            f"_target_: int8run.lora.config.LoraSettings\nadapters: "
            f"[{{_target_: int8run.lora.config.Adapter, name: a, path: {TOUCH}}}]\n"
        ),
        ["lora=x"],
    ),
    "in a mapping of anything": (
        "sampler/x.yaml",
        f"{SAMPLING}extra: {{deep: [{{er: {TOUCH}}}]}}\n",
        ["sampler=x"],
    ),
    "in the calibration": ("x/x.yaml", globally(f"calibration: {{prompts: [{TOUCH}]}}"), ["+x=x"]),
    "calibration itself": ("x/x.yaml", globally("calibration: {_target_: os.system}"), ["+x=x"]),
    "candidate of an automatic method": (
        "outlier/x.yaml",
        f"_target_: int8run.outlier.auto.AutoOutlier\ncandidates: {{none: {TOUCH}}}\n",
        ["outlier=x"],
    ),
    "rounding": ("rounding/x.yaml", "_target_: os.system\ncommand: touch pwned\n", ["rounding=x"]),
    "whole task": ("x/x.yaml", globally("task: " + TOUCH), ["+x=x"]),
    "callback": ("x/x.yaml", globally(f"hydra: {{callbacks: {{mine: {TOUCH}}}}}"), ["+x=x"]),
    "launcher": (
        "hydra/launcher/x.yaml",
        "_target_: os.system\ncommand: touch pwned\n",
        ["hydra/launcher=x", "-m"],
    ),
    "sweeper": (
        "hydra/sweeper/x.yaml",
        "_target_: os.system\ncommand: touch pwned\n",
        ["hydra/sweeper=x", "-m"],
    ),
    "target by reference": (
        "x/x.yaml",
        globally("attention: pathlib.Path.touch\noutlier: {_target_: '${attention}'}"),
        ["+x=x"],
    ),
    "prefix without the dot": ("outlier/x.yaml", "_target_: int8runner.Evil\n", ["outlier=x"]),
    # names that begin with int8run. and are someone else's
    "module imported by ours": (
        "outlier/x.yaml",
        "_target_: int8run.cli.os.system\ncommand: touch pwned\n",
        ["outlier=x"],
    ),
    "class imported by ours": ("sampler/x.yaml", f"{SAMPLING}extra: {{a: {INNER_TOUCH}}}\n", ["sampler=x"]),
    "function of ours": (
        "sampler/x.yaml",
        SAMPLING
        + "extra: {a: {_target_: int8run.report.run_files.write_json, data: 1, "
        + "path: {_target_: int8run.cli.Path, _args_: [pwned]}}}\n",
        ["sampler=x"],
    ),
    # targets that are there only after hydra has resolved the config
    "made by a resolver": (
        "x/x.yaml",
        globally(f'sampler: {{extra: {{a: "${{oc.create:{TOUCH}}}"}}}}'),
        ["+x=x"],
    ),
    "resolver named by another": (
        "x/x.yaml",
        globally(f'sampler: {{extra: {{name: create, a: "${{oc.${{.name}}:{TOUCH}}}"}}}}'),
        ["+x=x"],
    ),
    "callback made by a resolver": (
        "x/x.yaml",
        globally(f'hydra: {{callbacks: {{mine: "${{oc.create:{TOUCH}}}"}}}}'),
        ["+x=x"],
    ),
    "override in a sweep file": (
        "x/x.yaml",
        globally(f'hydra: {{sweeper: {{params: {{+sampler.extra.a: "{TOUCH}"}}}}}}'),
        ["+x=x", "-m"],
    ),
    "target in a sweep file": (
        "x/x.yaml",
        globally("hydra: {sweeper: {params: {task._target_: os.system, +task.command: touch pwned}}}"),
        ["+x=x", "-m"],
    ),
}


@pytest.mark.parametrize(("file", "text", "arguments"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_target_is_refused_before_anything_starts(attack, file, text, arguments):
    outcome, made = attack(file, text, *arguments)
    rules = "a config may only name classes of int8run|it comes from the command line alone"
    assert outcome.code == 2 and re.search(rules, outcome.message)
    assert made == [], "a job was started"


LOGGING = {
    "handler class": f"handlers: {{x: {{class: {LAZY_FILE}}}}}",
    "handler factory": f"handlers: {{x: {{(): {LAZY_FILE}}}}}",
    # with a format of its own choosing it could write a line into a shell's start-up file
    "file outside the output folder": "handlers: {x: {class: logging.FileHandler, filename: pwned}}",
    "formatter factory": "formatters: {x: {(): pathlib.Path.touch, self: pwned}}",
    "formatter class": "formatters: {x: {class: os.system}}",
    "filter factory": "filters: {x: {(): pathlib.Path.touch, self: pwned}}",
    "stream of another module": "handlers: {x: {class: logging.StreamHandler, stream: 'ext://os.environ'}}",
    "reference into the config": "handlers: {x: {class: logging.StreamHandler, stream: 'cfg://handlers'}}",
    "handler made by a resolver": f'handlers: {{x: "${{oc.create:{{class: {LAZY_FILE}}}}}"}}',
    "handler from elsewhere": "handlers: {x: '${sampler.extra.handler}'}",
}


@pytest.mark.parametrize("text", LOGGING.values(), ids=LOGGING)
@pytest.mark.parametrize("part", ["job_logging", "hydra_logging"])
def test_a_log_handler_that_runs_code_is_refused(attack, part, text):
    elsewhere = f"sampler: {{extra: {{handler: {{class: {LAZY_FILE}}}}}}}\n"
    outcome, made = attack("x/x.yaml", globally(elsewhere + f"hydra: {{{part}: {{{text}}}}}"), "+x=x")
    assert outcome.code == 2 and f"hydra.{part}." in outcome.message and "limited to" in outcome.message
    assert made == [], "a job was started"


@pytest.mark.parametrize("part", ["job_logging", "hydra_logging"])
def test_a_whole_logging_section_from_elsewhere_is_refused(attack, part):
    section = f"{{version: 1, root: {{level: INFO, handlers: [x]}}, handlers: {{x: {{class: {LAZY_FILE}}}}}}}"
    outcome, made = attack(
        "x/x.yaml",
        globally(f"sampler: {{extra: {{log: {section}}}}}\nhydra: {{{part}: '${{sampler.extra.log}}'}}"),
        "+x=x",
    )
    assert outcome.code == 2 and f"sets hydra.{part}; " in outcome.message and made == []


# git, which a run asks for the revision, runs whatever GIT_CONFIG_* names
GIT = "{GIT_CONFIG_COUNT: '1', GIT_CONFIG_KEY_0: core.fsmonitor, GIT_CONFIG_VALUE_0: touch pwned}"
ENVIRONMENT = {
    "written": f"hydra: {{job: {{env_set: {GIT}}}}}",
    "from elsewhere": (
        f"hydra: {{job_logging: {{unused: {GIT}}}, job: {{env_set: '${{hydra.job_logging.unused}}'}}}}"
    ),
}


@pytest.mark.parametrize("text", ENVIRONMENT.values(), ids=ENVIRONMENT)
def test_a_config_may_not_set_environment_variables(attack, text):
    outcome, made = attack("x/x.yaml", globally(text), "+x=x")
    assert outcome.code == 2 and "hydra.job.env_set" in outcome.message and made == []


@pytest.mark.parametrize("flag", ["--config-path", "-cp"])
def test_another_root_config_is_checked_too(command, flag):
    folder = command.folder / "shared"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"hydra: {{callbacks: {{mine: {TOUCH}}}}}\n")
    outcome = command(flag, str(folder))
    assert not (command.folder / "pwned").exists(), "the config ran its code"
    assert outcome.code == 2 and outcome.message


def test_another_root_config_by_name_starts_nothing(attack):
    outcome, made = attack(
        "other.yaml",
        f"defaults: [config]\nhydra: {{callbacks: {{mine: {TOUCH}}}}}\n",
        "--config-name",
        "other",
    )
    assert outcome.code == 2 and outcome.message and made == []


class Touch:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_a_pickled_job_is_refused(command):
    (command.folder / "job.pickle").write_bytes(pickle.dumps(Touch()))
    try:
        outcome = command("--experimental-rerun", "job.pickle")
    finally:
        assert not (command.folder / "pwned").exists(), "the pickle ran its code"
    assert outcome.code == 2 and "pickle" in outcome.message


LOOKS = [
    "--cfg job",
    "--cfg hydra",
    "--cfg all",
    "--info defaults",
    "--info config",
    "--info all",
    "--info plugins",
]


@pytest.mark.parametrize("flags", LOOKS)
def test_looking_at_a_config_runs_nothing(attack, flags):
    text = globally(
        f"task: {TOUCH}\nhydra: "
        f"{{callbacks: {{mine: {TOUCH}}}, hydra_logging: {{handlers: {{x: {{class: {LAZY_FILE}}}}}}}}}"
    )
    _, made = attack("x/x.yaml", text, "+x=x", *flags.split())
    assert made == []


def test_hydras_own_help_runs_nothing(command):
    folder = command.folder / "shared" / "x"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text(
        globally(f"hydra: {{hydra_logging: {{handlers: {{x: {{class: {LAZY_FILE}}}}}}}}}")
    )
    command("--config-dir", "shared", "+x=x", "--hydra-help")
    assert command.made() == ["shared", "shared/x", "shared/x/x.yaml"]


def test_an_attack_on_the_command_line_is_refused_too(command):
    outcome = command("tracker=none", f"+sampler.extra.a={TOUCH}")
    assert (outcome.code, command.made()) == (2, [])
    assert outcome.message == (
        "sampler.extra.a._target_ is 'pathlib.Path.touch'; a config may only "
        "name classes of int8run, so that a shared file cannot run code"
    )


def test_one_bad_job_of_a_sweep_is_refused_before_the_first(command):
    outcome = command("-m", "tracker=none", "task._target_=int8run.tasks.options.Run,os.system")
    assert outcome.code == 2 and "task._target_ is 'os.system'" in outcome.message and command.made() == []


# -- what stays allowed ----------------------------------------------------------------------------

ALLOWED = {
    "classes of ours": {
        "outlier": {"_target_": "int8run.outlier.convrot.ConvRot"},
        "list": [{"_target_": "int8run.tasks.options.Run"}],
    },
    "our sweeper": {"hydra": {"sweeper": {"_target_": "hydra_plugins.int8run.Grid"}}},
    "a launcher of ours": {"hydra": {"launcher": {"_target_": "hydra_plugins.int8run.Processes"}}},
    "plain log handlers": {
        "hydra": {
            "job_logging": {
                "handlers": {
                    "a": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"},
                    "b": {"class": "rich.logging.RichHandler"},
                    "c": {
                        "class": "logging.FileHandler",
                        "filename": "${hydra.runtime.output_dir}/${hydra.job.name}.log",
                    },
                }
            }
        }
    },
}


@pytest.mark.parametrize("config", ALLOWED.values(), ids=ALLOWED)
def test_what_a_config_needs_passes(config):
    check_targets(
        OmegaConf.create({"hydra": {"runtime": {"output_dir": "o"}, "job": {"name": "n"}}} | config)
    )


def test_a_launcher_is_no_part_of_the_rest():
    config = OmegaConf.create({"task": {"_target_": "hydra_plugins.int8run.Processes"}})
    with pytest.raises(
        ConfigError, match=r"task\._target_ is 'hydra_plugins\..*may only name classes of int8run"
    ):
        check_targets(config)


def test_a_users_option_with_our_class_and_references_runs(attack):
    text = SAMPLING + "extra: {joint: '${seed}', at: '${now:%Y}', home: '${oc.env:HOME}'}\n"
    outcome, _ = attack("sampler/x.yaml", text, "sampler=x", "hydra/launcher=basic")
    assert "prompts.path=absent.txt: no such file" in outcome.message
