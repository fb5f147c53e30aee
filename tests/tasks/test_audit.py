"""`task=audit`: from the command line to the page, the exit code, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from audit.audit_files import NAMES, make_base, make_int8, write_file
from safetensors.torch import load_file, save_file
from support.cli_process import Command
from support.run_job import make_spec
from torch import Tensor

from int8run.checkpoints.reader import TensorFiles
from int8run.config.job import Job
from int8run.errors import FileError
from int8run.tasks.audit import AuditRequest, write_results
from int8run.tasks.audit import run_audit as run_task
from int8run.tasks.audit_summary import describe_unreadable
from int8run.utils.paths import ASSETS_FOLDER

QUIET = ("tracker=none", "progress=false", "hydra.run.dir=out")


def write_pair(folder: Path, tensors: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    write_file(tensors, folder / "file.safetensors")
    write_file(base, folder / "base.safetensors")


def run_audit(command: Command, *words: str, base: bool = True) -> "tuple[int, str, str]":
    named = ("task.base=base.safetensors",) if base else ()
    done = command("task=audit", "task.path=file.safetensors", *named, *QUIET, *words)
    return done.code, done.out, done.err


def test_a_good_file_ends_with_0_and_leaves_page_and_numbers(command: Command) -> None:
    base = make_base()
    write_pair(command.folder, make_int8(base, 64), base)

    code, out, _ = run_audit(command, "task.min_grade=A")

    found = json.loads((command.folder / "out/audit.json").read_text())
    page = (command.folder / "out/audit.html").read_text()
    assert code == 0
    assert "grade A: Reproduced" in out
    assert "reproduced to the bit 6 of 6 (6 × convrot group_size=64, absmax by row)" in out
    assert (found["grade"], found["findings"], len(found["layers"])) == ("A", [], 6)
    assert all(name.replace(".", ".<wbr>") in page for name in NAMES)
    assert "<script" not in page


def test_the_page_has_no_folder_of_this_machine_and_the_numbers_have(tmp_path: Path) -> None:
    path = Path("/home/somebody/secret/file.safetensors")
    summary = describe_unreadable(path, f"{path} is cut off") | {"base": "/data/secret/base.safetensors"}

    write_results(tmp_path, summary)

    page = (tmp_path / "audit.html").read_text()
    assert "secret" not in page
    assert "<code>base.safetensors</code>" in page
    assert "<p>file.safetensors is cut off</p>" in page
    assert json.loads((tmp_path / "audit.json").read_text())["file"] == str(path)


def test_a_wrong_file_ends_with_5_and_says_why(command: Command) -> None:
    base = make_base()
    write_pair(command.folder, make_int8(base, 0, marked_group_size=64), base)

    code, out, err = run_audit(command)

    assert code == 5
    assert "Marker and numbers disagree about the rotation; 6 of 6" in out
    assert "file.safetensors has grade F, task.min_grade=C asks for more" in err
    assert json.loads((command.folder / "out/audit.json").read_text())["grade"] == "F"


def test_without_a_base_it_says_what_nobody_can_know(command: Command) -> None:
    write_file(make_int8(make_base()), command.folder / "file.safetensors")

    code, out, _ = run_audit(command, base=False)

    found = json.loads((command.folder / "out/audit.json").read_text())
    assert code == 0
    assert "grade U: Unproven" in out
    assert "nobody can say how exact the weights are" in found["unprovable"]


def test_names_of_a_file_cannot_break_the_page(command: Command) -> None:
    base = make_base()
    evil = {key.replace("blocks.0", "<b>x"): tensor for key, tensor in base.items()}
    tensors = {key.replace("blocks.0", "<b>x"): tensor for key, tensor in make_int8(base).items()}
    write_pair(command.folder, tensors, evil)

    run_audit(command)

    assert "<b>" not in (command.folder / "out/audit.html").read_text()


# -- what is refused -------------------------------------------------------------------------------


def test_a_file_must_be_named(command: Command) -> None:
    done = command("task=audit", *QUIET)

    assert done.code == 2
    assert "name it with task.path=" in done.message


def test_a_file_that_is_not_quantized_is_named_so(command: Command) -> None:
    base = make_base()
    write_pair(command.folder, base, base)

    code, _, err = run_audit(command)

    assert code == 3
    assert "file.safetensors is not quantized: its 6 weights are float" in err


def test_a_truncated_file(command: Command) -> None:
    base = make_base()
    write_pair(command.folder, make_int8(base), base)
    path = command.folder / "file.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])

    code, _, err = run_audit(command)

    assert code == 3
    assert "file.safetensors" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_scales_that_are_no_numbers_are_graded_f(command: Command, value: float) -> None:
    base = make_base()
    tensors = make_int8(base)
    tensors[f"{NAMES[0]}.weight_scale"][3] = value
    write_pair(command.folder, tensors, base)

    code, _, err = run_audit(command)

    found = json.loads((command.folder / "out/audit.json").read_text())
    assert code == 3
    assert "1 of 192 numbers of blocks.0.attn.to_q.weight_scale are not finite and above 0" in err
    assert (found["grade"], found["findings"][0]["code"]) == ("F", "unreadable")


def run_in_process(folder: Path, read: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Audit the pair of a folder, with tensors read by another function."""
    monkeypatch.setattr(TensorFiles, "read", read)
    names = {"path": str(folder / "file.safetensors"), "base": str(folder / "base.safetensors")}
    run_task(make_spec([]), Job({}, {}, [], folder), AuditRequest(**names, component=None, min_grade="C"))


