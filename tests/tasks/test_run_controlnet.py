"""A run with a ControlNet beside the checkpoint: INT8 in the compared model alone, and said everywhere."""

import csv
import logging

import pytest
import torch
from diffusers import ControlNetModel, ZImageControlNetModel
from families.instances import z_image
from PIL import Image
from support.run_job import run_job
from support.tiny_unet_pipeline import build_unet, save_unet_pipeline
from torch import nn

from int8run.pipeline import process_cache

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = [
    "model.dtype=float32",
    "sampler.steps=2",
    "prompts.prompts=[a]",
    "tracker=none",
    "backend=reference",
    "int8.small_batch_fallback=never",
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """A run with a ControlNet whose projections are no zeros, as those of a new one are."""
    home = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(build_unet(), conditioning_embedding_out_channels=(8, 8))
    for parameter in controlnet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    controlnet.save_pretrained(home / "control")
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(home / "edges.png")
    return [
        f"model.location={save_unet_pipeline(home / 'base')}",
        f"model.parts.controlnet=[ControlNetModel,{home / 'control'}]",
        "model.mode=control",
        f"prompts.control_image={home / 'edges.png'}",
        "sampler.height=16",
        "sampler.width=16",
        *SETTINGS,
    ]


def read_controlnet_rows(folder):
    with (folder / "layers.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["name"].startswith("controlnet.")]


@pytest.mark.slow
def test_controlnet_is_int8_in_the_compared_model_alone(overrides, tmp_path, caplog):
    process_cache.clear()
    with caplog.at_level(logging.INFO):
        int8 = run_job([*overrides, "progress=false"], tmp_path / "int8")
    process_cache.clear()
    left_float = run_job([*overrides, "int8.controlnet=float"], tmp_path / "float")

    assert int8.baseline.images[0].tobytes() == left_float.baseline.images[0].tobytes()
    assert int8.candidate.images[0].tobytes() != left_float.candidate.images[0].tobytes()
    assert int8.metrics["quality/psnr_db"] > 25
    assert int8.metrics["controlnet/layers_int8"] > 5
    assert left_float.metrics["controlnet/layers_int8"] == 0
    assert int8.metrics["memory/controlnet_bytes"] < left_float.metrics["memory/controlnet_bytes"]
    rows = read_controlnet_rows(tmp_path / "int8")
    assert {row["quantized"] for row in rows} == {"true", "false"}
    assert all(row["why_not"] or float(row["output_sqnr_db"]) > 20 for row in rows)
    assert {row["why_not"] for row in read_controlnet_rows(tmp_path / "float")} == {"int8.controlnet=float"}


@pytest.mark.slow
def test_controlnet_that_shares_layers_with_the_denoiser_runs_without_the_float_one(tmp_path):
    pipe = z_image()
    pipe.save_pretrained(tmp_path / "base")
    sizes = {name: pipe.transformer.config[name] for name in ("dim", "n_heads", "n_kv_heads")}
    controlnet = ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=pipe.transformer.config.in_channels,
        n_refiner_layers=1,
        **sizes,
    )
    controlnet.save_pretrained(tmp_path / "control")
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(tmp_path / "edges.png")
    words = [
        *SETTINGS,
        f"model.location={tmp_path / 'base'}",
        "model.pipeline=ZImageControlNetPipeline",
        f"model.parts.controlnet=[ZImageControlNetModel,{tmp_path / 'control'}]",
        f"prompts.control_image={tmp_path / 'edges.png'}",
        "sampler.height=32",
        "sampler.width=32",
    ]

    process_cache.clear()
    alone = run_job([*words, "metrics.baseline=none"], tmp_path / "alone")
    process_cache.clear()
    beside = run_job(words, tmp_path / "beside")

    assert alone.candidate.images[0].tobytes() == beside.candidate.images[0].tobytes()
    assert alone.metrics["controlnet/layers_int8"] > 5
