"""The command line: exit codes, messages of one line, suggestions, sweeps that are checked first."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from support.hostile_texts import HOSTILE_TEXTS

from int8run import __version__, cli
from int8run.errors import ConfigError
from int8run.tasks.options import Run
from int8run.tracking.run_record import KILLED, read_record
from int8run.utils.text import UNSAFE_BUT_LINES, make_visible

# the command of this interpreter's environment
INT8RUN = Path(sys.executable).with_name("int8run")
# passes every check, and fails before a model is loaded
NOTHING_TO_DO = ["tracker=none", "prompts=file", "prompts.path=absent.txt"]


def assert_one_line(outcome, code, pattern):
    """The code, and a message that matches, stands alone, and hides hydra's and python's own words."""
    message = outcome.message
    assert outcome.code == code, message
    assert "\n" not in message
    assert re.search(pattern, message), f"{message!r} does not match {pattern!r}"
    for inner in ("full_key", "__init__", "TypeError", "object_type"):
        assert inner not in message


REFUSED = {
    # words
    "misspelt option": (
        ["model=tinny"],
        r"no model called 'tinny'; did you mean 'tiny'\? choose from .*flux, .*tiny",
    ),
    "repository as an option": (
        ["model=black-forest-labs/FLUX.1-dev"],
        r"^model=black-forest-labs/FLUX.1-dev is no option; it is the location of model=flux",
    ),
    "unknown repository as an option": (
        ["model=some/repository"],
        r"^model=some/repository is no option, .* give model.location=some/repository, and the option ",
    ),
    "option unlike any": (["outlier=zzz"], r"no outlier called 'zzz'; choose from .*convrot, .*none"),
    "misspelt launcher": (
        ["hydra/launcher=basik"],
        r"no hydra/launcher called 'basik'; did you mean 'basic'\? choose from basic",
    ),
    "misspelt group": (
        ["bakend=auto"],
        r"no setting called 'bakend'; did you mean 'backend'\? choose from .*model, .*tracker",
    ),
    "misspelt group with plus": (["+bakend=auto"], r"no setting called 'bakend'; did you mean 'backend'\?"),
    "misspelt key": (
        ["lora.strenght=1"],
        r"no setting called 'lora.strenght'; did you mean 'lora.strength'\? choose from .*mode, strength",
    ),
    "misspelt key with plus": (
        ["+lora.strenght=1"],
        r"no setting called 'lora.strenght'; did you mean 'lora.strength'\?",
    ),
    "key of another option": (
        ["backend.tile.block_m=64"],
        r"no setting called 'backend.tile' in this config; backend=triton has it",
    ),
    "key of another task": (
        ["task.rounds=5"],
        r"no setting called 'task.rounds' in this config; task=bench has it",
    ),
    "misspelt top-level key": (["sed=1"], r"no setting called 'sed'; did you mean 'seed'\?"),
    "key of a group without it": (
        ["steps=8"],
        r"no setting called 'steps'; did you mean .*'sampler.steps'\?",
    ),
    "group left out": (["~model"], r"\bmodel\b.*(missing|needs|required|choose from)"),
    # values
    "word": (
        ["int8.small_batch_fallback=sometimes"],
        r"int8.small_batch_fallback is 'sometimes'; choose from always, never, only_small",
    ),
    "near word": (
        ["int8.small_batch_fallback=newer"],
        r"int8.small_batch_fallback is 'newer'; did you mean 'never'\?",
    ),
    "max_rows": (["int8.max_rows=-1"], r"int8.max_rows is -1; allowed is a whole number from 0 to 4096"),
    "compile": (["compile=yes"], r"compile is 'yes'; choose from blocks, full, none, reduce-overhead"),
    "seed": (["seed=-1"], r"seed is -1; allowed is a whole number from 0 to "),
    "steps": (["sampler.steps=0"], r"sampler.steps is 0; allowed is a whole number from 1 to 1000"),
    "guidance": (["sampler.guidance=-1"], r"sampler.guidance is -1; allowed is a number from 0 to 100"),
    "height": (["sampler.height=4"], r"sampler.height is 4; allowed is a whole number from 8 to 16384"),
    "width": (["sampler.width=big"], r"sampler.width is 'big'; allowed is a whole number from 8 to 16384"),
    "batch": (["sampler.batch=0"], r"sampler.batch is 0; allowed is a whole number from 1 to 1024"),
    "dtype": (
        ["model.dtype=bfloat"],
        r"model.dtype is 'bfloat'; did you mean 'bfloat16'\? choose from bfloat16, float16, float32",
    ),
    "group size": (
        ["outlier=convrot", "outlier.group_size=100"],
        r"outlier.group_size is 100; convrot takes 4, 16, 64, 256 or 1024",
    ),
    "group size of quarot": (
        ["outlier=quarot", "outlier.group_size=100"],
        r"outlier.group_size is 100; choose a power of 2 from 2 to",
    ),
    "alpha": (
        ["outlier=smoothquant", "outlier.alpha=1.5"],
        r"outlier.alpha is 1.5; allowed is a number from 0 to 1",
    ),
    "cost": (
        ["outlier=auto", "outlier.max_cost=-1"],
        r"outlier.max_cost is -1; allowed is a number from 0 to 10",
    ),
    "damping": (
        ["rounding=gptq", "rounding.damping=0"],
        r"rounding.damping is 0; allowed is a number from 1e-06 to 1",
    ),
    "scales tried": (
        ["rounding=mse", "rounding.candidates=1"],
        r"rounding.candidates is 1; allowed is a whole number from 2 to 1000",
    ),
    "rounding": (
        ["rounding=gtpq"],
        r"no rounding called 'gtpq'; did you mean 'gptq'\? choose from absmax, gptq, mse",
    ),
    "no calibration prompts": (
        ["calibration.prompts=[]"],
        r"calibration.prompts is \[\]; it takes a list with at least one prompt, ",
    ),
    "calibration prompt of spaces": (
        ["calibration.prompts=[' ']"],
        r"calibration.prompts is \[' '\]; it takes a list with at least",
    ),
    "calibration prompts in a word": (
        ["calibration.prompts=owl"],
        r"calibration.prompts is \"owl\"; it takes a list: calibration.prompts=",
    ),
    "calibration moments": (
        ["calibration.num_timesteps=0"],
        r"calibration.num_timesteps is 0; allowed is a whole number from 1 to 1000",
    ),
    "calibration rows": (
        ["calibration.max_tokens_per_layer=0"],
        r"calibration.max_tokens_per_layer is 0; allowed is a whole number from 1 to ",
    ),
    "calibration seed": (
        ["calibration.seed=-1"],
        r"calibration.seed is -1; allowed is a whole number from 0 to ",
    ),
    "budget alone": (
        ["quality_db=40"],
        r"^model_type.mixed_precision=auto keeps layers float until quality_db is met; set both, .* or "
        r"neither",
    ),
    "no budget": (
        ["model_type.mixed_precision=auto"],
        r"^model_type.mixed_precision=auto keeps .*; set both, .* or neither",
    ),
    "budget out of range": (
        ["model_type.mixed_precision=auto", "quality_db=-1"],
        r"quality_db is -1; allowed is a number from 0 to 200",
    ),
    "budget in words": (
        ["model_type.mixed_precision=auto", "quality_db=high"],
        r"quality_db is 'high'; allowed is a number from 0 to 200",
    ),
    "rules where they used to be": (
        ["model_type.mixed_precision=[x]"],
        r"model_type.mixed_precision is \['x'\]; choose from auto, none",
    ),
    "save without int8": (
        ["int8.enable=false", "save=m.safetensors"],
        r"int8.enable=false makes no INT8 layers; quality_db, save and",
    ),
    "checkpoint without int8": (
        ["int8.enable=false", "int8.checkpoint=m.safetensors"],
        r"int8.enable=false makes no INT8 layers; ",
    ),
    "budget without int8": (
        ["int8.enable=false", "model_type.mixed_precision=auto", "quality_db=40"],
        r"int8.enable=false makes no INT8 layers; quality_db, save and",
    ),
    "save to another kind": (
        ["save=m.pt"],
        r"save=m.pt is neither a .safetensors file nor a folder \(a name without a suffix\)",
    ),
    "save to a switch": (
        ["save=true"],
        r"save=True is neither a .safetensors file nor a folder \(a name without a suffix\)",
    ),
    "baseline": (["metrics.baseline=maybe"], r"metrics.baseline is 'maybe'; choose from cached, none, run"),
    "lora strength": (["lora.strength=99"], r"lora.strength is 99; allowed is a number from -20 to 20"),
    "lora strength nan": (["lora.strength=nan"], r"lora.strength is nan; allowed is a number from -20 to 20"),
    "adapter that is not there": (
        ["lora.adapters.0.strength=0.5"],
        r"no setting called 'lora.adapters\[0\]': the list has 0 entries; choose one that has it, such "
        r"as lora=file or lora=stack_a",
    ),
    "setting as a flag": (["--lora", "stack_a"], r"--lora is no flag; settings have no dashes: lora=stack_a"),
    "key as a flag": (["--sampler.steps=8"], r"is no flag; settings have no dashes: sampler.steps=8"),
    "misspelt prompt": (
        ["promt=a fox"],
        r"no setting called 'promt'; did you mean 'prompt'\? choose",
    ),
    "lora by its name": (
        ["lora=ink"],
        r"no lora called 'ink'; .*; one LoRA, by its name or file: lora=file lora.adapters.0.path=ink",
    ),
    "adapter strength": (
        ["lora=stack_a", "lora.adapters.0.strength=true"],
        r"strength of LoRA 'ink' is True; allowed is a number",
    ),
    "strengths multiplied": (
        ["lora=stack_a", "lora.strength=5", "lora.adapters.1.strength=10"],
        r"strength of LoRA 'gloss' times lora.strength is 50; allowed is a number from -20 to 20",
    ),
    "an adapter by its name": (
        ["lora=stack_a", "lora.adapters.ink.strength=1"],
        r"Index 'ink' \(str\) is not an int: entries of a list are counted from 0, such as "
        r"lora.adapters.0.strength=0.5",
    ),
    "a setting that a stack leaves out": (
        ["lora=stack_a", "lora.adapters.0.weight_name=a"],
        r"weight_name is a setting that this stack leaves out; give it with a plus: "
        r"\+lora.adapters.0.weight_name=…",
    ),
    "adapter name twice": (
        ["lora=stack_a", "lora.adapters.1.name=ink"],
        r"lora.adapters has the name 'ink' twice; give each",
    ),
    "lora mode": (["lora.mode=merge"], r"lora.mode is 'merge'; choose from auto, bake, dynamic"),
    "images per prompt": (
        ["prompts.seeds_per_prompt=0"],
        r"prompts.seeds_per_prompt is 0; allowed is a whole number from 1 to 10000",
    ),
    # kinds of values, which yaml does not check
    "steps not whole": (["sampler.steps=4.5"], r"sampler.steps is 4.5; "),
    "seed not whole": (["seed=1.5"], r"seed is 1.5; "),
    "max_rows not whole": (["int8.max_rows=1.5"], r"int8.max_rows is 1.5; "),
    "rounds": (["backend.rounds=0"], r"backend.rounds is 0; "),
    "switch": (["int8.enable=maybe"], r"int8.enable is 'maybe'; .*true.*false"),
    "group of numbers": (["int8=5"], r"\bint8\b.*\b5\b"),
    "node of numbers": (["calibration=5"], r"\bcalibration\b.*\b5\b"),
    "node null": (["calibration=null"], r"\bcalibration\b.*None"),
    "node left out": (["~calibration"], r"\bcalibration\b"),
    "extra": (["sampler.extra=5"], r"sampler.extra is 5; "),
    "two options": (
        ["clip=[int8_rowwise,nvfp4]"],
        r"clip=\[…\] names several options, and a run has one; for a job each: -m clip=a,b",
    ),
    "group null": (["model=null"], r"\bmodel\b.*choose from .*tiny"),
    # missing values
    "no location": (
        ["model.location=null"],
        r"model has no location; set model.location=<hub id or diffusers folder>",
    ),
    "no prompts": (
        ["prompts=file"],
        r"prompts needs exactly one of prompts.prompts=\[…\] and prompts.path=<file, one prompt per line>",
    ),
    # grammar
    "no equals sign": (["lora.strength"], r"'lora.strength' is no setting; write KEY=VALUE, or --help"),
    "open bracket": (["prompts.prompts=[a"], r"\[a"),
    "sweep without -m": (
        ["seed=0,1"],
        r"'seed=0,1' are several values; for a job each add -m, for a list write seed=\[0,1\]",
    ),
    "prompt with a bracket": (
        ["prompts.prompts=[a (red:1.2) fox]"],
        r"cannot be read: .*; prompt='a \(red:1.2\) fox' takes any text",
    ),
    "prompt with an apostrophe": (["prompts.prompts=[it's]"], r"; prompt='it'\\''s' takes any text"),
    "prompts without brackets": (
        ["prompts.prompts=a fox, at night"],
        r"are several values; .* add -m, for a list .*, for one prompt .* prompt='a fox, at night'",
    ),
    "path with a bracket": (["save=a(1).safetensors"], r"cannot be read: .*: 'save=\"a\(1\).safetensors\"'"),
    "mapping with a comma": (["sampler.extra={a: b, c}"], r"a list is \[a,b\], a mapping '\{key: value\}'"),
    "prompt as a flag": (["--prompt=a fox"], r"--prompt is no flag; give a prompt without dashes"),
    "prompt twice": (
        ["prompt=a", "prompts.path=p.txt"],
        r"prompt= and prompts.path= both say what to generate; give one of them",
    ),
    "number as a prompt": (
        ["prompts.prompts=[1984]"],
        r"prompts.prompts has 1984 as entry 0, which is no text; quote it: 'prompts.prompts=\[\"1984\"\]'",
    ),
    "no prompt": (["prompts.prompts=[fox,null]"], r"prompts.prompts has null as entry 1, which is no text"),
    "truth as a prompt": (["prompts.prompts=[true]"], r"prompts.prompts has true as entry 0"),
    "mapping as a prompt": (["prompts.prompts=[{a: 1}]"], r"prompts.prompts has \{a: 1\} as entry 0"),
    "number for prompts": (
        ["prompts.prompts=3"],
        r"prompts.prompts is 3; it takes a list: prompts.prompts=\[3\]",
    ),
    "number in the calibration": (["calibration.prompts=[1984]"], r"calibration.prompts has 1984 as entry 0"),
    "no such folder": (
        ["--config-dir", "absent"],
        r"--config-dir absent: no such folder \(looked for /.*/work/absent\)",
    ),
}


HOSTILE_NAMES = [text.replace("/", "-") for text in HOSTILE_TEXTS if "\0" not in text and len(text) < 80]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_a_file_of_any_name_is_called_by_it(command, name):
    save_file({"blocks.0.weight": torch.zeros(2, 2)}, command.folder / "plain.safetensors")
    (command.folder / "plain.safetensors").rename(command.folder / f"{name}.safetensors")

    found = command("task=inspect", f"task.path='{name}.safetensors'")
    missing = command("task=inspect", f"task.path='{name}.absent'")

    assert found.code == 0 and "plain weights" in found.out
    assert make_visible(name) in "".join(line.strip() for line in found.out.splitlines())
    assert missing.code == 3 and make_visible(name) in missing.message
    assert not UNSAFE_BUT_LINES.search(found.out + found.err + missing.out + missing.err)


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_setting_is_one_line_and_code_2(command, monkeypatch, arguments, message):
    # a setting that is not refused must not load a model here
    monkeypatch.setattr(Run, "execute", lambda *_: None)

    outcome = command("tracker=none", *arguments)

    assert_one_line(outcome, 2, message)
    assert command.made() == [], "nothing was started, so nothing is left behind"


def test_the_first_line_says_what_is_built(command):
    outcome = command("lora=stack_a", "outlier=convrot", *NOTHING_TO_DO)

    line = f"int8run {__version__} run: model=tiny outlier=convrot backend=auto lora=stack_a\n"
    assert outcome.out.startswith(line)


# -- while a job runs ------------------------------------------------------------------------------

FAILING = {
    "no prompts file": ([], 3, r"prompts.path=absent.txt: no such file \(looked for /.*/work/absent.txt\)"),
    "folder without index": (
        ["model.location=./empty"],
        3,
        r"/work/empty is not a diffusers folder: it has no model_index.json",
    ),
    "shipped name": (
        ["model.location=shipped:huge"],
        3,
        r"assets/huge: no such folder; on the hub a model is org/name",
    ),
    "single file": (
        ["model.location=x.safetensors"],
        3,
        r"x.safetensors: no such file; on the hub a file is org/repository/name",
    ),
    "no gpu": (
        ["device=cuda"],
        4,
        r"device=cuda asks for a GPU, but torch .* sees none; device=cpu works here",
    ),
    "device word": (["device=banana"], 2, r"device is 'banana'; choose from auto, cpu, cuda, cuda:N"),
    "nothing to inspect": (
        ["task=inspect", "task.path=absent.safetensors"],
        3,
        r"absent.safetensors: no such file \(looked for /",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "message"), FAILING.values(), ids=FAILING)
def test_a_run_that_fails_ends_with_one_line_and_its_code(command, monkeypatch, arguments, code, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (command.folder / "empty").mkdir()

    outcome = command(*(["tracker=none", *arguments] if arguments else NOTHING_TO_DO))

    assert_one_line(outcome, code, message)


def test_a_failing_run_says_its_reason_once(command):
    outcome = command(*NOTHING_TO_DO)

    assert (outcome.out + outcome.err).count("no such file") == 1
    assert outcome.err.startswith("int8run: ")


def test_a_lora_without_a_source_for_the_model_is_found_before_anything_starts(command):
    outcome = command("tracker=none", "lora=stack_a", "model.lora_base=sdxl")

    assert_one_line(
        outcome,
        2,
        r"LoRA 'ink' has no source for base model 'sdxl'; it has one for flux, tiny; .* choose another lora=",
    )
    assert command.made() == []


def test_a_hub_error_is_one_line(command, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    outcome = command("tracker=none", "model.location=nobody/nothing", "device=cpu")

    message = (
        r"model\.location=nobody/nothing is not on this machine, and the hub cannot be reached "
        r"\(Offline.*\); set model\.location to a folder that you have, or fetch it .*: "
        r"hf download nobody/nothing \(its size is not known here\)$"
    )
    assert_one_line(outcome, 3, message)


# -- sweeps ----------------------------------------------------------------------------------------


def test_one_bad_job_of_a_sweep_stops_all_before_they_start(command):
    outcome = command("-m", "tracker=none", "lora.strength=0,99,1")

    assert outcome.code == 2
    assert outcome.message == (
        "1 of 3 jobs cannot run; none was started\n"
        "  job 1 (lora.strength=99): lora.strength is 99; allowed is a number from -20 to 20"
    )
    assert "3 jobs" in outcome.out
    assert command.made() == []


def test_every_bad_job_of_a_sweep_is_listed(command):
    outcome = command("--multirun", "tracker=none", "seed=0,-1", "compile=none,yes")

    summary, *lines = outcome.message.splitlines()
    assert summary == "3 of 4 jobs cannot run; none was started"
    assert [line.split(" (")[0] for line in lines] == ["  job 1", "  job 2", "  job 3"]


def test_a_misspelt_option_in_a_sweep_is_one_line(command):
    outcome = command("-m", "tracker=none", "backend=reference,refrence")

    assert_one_line(outcome, 2, r"no backend called 'refrence'; did you mean 'reference'\?")
    assert command.made() == []


def test_a_job_that_fails_does_not_stop_the_others(command):
    save_file({"w": torch.zeros(3)}, command.folder / "there.safetensors")

    outcome = command("-m", "tracker=none", "task=inspect", "task.path=absent.safetensors,there.safetensors")

    assert outcome.code == 3
    assert "absent.safetensors: no such file" in outcome.message
    assert "plain weights" in outcome.out, "the second job ran"


def test_the_reasons_of_both_failing_jobs_are_shown(command):
    outcome = command("-m", "tracker=none", "task=inspect", "task.path=a.safetensors,b.safetensors")

    shown = " ".join((outcome.out + outcome.err).split())
    assert "a.safetensors: no such file" in shown
    assert "b.safetensors: no such file" in shown


def test_a_sweep_written_in_a_file_is_checked_as_well(command):
    folder = command.folder / "mine" / "sweep"
    folder.mkdir(parents=True)
    (folder / "seeds.yaml").write_text(
        "# @package _global_\n# seeds\nhydra: {sweeper: {params: {seed: '0,-1'}}}\n"
    )

    outcome = command("-m", "--config-dir", "mine", "+sweep=seeds", *NOTHING_TO_DO)

    message = r"1 of 2 jobs cannot run; none was started\n  job 1 \(.*seed=-1.*\): seed is -1; "
    assert re.match(message, outcome.message)
    assert not (command.folder / "multirun").exists()


# -- folders of the user's own ---------------------------------------------------------------------


@pytest.fixture
def mine(command):
    """A folder with an outlier option `mine`; the returned function writes its text."""
    folder = command.folder / "mine" / "outlier"
    folder.mkdir(parents=True)
    return (folder / "mine.yaml").write_text


def test_a_user_folder_adds_an_option(command, mine):
    mine("# my groups\n_target_: int8run.outlier.convrot.ConvRot\ngroup_size: 64\n")

    shown = command("--config-dir", "mine", "outlier=mine", "--cfg", "job")
    started = command("--config-dir", "mine", "outlier=mine", *NOTHING_TO_DO)
    misspelt = command("--config-dir", "mine", "outlier=mien", *NOTHING_TO_DO)

    assert (shown.code, shown.err) == (0, "")
    assert "group_size: 64" in shown.out
    assert "outlier=mine" in started.out
    assert "prompts.path" in started.message
    message = r"no outlier called 'mien'; did you mean 'mine'\? choose from auto, .*mine, .*smoothquant"
    assert_one_line(misspelt, 2, message)


def test_help_knows_the_options_of_a_user_folder(command, mine):
    mine("# my groups\n_target_: int8run.outlier.convrot.ConvRot\ngroup_size: 64 # of \x1b[31mtokens\n")

    page = command("--config-dir", "mine", "--help", "outlier")
    overview = command("--help", "-cd", "mine")

    assert re.search(r"^  mine +my groups$", page.out, flags=re.MULTILINE)
    assert "\\x1b[31mtokens" in page.out and "\x1b" not in page.out
    assert "mine" in overview.out.partition("Sections of settings")[0]


def test_a_group_without_an_option_is_shown_the_options_of_a_user_folder(command, mine):
    mine("_target_: int8run.outlier.convrot.ConvRot\n")

    outcome = command("--config-dir", "mine", "outlier=null")

    assert_one_line(outcome, 2, r"outlier is None, .*choose from auto, convrot, hadanorm, mine, none")


BROKEN = {
    "value out of range": (
        "_target_: int8run.outlier.convrot.ConvRot\ngroup_size: 5\n",
        r"outlier.group_size is 5; ",
    ),
    "value missing": ("_target_: int8run.outlier.convrot.ConvRot\ngroup_size: ???\n", r"outlier.group_size"),
    "unknown reference": (
        "_target_: int8run.outlier.convrot.ConvRot\ngroup_size: ${nope}\n",
        r"nope.* not found",
    ),
    "unknown field": (
        "_target_: int8run.outlier.convrot.ConvRot\ngroupsize: 4\n",
        r"groupsize.*did you mean 'outlier.group_size'\?",
    ),
    "unknown class": ("_target_: int8run.outlier.convrot.ConvRott\n", r"int8run.outlier.convrot.ConvRott"),
    "no class": ("group_size: 4\n", r"outlier.*_target_"),
    "a list": ("- 1\n", r"outlier"),
    "no yaml": ("a: [1\n", r"mine/outlier/mine.yaml.*line"),
    "unknown group inside": ("defaults: [nogroup: x]\n", r"no.*group.*'?nogroup"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_option_of_the_user_is_one_line(command, mine, text, message):
    mine(text)

    outcome = command("--config-dir", "mine", "outlier=mine", *NOTHING_TO_DO)

    assert_one_line(outcome, 2, message)
    assert command.made() == ["mine", "mine/outlier", "mine/outlier/mine.yaml"]


# -- the process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "0", "1"], ids=["unset", "0", "1"])
@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["model=tinny"]], ids=["success", "error"])
def test_hydras_switch_is_put_back(command, monkeypatch, before, arguments):
    if before is not None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", before)

    try:
        command(*arguments)
    except MissingConfigException:
        assert before  # the switch asks for the traceback

    assert os.environ.get("HYDRA_FULL_ERROR") == before


@pytest.mark.parametrize("switch", ["INT8RUN_DEBUG", "HYDRA_FULL_ERROR"])
def test_a_switch_asks_for_the_traceback(command, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")

    with pytest.raises(MissingConfigException):
        command("model=tinny")
    with pytest.raises(ConfigError, match="seed is -1"):
        command("seed=-1", "tracker=none")


def test_a_switch_of_the_user_is_not_overwritten(command, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)

    command("--cfg", "job")

    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_an_error_that_is_not_the_users_is_shown_whole(command, monkeypatch):
    monkeypatch.setattr(cli, "check_and_run", lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        command()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_ends_a_process_is_one_line_and_its_code(command, monkeypatch, number, code):
    monkeypatch.setattr(cli, "check_and_run", lambda: os.kill(os.getpid(), number))
    # a suite that was started by nohup ignores one of them
    before = signal.signal(number, signal.SIG_DFL)
    try:
        outcome = command()
        after = signal.getsignal(number)
    finally:
        signal.signal(number, before)

    assert (outcome.code, outcome.err) == (code, f"int8run: ended by {signal.Signals(number).name}\n")
    assert after is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored(command, monkeypatch):
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(cli, "check_and_run", lambda: os.kill(os.getpid(), signal.SIGHUP))
    try:
        outcome = command()
    finally:
        signal.signal(signal.SIGHUP, before)

    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.slow
def test_sigterm_keeps_what_is_generated(tmp_path, model):
    """A real process, stopped after its first image, on a pipe."""
    small = ["sampler.steps=2", "sampler.height=16", "sampler.width=16", "tracker=none", "cache.limit_gb=0"]
    words = [model, *small, "backend=reference", "prompts.seeds_per_prompt=1000", "metrics.baseline=none"]
    process = subprocess.Popen(
        [sys.executable, "-m", "int8run", *words, "prompts.prompts=[a]", "hydra.run.dir=out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first_image = next(line for line in process.stdout if line.startswith("Generating: 1 of 1000, "))
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate()

    assert first_image.endswith(" left\n")
    kept = re.search(r"(\d+) of 1000 images are generated and kept in (.*)", " ".join(rest.split()))
    images = list((tmp_path / "out" / "images").iterdir())
    assert int(kept[1]) == len(images) > 0
    assert all(Image.open(path).text["parameters"].startswith("a\n") for path in images)
    assert (process.returncode, errors) == (143, "int8run: ended by SIGTERM\n")
    record = read_record(tmp_path / "out")
    assert (record.state, record.error) == (KILLED, "ended by SIGTERM")


def test_an_interrupt_is_one_line_and_code_130(command, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "check_and_run", interrupt)

    outcome = command()

    assert (outcome.code, outcome.err) == (130, "int8run: interrupted\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_does_not_look_at_the_rest(command, flag):
    outcome = command("model=tinny", flag)

    assert outcome.code == 0
    assert outcome.out.startswith("int8run: build a diffusion model in INT8")
    assert command.made() == []


def test_help_for_a_group_shows_its_options_and_settings(command):
    outcome = command("--help", "backend")

    assert outcome.code == 0
    assert outcome.out.startswith("backend=OPTION (default: auto)\n")
    assert re.search(r"^  cpu +int8run's own kernels", outcome.out, flags=re.MULTILINE)
    assert re.search(r"^  backend\.rounds=7 ", outcome.out, flags=re.MULTILINE)


def test_help_for_a_group_stands_behind_other_arguments(command):
    assert command("--config-dir", "mine", "--help", "lora").out.startswith("lora=OPTION")
    assert command("model=flux", "--help", "tracker=none").out.startswith("int8run: build")


def test_help_for_an_unknown_group_lists_those_that_there_are(command):
    outcome = command("--help", "modle")

    assert outcome.code == 2
    assert outcome.message.startswith(
        "--help modle: no group of that name; did you mean 'model'? choose from task"
    )


def test_version_is_that_of_int8run(command):
    outcome = command("--version")

    assert (outcome.code, outcome.out) == (0, f"int8run {__version__}\n")


def test_a_prompt_may_be_any_text(command):
    text = "a (red:1.2) fox, it's 50% off: ${x} [hm] 'a' \\"

    outcome = command("--cfg", "job", f"prompt={text}", "prompt=狐狸")

    assert outcome.code == 0, outcome.err
    composed = OmegaConf.create(outcome.out)
    assert list(composed.prompts.prompts) == [text, "狐狸"]


def test_cfg_prints_the_composed_config_and_starts_nothing(command):
    outcome = command("--cfg", "job", "seed=7", "outlier=convrot")

    shown = yaml.safe_load(outcome.out)
    assert shown["seed"] == 7
    assert shown["outlier"]["group_size"] == 256
    assert shown["_target_"] == "int8run.config.run_spec.RunSpec"
    assert (outcome.code, outcome.err, command.made()) == (0, "", [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["outlier=convrot", "--cfg", "job", "seed=7"],
        ["outlier=convrot", "seed=7", "--cfg", "job"],
        ["--cfg", "job", "outlier=convrot", "seed=7"],
    ],
    ids=["around", "before", "behind"],
)
def test_overrides_stand_before_and_behind_flags(command, arguments):
    outcome = command(*arguments)

    shown = yaml.safe_load(outcome.out)
    assert (shown["seed"], shown["outlier"]["group_size"]) == (7, 256)
    assert (outcome.code, outcome.err) == (0, "")


def test_overrides_before_the_flag_of_a_sweep_belong_to_it(command):
    outcome = command("tracker=none", "-m", "seed=0,-1")

    assert "2 jobs" in outcome.out
    assert outcome.code == 2
    assert "1 of 2 jobs cannot run" in outcome.err and "job 1 (seed=-1): seed is -1" in outcome.err


def test_an_unknown_flag_is_refused(command):
    outcome = command("--nonsense")

    assert outcome.code == 2
    assert "unrecognized arguments: --nonsense" in outcome.err


def run_installed_command(folder, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in cli.DEBUG_VARIABLES}
    return subprocess.run(
        [INT8RUN, *arguments], cwd=folder, env=kept | environment, capture_output=True, text=True
    )


def test_the_installed_command_ends_with_the_code_and_the_message(tmp_path):
    process = run_installed_command(tmp_path, "model=tinny")

    assert (process.returncode, process.stdout) == (2, "")
    message = r"int8run: no model called 'tinny'; did you mean 'tiny'\? choose from [a-z0-9_, ]+\n"
    assert re.fullmatch(message, process.stderr)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_shows_a_traceback_on_request(tmp_path):
    process = run_installed_command(tmp_path, "model=tinny", INT8RUN_DEBUG="1")

    assert process.returncode == 1
    assert "Traceback (most recent call last)" in process.stderr
    assert "MissingConfigException" in process.stderr
