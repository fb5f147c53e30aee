"""The configs of a model's denoisers, without its weights: where the index finds them, and of which class."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families.instances_modular import MINIMAX_H3_SIZES
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from int8run.models import config_source
from int8run.models.config_source import resolve_configs
from int8run.models.family import ModelSource
from int8run.models.pipeline_index import read_pipeline_index
from int8run.models.sampling import Sampling
from int8run.pipeline.denoiser_variants import choose_classes_of_configs

FULL, PRUNED = "MiniMaxH3Transformer3DModel", "MiniMaxH3PrunedTransformer3DModel"
PIPELINE = "MiniMaxH3ModularPipeline"


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_model(folder: Path, **origin: Any) -> Path:
    """A modular repository of which the index and the denoiser's config alone are here."""
    index = {"_class_name": PIPELINE, "transformer": ["diffusers", FULL, origin]}
    write_json(folder / "modular_model_index.json", index)
    write_json(folder / "transformer/config.json", {"_class_name": FULL, **MINIMAX_H3_SIZES})
    return folder


def make_source(location: object, **settings: Any) -> ModelSource:
    return ModelSource(str(location), "none", Sampling(), **settings)


def test_a_denoiser_in_another_folder_is_found_by_the_index(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "a", pretrained_model_name_or_path=str(tmp_path / "b"), subfolder="denoiser"
    )
    (tmp_path / "b").mkdir()
    shutil.move(folder / "transformer", tmp_path / "b/denoiser")

    resolved = resolve_configs(make_source(folder, skip_blocks=["decode"]))

    (denoiser,) = resolved.denoisers
    assert denoiser.weights == tmp_path / "b/denoiser" and denoiser.config["_class_name"] == FULL
    assert resolved.skip_blocks == ("decode",)


def test_a_denoiser_in_another_repository_is_asked_for_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(
        tmp_path / "a", pretrained_model_name_or_path="org/parts", subfolder="denoiser", revision="v2"
    )
    shutil.move(folder / "transformer/config.json", tmp_path)
    shutil.rmtree(folder / "transformer")
    asked = []

    def download(repository: str, name: str, subfolder: str, revision: str | None) -> str:
        asked.append((repository, subfolder, revision))
        if repository == "org/model":
            raise EntryNotFoundError("not there")
        return str(tmp_path / "config.json")

    monkeypatch.setattr(config_source, "hf_hub_download", download)
    monkeypatch.setattr(config_source, "download_index", lambda *_: folder)
    monkeypatch.setattr(config_source, "read_source_index", lambda _: read_pipeline_index(folder))

    (denoiser,) = resolve_configs(make_source("org/model", revision="v1")).denoisers

    assert denoiser.config["_class_name"] == FULL
    assert asked == [("org/model", "transformer", "v1"), ("org/parts", "denoiser", "v2")]


def test_a_pruned_file_that_is_here_gives_its_layers(tmp_path: Path) -> None:
    base, file = write_model(tmp_path / "a"), tmp_path / "pruned.safetensors"
    save_file({"adaln_t_table": torch.zeros(7, 8)}, file)

    (denoiser,) = choose_classes_of_configs(resolve_configs(make_source(file, base=str(base)))).denoisers

    assert denoiser.class_name == PRUNED
    assert (denoiser.config["curve_points"], denoiser.config["time_embed_dim"]) == (7, 8)


def test_without_its_weights_the_layers_are_said_to_be_those_of_the_repository(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (denoiser,) = choose_classes_of_configs(resolve_configs(make_source(write_model(tmp_path)))).denoisers

    assert denoiser.class_name == FULL
    assert f"its layers are those of the {FULL} that the repository names" in caplog.text