@pytest.mark.parametrize(("damaged", "is_graded"), [("file", True), ("base", False)])
def test_what_cannot_be_read_grades_the_file_and_not_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, is_graded: bool
) -> None:
    base = make_base()
    write_pair(tmp_path, make_int8(base), base)
    read = TensorFiles.read

    def fail(files: TensorFiles, key: str, rows: slice | None = None) -> Tensor:
        if files.path.stem == damaged and key == f"{NAMES[-1]}.weight":
            raise FileError("a bad sector")
        return read(files, key, rows)

    with pytest.raises(FileError, match="a bad sector"):
        run_in_process(tmp_path, fail, monkeypatch)

    written = tmp_path / "audit.json"
    assert written.exists() == is_graded
    if is_graded:
        assert json.loads(written.read_text())["findings"][0]["detail"] == "a bad sector"


def test_a_base_with_other_names_is_another_model(command: Command) -> None:
    base = make_base()
    write_pair(command.folder, make_int8(base), {"encoder.weight": torch.ones(8, 8)})

    code, _, err = run_audit(command)

    assert code == 3
    assert "the base is another model; name the float file" in err


def test_a_base_of_another_family_is_named(command: Command, tmp_path: Path) -> None:
    base = make_base()
    write_file(make_int8(base), command.folder / "file.safetensors")

    done = command("task=audit", "task.path=file.safetensors", "model=tiny", *QUIET)

    assert done.code == 3
    assert "is flux (FluxTransformer2DModel)" in done.message


def test_a_grade_that_does_not_exist(command: Command) -> None:
    done = command("task=audit", "task.path=x.safetensors", "task.min_grade=E", *QUIET)

    assert done.code == 2
    assert "task.min_grade is 'E'" in done.message


# -- a model whose family is known -----------------------------------------------------------------


@pytest.mark.slow
def test_the_tiny_model_in_the_authors_names_beside_its_own(command: Command) -> None:
    made = command("task=quantize", "model=tiny", "outlier=convrot", "save=file.safetensors", *QUIET)
    assert made.code == 0

    done = command("task=audit", "task.path=file.safetensors", "model=tiny", *QUIET)

    assert done.code == 0
    assert "grade A" in done.out
    assert "reproduced to the bit 16 of 16" in done.out
    assert "56 of 56 equal to the base's" in done.out
    assert "the base is the file that its note names" in done.out


@pytest.mark.slow
def test_attention_that_was_left_float_is_named_by_the_familys_rules(command: Command) -> None:
    command("task=quantize", "model=tiny", "save=whole.safetensors", *QUIET)
    tensors = load_file(command.folder / "whole.safetensors")
    layers = [key.removesuffix("weight") for key in tensors if key.endswith("img_attn.proj.weight")]
    source = load_first_attention()
    for layer in layers:
        del tensors[f"{layer}weight_scale"], tensors[f"{layer}comfy_quant"]
        number = layer.split(".")[1]
        tensors[f"{layer}weight"] = source[f"transformer_blocks.{number}.attn.to_out.0.weight"]
    save_file(tensors, command.folder / "file.safetensors")

    done = command("task=audit", "task.path=file.safetensors", "model=tiny", *QUIET)

    assert done.code == 0
    assert "grade C" in done.out
    assert "Layers stayed float that the family's rules quantize" in done.out
    assert f"{len(layers)} × double_blocks.*.img_attn.proj" in done.out


def load_first_attention() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((ASSETS_FOLDER / "tiny" / "transformer").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
