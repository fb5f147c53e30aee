"""What is known of a pipeline without the hub: by the table, by a folder, and what is refused by it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from int8run.errors import ConfigError
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import InputFile, SampleInputs
from int8run.models import model_folders
from int8run.models.family import ModelSource, read_model_options
from int8run.models.pipeline_class import get_pipeline_class
from int8run.models.repository_pipelines import find_named_pipeline, load_repository_pipelines
from int8run.models.sampling import Sampling
from int8run.models.source import check_known_pipeline
from int8run.pipeline.sample_checks import check_samples

SDXL = ModelSource("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", Sampling(steps=2))


@pytest.fixture
def no_hub(monkeypatch):
    """Asking the hub for anything is a failure."""

    def refuse(*args, **kwargs):
        pytest.fail("the hub was asked")

    monkeypatch.setattr(model_folders, "check_repository", refuse)
    monkeypatch.setattr(model_folders, "download_index", refuse)


def test_every_class_of_the_table_is_a_pipeline_of_diffusers():
    for name in set(load_repository_pipelines().values()):
        assert get_pipeline_class(name) is not DiffusionPipeline, name


def test_table_names_repositories_of_models_without_a_pipeline_alone():
    named = {option.location for option in read_model_options().values() if option.pipeline is None}
    assert set(load_repository_pipelines()) <= named


def test_class_is_that_of_the_folder_or_of_the_base_of_a_single_file(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    assert find_named_pipeline(replace(SDXL, location=str(tmp_path))) == "WanPipeline"
    assert find_named_pipeline(SDXL) == "StableDiffusionXLPipeline"
    assert find_named_pipeline(replace(SDXL, location="file.safetensors", base="Qwen/Qwen-Image")) == (
        "QwenImagePipeline"
    )


def test_class_of_another_revision_or_repository_is_not_known(tmp_path):
    assert find_named_pipeline(replace(SDXL, revision="refs/pr/1")) is None
    assert find_named_pipeline(replace(SDXL, location="org/unknown")) is None
    (tmp_path / "model_index.json").write_text("{")
    assert find_named_pipeline(replace(SDXL, location=str(tmp_path))) is None


def test_wrong_mode_is_refused_without_the_hub(no_hub):
    with pytest.raises(
        ConfigError,
        match=r"^model\.mode=edit does not exist for a checkpoint of StableDiffusionXLPipeline; it has "
        r"text_to_image .*img2img .*; these have it: model=tiny_edit, model=",
    ):
        check_known_pipeline(replace(SDXL, mode="edit"))


def test_wrong_input_is_refused_without_the_hub(no_hub):
    file = InputFile("x.png", Path("x.png"), "0", place="prompts.image")
    sample = Sample("a", 0, "0", inputs=SampleInputs({"image": (file,)}))
    with pytest.raises(
        ConfigError,
        match=r"StableDiffusionXLPipeline takes no image and no video; for image: model\.mode=img2img or ",
    ):
        check_samples(SDXL, [sample], Sampling(), SDXL.sampling)
