"""Files of models that diffusers has no class for: inspect names them, quantize works all the same."""

from pathlib import Path

import pytest
import torch
from families.cases import quantize_alone, read_file, write_file

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.reader import TensorFiles
from int8run.models.detect_family import detect_denoiser, find_model_without_class, read_models_without_class
from int8run.models.family import load_families
from int8run.tasks.inspect_checkpoint import describe_checkpoint

# Wan's names, which those that are built on it have as well
WAN = ["head.modulation", "text_embedding.0.weight", "blocks.0.cross_attn.k.weight"]
FILES = {
    "SeedVR2": ["vid_in.proj.weight", "emb_in.proj_in.weight", "blocks.0.attn.proj_qkv.vid.weight"],
    "SCAIL-2": [*WAN, "patch_embedding_pose.weight", "patch_embedding_mask.weight"],
    "SCAIL": [*WAN, "patch_embedding_pose.weight"],
    "Wan 2.2 S2V": [*WAN, "casual_audio_encoder.weights"],
    "Wan 2.2 camera control": [*WAN, "control_adapter.conv.weight"],
    "Chroma Radiance": [
        "distilled_guidance_layer.in_proj.weight",
        "nerf_blocks.0.param_generator.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ],
}


@pytest.mark.parametrize("name", FILES)
def test_a_model_without_a_class_is_named_and_is_no_family(name: str) -> None:
    assert find_model_without_class(FILES[name]) == name
    assert detect_denoiser(FILES[name], load_families().values()) is None


def test_every_model_without_a_class_has_a_file_here() -> None:
    assert set(FILES) == set(read_models_without_class())


def test_models_with_a_class_are_not_named() -> None:
    assert find_model_without_class(WAN) is None


def test_inspect_says_what_it_is_and_quantize_works(tmp_path: Path) -> None:
    tensors = {key: torch.randn(32, 32) for key in FILES["SeedVR2"]}
    for i in range(4):
        tensors[f"blocks.{i}.attn.proj_qkv.vid.weight"] = torch.randn(96, 32)
        tensors[f"blocks.{i}.mlp.vid.proj_in.weight"] = torch.randn(64, 32)
    file = write_file(tensors, tmp_path / "seedvr2.safetensors")

    with TensorFiles.open(file) as files:
        facts = dict(describe_checkpoint(files, DeclaredFormat("auto", None)))
    quantize_alone(file, tmp_path / "int8.safetensors", tmp_path)

    assert facts["family"].startswith("none: this is SeedVR2, which diffusers has no class for")
    written = read_file(tmp_path / "int8.safetensors")
    int8 = {key for key, value in written.items() if value.dtype == torch.int8}
    layers = ("attn.proj_qkv.vid", "mlp.vid.proj_in")
    assert int8 == {f"blocks.{i}.{layer}.weight" for i in (1, 2) for layer in layers}
