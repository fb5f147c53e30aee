"""`model_type.keep_blocks`: blocks at both ends stay float, in a run and from file to file."""

import csv
from pathlib import Path

import pytest
from support.cli_process import command_in

from int8run.checkpoints.header import read_header
from int8run.utils.paths import ASSETS_FOLDER

TINY = ASSETS_FOLDER / "tiny" / "transformer"
FIRST, LAST = "kept float: block 0 of the first 1", "kept float: block 4 of the last 1"
SMALL = ["sampler.height=16", "sampler.width=16", "sampler.steps=2", "prompts.prompts=[a]"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    with command_in(tmp_path / "here", monkeypatch, capsys) as run:
        yield run


def read_reasons(out: Path) -> dict[str, str]:
    """Why each layer of a job stays float; empty for those that do not."""
    with (out / "layers.csv").open() as file:
        return {row["name"]: row["why_not"] for row in csv.DictReader(file)}


def test_a_run_and_a_file_keep_the_same_blocks(command, tmp_path: Path) -> None:
    keep = "model_type.keep_blocks=first:1,last:1"
    words = ["tracker=none", "cache.limit_gb=0", keep]
    command(*words, *SMALL, "metrics.baseline=none", f"hydra.run.dir={tmp_path / 'run'}")
    saved = tmp_path / "saved"
    place = f"hydra.run.dir={tmp_path / 'file'}"
    command("task=quantize", *words, f"model.location={TINY}", f"save={saved}", place)

    reasons = read_reasons(tmp_path / "run")
    kept = {name: reason for name, reason in reasons.items() if reason.startswith("kept float")}
    assert {reason for name, reason in kept.items() if name.startswith("transformer_blocks.0.")} == {FIRST}
    assert set(kept.values()) == {FIRST, LAST}
    of_file = {name: reason for name, reason in read_reasons(tmp_path / "file").items() if name in kept}
    with_weights = {name: reason for name, reason in kept.items() if not name.endswith(".attn")}
    assert of_file == with_weights, "an attention has no weights, and no row from file to file"
    (file,) = saved.glob("*.safetensors")
    entries, _ = read_header(file)
    assert not any(name.startswith("transformer_blocks.0.") and "scale" in name for name in entries)


def test_more_blocks_than_there_are_is_an_error(command) -> None:
    outcome = command("tracker=none", *SMALL, "model_type.keep_blocks={first:90}")

    assert outcome.code == 2
    assert "keeps 90 blocks float, and the denoiser has" in outcome.message
