"""`task=quantize task.component=vae`: the file is the one that `save=` of a run writes, and is read back."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_process import Command, command_in

from int8run.checkpoints.header import read_header
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.tasks.inspect_file import inspect_file
from int8run.utils.paths import ASSETS_FOLDER

VAE = ASSETS_FOLDER / "tiny" / "vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUANTIZE = ["task=quantize", "model=tiny", "task.component=vae", "tracker=none"]
SMALL = ["sampler.height=64", "sampler.width=64", "sampler.steps=1", "prompts.prompts=[a]", "tracker=none"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with command_in(tmp_path / "here", monkeypatch, capsys) as run:
        yield run


def test_the_file_is_that_of_a_run_to_the_bit_and_is_read_back(command: Command, tmp_path: Path) -> None:
    saved, streamed = tmp_path / "saved", tmp_path / "streamed"
    run = [*SMALL, "int8.vae=int8", "cache.limit_gb=0", "metrics.baseline=none"]
    made_by_run = command(*run, f"save={saved}")
    assert made_by_run.code == 0, made_by_run.err
    outcome = command(*QUANTIZE, f"save={streamed}", f"hydra.run.dir={tmp_path / 'out'}")

    assert outcome.code == 0, outcome.err
    expected, made = load_file(saved / "vae" / WEIGHTS), load_file(streamed / WEIGHTS)
    assert expected.keys() == made.keys()
    for name, tensor in expected.items():
        # what stays float has the dtype of its source, and in a run that of the model
        assert torch.equal(tensor.float(), made[name].float()), name
        assert tensor.dtype == made[name].dtype or made[name].dtype == torch.float16, name
    # built of the same config
    configs = [json.loads((folder / "config.json").read_text()) for folder in (VAE, streamed)]
    assert configs[0] == configs[1]
    assert (streamed / "card.md").is_file()
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"linear", "conv"}
    assert {row["why_not"] for row in rows if row["quantized"] == "false"} >= {
        "first convolution of the decoder"
    }
    used = command(*run, f"model.parts.vae=[AutoencoderKL,{streamed}]")
    assert used.code == 0, used.err


def test_a_file_says_what_it_is(command: Command, tmp_path: Path) -> None:
    command(*QUANTIZE, f"save={tmp_path / 'vae'}", "rounding=mse")

    rows = dict(inspect_file(str(tmp_path / "vae")).rows)
    assert rows["VAE"] == "AutoencoderKL"
    _, metadata = read_header(tmp_path / "vae" / WEIGHTS)
    provenance = json.loads(metadata[PROVENANCE_KEY])
    assert (provenance["vae"], provenance["rounding"], provenance["outlier"]) == (
        "AutoencoderKL",
        "mse",
        "none",
    )


def test_a_vae_alone_and_a_part_of_a_model_are_sources_too(command: Command, tmp_path: Path) -> None:
    alone, part = tmp_path / "alone", tmp_path / "part"
    assert command(*QUANTIZE, f"model.location={VAE}", f"save={alone}").code == 0
    copied = command(*QUANTIZE, f"model.parts.vae=[AutoencoderKL,{alone}]", f"save={part}")
    assert copied.code == 0, copied.err
    assert "layers are INT8 in the source, copied as they are" in copied.out

    first, second = load_file(alone / WEIGHTS), load_file(part / WEIGHTS)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), "integers are copied"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["save=x.safetensors"],
            "a VAE is written as a folder, whose config names its class; set save=my-vae",
        ),
        (["save=x", "outlier=convrot"], "outlier=convrot: the layers of a VAE are plain INT8"),
        (["save=x", "rounding=gptq"], "rounding=gptq needs calibration images"),
        (
            ["save=x", "int8.bits=4", "outlier=convrot"],
            "int8.bits=4: the layers of a VAE have 8 bits, as int8.vae=int8 makes them; set int8.bits=8",
        ),
        (["save=x", "clip=int8_rowwise"], "task=quantize writes one component"),
        (["save=x", "model.location=./missing"], "no such folder; task.component=vae takes the folder of a"),
        ([f"save={VAE}"], "holds the source itself; choose another folder"),
        ([f"save={VAE}/../vae"], "holds the source itself; choose another folder"),
    ],
)
def test_what_a_vae_cannot_have_is_refused(command: Command, words: list[str], message: str) -> None:
    outcome = command(*QUANTIZE, *words)

    assert outcome.code != 0
    assert message in outcome.message


def test_settings_of_denoisers_are_named(command: Command, tmp_path: Path) -> None:
    ignored = ["int8.convolutions=float", "model_type.keep_blocks=first:1"]

    outcome = command(*QUANTIZE, *ignored, f"save={tmp_path / 'x'}")

    assert outcome.code == 0, outcome.err
    assert "task.component=vae ignores int8.convolutions, model_type.keep_blocks" in outcome.out


def test_tensors_of_another_naming_are_refused(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text((VAE / "config.json").read_text())
    tensors = load_file(VAE / WEIGHTS)
    tensors["decoder.old.weight"] = tensors.pop("decoder.conv_in.weight")
    save_file(tensors, folder / WEIGHTS)

    outcome = command(*QUANTIZE, f"model.location={folder}", f"save={tmp_path / 'x'}")

    assert "has decoder.old.weight, which AutoencoderKL does not have under this name" in outcome.message
