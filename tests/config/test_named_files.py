"""What a setting names and is not here is said before a model is loaded, and nothing is written."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support.cli_process import Command
from torch import zeros

from int8run.config.named_files import check_named_files
from int8run.errors import FileError, LoraError

UNTRACKED = ["tracker=none", "cache.limit_gb=0", "sampler.steps=1"]


def make_settings(task: str = "Run", **groups: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain containers: those of nothing that is missing, and `groups`."""
    nothing: dict[str, Any] = {
        "task": {"_target_": f"int8run.tasks.options.{task}"},
        "prompts": {"prompts": ["a"], "path": None},
        "lora": {"adapters": []},
        "lora_dir": None,
        "model": {"location": "shipped:tiny", "base": "shipped:tiny", "parts": {}},
        "clip": {"path": None},
        "int8": {"checkpoint": None},
    }
    return nothing | groups


def make_lora(**adapter: Any) -> dict[str, Any]:
    return {"adapters": [{"name": "a", **adapter}]}


MISSING = {
    "prompts": ({"path": "no/prompts.txt"}, FileError, "prompts.path=no/prompts.txt: no such file"),
    "lora": (make_lora(path="no/a.safetensors"), LoraError, "LoRA file not found: no/a.safetensors"),
    "clip": ({"path": {"text_encoder": "no.safetensors"}}, FileError, "clip.path.text_encoder=no"),
    "int8": ({"checkpoint": "no.safetensors"}, FileError, "int8.checkpoint=no.safetensors: no such file"),
}


@pytest.mark.parametrize("group", MISSING)
def test_a_missing_file_is_named_with_its_setting(group: str) -> None:
    value, error, message = MISSING[group]

    with pytest.raises(error, match=message):
        check_named_files(make_settings(**{group: value}))


@pytest.mark.parametrize("key", ["location", "base"])
@pytest.mark.parametrize("path", ["./no", "~/no such folder", "no"])
def test_a_model_that_can_only_be_here_is_looked_for(key: str, path: str) -> None:
    with pytest.raises(FileError, match=rf"model\.{key}={path}: /.*: no such folder; on the hub a model is"):
        check_named_files(make_settings(model={key: path}))


@pytest.mark.parametrize("path", ["no.safetensors", "a/b.safetensors"])
def test_a_file_that_can_only_be_here_is_looked_for(path: str) -> None:
    with pytest.raises(FileError, match=rf"model\.location={path}: /.*: no such file; on the hub a file is"):
        check_named_files(make_settings(model={"location": path}))


@pytest.mark.parametrize("path", ["/no/folder", "/no/a.safetensors"])
def test_a_whole_path_is_named_once(path: str) -> None:
    with pytest.raises(FileError, match=rf"^model\.location={path}: no such f"):
        check_named_files(make_settings(model={"location": path}))


@pytest.mark.parametrize("location", ["org/name", "org/name/file.safetensors", "org/name/a/b.safetensors"])
def test_what_may_be_on_the_hub_passes(location: str) -> None:
    check_named_files(make_settings(model={"location": location, "parts": {"vae": "org/name"}}))


def test_the_file_of_each_denoiser_is_looked_for(tmp_path: Path) -> None:
    save_file({"a": zeros(1)}, tmp_path / "high.safetensors")
    files = {"transformer": f"{tmp_path}/high.safetensors", "transformer_2": f"{tmp_path}/low.safetensors"}

    with pytest.raises(FileError, match=r"low\.safetensors: no such file"):
        check_named_files(make_settings(model={"location": files}))


def test_a_lora_may_be_a_name_in_a_folder_or_a_shipped_one(tmp_path: Path) -> None:
    save_file({"a": zeros(1)}, tmp_path / "style.safetensors")
    for path in ("style", "ink"):
        check_named_files(make_settings(lora=make_lora(path=path), lora_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "adapter",
    [
        {"path": "no", "enabled": False},
        {"path": "org/name", "weight_name": "a.safetensors"},
        {"path": {"flux": "no.safetensors"}},
        {"path": None},
    ],
    ids=["left out", "on the hub", "by base model", "none"],
)
def test_a_lora_that_is_found_otherwise_passes(adapter: dict[str, Any]) -> None:
    check_named_files(make_settings(lora=make_lora(**adapter)))


def test_a_task_looks_for_its_own_files_alone() -> None:
    for task in ("Quantize", "Bench", "Report", "Inspect"):
        check_named_files(make_settings(task, prompts={"path": "no.txt"}))
    with pytest.raises(FileError, match=r"model\.location=/no"):
        check_named_files(make_settings("Bench", model={"location": "/no"}))


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_a_command_ends_before_anything_is_written(command: Command, sweep: list[str]) -> None:
    outcome = command(*sweep, *UNTRACKED, "prompts=file", "prompts.path=no.txt")

    assert (outcome.code, outcome.message) == (
        3,
        f"prompts.path=no.txt: no such file (looked for {command.folder / 'no.txt'})",
    )
    assert command.made() == []


def test_a_sweep_of_which_no_job_finds_its_files_is_not_started(command: Command) -> None:
    outcome = command("-m", *UNTRACKED, "prompts=file", "prompts.path=no.txt,none.txt")

    assert outcome.code == 3
    summary, *lines = outcome.message.splitlines()
    assert summary == "2 of 2 jobs cannot run; none was started"
    assert [line.partition(":")[0] for line in lines] == [
        "  job 0 (prompts.path=no.txt)",
        "  job 1 (prompts.path=none.txt)",
    ]
    assert command.made() == []


def test_diffusers_is_not_imported_for_it(tmp_path: Path) -> None:
    script = (
        "import sys; from int8run import cli; sys.argv = ['int8run', 'model.location=/no/model']\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, 'diffusers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)

    assert result.stdout.splitlines()[-1] == "3 False", result.stderr
