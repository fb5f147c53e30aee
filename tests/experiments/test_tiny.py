"""`experiments/tiny/`: from drawings to a model and its LoRAs, with a few steps of each stage."""

import io
import json
import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.experiment_script import run_script

NAMES = [
    "fox",
    "sunflower",
    "red-apple",
    "octopus",
    "airplane-arrival",
    "strawberry",
    "birthday-cake",
    "parrot",
]
TRAINED = NAMES[:6]
STYLES = ("flat", "ink", "gloss")
ANIMALS = ("--categories", "Animals & Nature")
CATEGORY = {"categories": {"Animals & Nature": TRAINED}}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with drawings of noise, as `fetch.py` and the rasteriser leave it."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(NAMES), 3, 64, 64)
    images = {style: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for style in STYLES}
    folder = tmp_path / "work"
    folder.mkdir()
    torch.save({"names": NAMES, "images": images}, folder / "drawn_images.pt")
    (folder / "flat.json").write_text(json.dumps(CATEGORY))
    return folder


def make_package(file: Path) -> None:
    """An npm package of icons with one drawing."""
    contents = {
        "icons": {"icons": {"fox": {"body": "<circle r='9'/>"}}},
        "info": {"license": {"spdx": "MIT"}, "author": {"name": "somebody"}},
        "metadata": {"categories": {"Animals & Nature": ["fox"]}},
    }
    with tarfile.open(file, "w:gz") as archive:
        for name, content in contents.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def test_drawings_are_unpacked_from_npm_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    make_package(tmp_path / "icons.tgz")
    lines = [
        f"#!{sys.executable}",
        "import shutil",
        f"print(shutil.copy({str(tmp_path / 'icons.tgz')!r}, 'icons.tgz'))",
    ]
    npm.write_text("\n".join(lines))
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")

    run_script("tiny/fetch.py", "--work", tmp_path / "work")

    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "work").glob("*.json")}
    assert set(found) == set(STYLES)
    assert found["flat"]["bodies"] == {"fox": "<circle r='9'/>"}


def test_the_reference_sheet_has_the_trained_drawings(work: Path, tmp_path: Path) -> None:
    torch.save({"names": TRAINED}, work / "base.pt")

    run_script("tiny/reference.py", "--work", work, "--out", tmp_path / "sheet.png")

    assert (tmp_path / "sheet.txt").read_text().split() == TRAINED
    assert Image.open(tmp_path / "sheet.png").size == (25 * 64, 64)


def test_loss_curves_of_the_stages_that_there_are_become_one_image(work: Path, tmp_path: Path) -> None:
    for file in ("vae.pt", "base.pt"):
        torch.save({"curve": [(50, 0.5), (100, 0.25)]}, work / file)

    run_script("tiny/plot.py", "--work", work, "--out", tmp_path / "loss.png")

    assert (tmp_path / "loss.png").is_file()


@pytest.mark.slow
def test_every_stage_of_training_continues_from_the_one_before(work: Path, tmp_path: Path) -> None:
    base, loras = ("--work", work, "--device", "cpu"), tmp_path / "loras"
    run_script("tiny/train_vae.py", *base, "--steps", "2", "--batch", "2")
    run_script("tiny/train.py", *base, "--images", "4", "--batch", "2", *ANIMALS)
    for style in ("ink", "gloss"):
        lora = ("--style", style, "--out", loras / f"{style}.safetensors")
        run_script("tiny/train_lora.py", *base, *lora, "--images", "2", "--batch", "2")
    few_step = loras / "few_step.safetensors"
    small = ("--images", "2", "--seeds", "1", "--batch", "2", "--loras", loras)

    run_script("tiny/train_few_step.py", *base, *small, "--out", few_step, "--strip", tmp_path / "strip.png")

    assert any(key.endswith("lora_A.weight") for key in load_file(few_step))
    assert (tmp_path / "strip.png").is_file()


@pytest.mark.slow
def test_an_exported_model_is_evaluated(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, model = ("--work", work), tmp_path / "model"
    run_script("tiny/train_vae.py", *base, "--device", "cpu", "--steps", "2", "--batch", "2")
    run_script("tiny/train.py", *base, "--device", "cpu", "--images", "2", "--batch", "2", *ANIMALS)
    capsys.readouterr()

    run_script("tiny/export.py", *base, "--out", model)
    exported = capsys.readouterr().out
    few_steps = ("--steps", "2", "1", "--reference")
    run_script("tiny/evaluate.py", *base, "--model", model, *few_steps, "--sheet", model / "s.png")

    assert " MB" in exported
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["steps"], line["names"]) for line in lines] == [(2, 6), (1, 6)]
    assert all("psnr" in line for line in lines)
    assert (model / "s.png").is_file()


@pytest.mark.slow
def test_the_shipped_loras_are_shown_at_rising_strength(tmp_path: Path) -> None:
    run_script("tiny/lora_strip.py", "--out", tmp_path / "strip.png")

    assert (tmp_path / "strip.png").is_file()


@pytest.mark.slow
def test_an_edit_lora_is_trained_on_and_measured(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = tmp_path / "edit.safetensors"
    training = ("--work", work, "--device", "cpu", "--batch", "2", "--out", lora)
    run_script("tiny/train_edit.py", *training, "--images", "2")
    run_script("tiny/train_edit.py", *training, "--images", "4")
    assert "resumed at 2 images" in capsys.readouterr().out

    measuring = ("--work", work, "--lora", lora, "--steps", "1", "--edits", "3d", "blue")
    run_script("tiny/evaluate_edit.py", *measuring, "--sheet", tmp_path / "sheet.png")

    of_3d, of_blue, of_all = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (of_3d["edit"], of_blue["edit"], of_blue["drawings"]) == ("3d", "blue", 2)
    assert 0 <= of_all["pairs"] <= 1
    # two drawings: the flat one, the 3-D one that was made and the one that it should be, and the blue one
    assert Image.open(tmp_path / "sheet.png").size == (4 * 128, 2 * 128)


@pytest.mark.slow
def test_edits_of_int8_and_float_are_compared(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--work", work, "--count", "2", "--steps", "1")

    run_script("tiny/edit_strip.py", *words, "--out", tmp_path / "strip.png")

    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["pairs"] == 2
    assert line["psnr_db"] > 20
    assert (tmp_path / "strip.png").is_file()
