"""Files of models that diffusers has no class for: inspect names them, quantize works all the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from families.cases import quantize_alone, read_file, write_file

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.reader import TensorFiles
from int8run.models.detect_family import detect_denoiser, find_model_without_class, read_models_without_class
from int8run.models.family import load_families
from int8run.tasks.inspect_checkpoint import describe_checkpoint

# names of the models that others are built on, by which these were taken for them
WAN = ["head.modulation", "text_embedding.0.weight", "blocks.0.cross_attn.k.weight"]
QWEN = [
    "txt_norm.weight",
    "transformer_blocks.0.img_mod.1.weight",
    "transformer_blocks.0.txt_mod.1.weight",
    "proj_out.weight",
]
LUMINA = [
    "time_caption_embed.caption_embedder.1.weight",
    "context_refiner.0.attn.to_q.weight",
    "norm_out.linear_2.weight",
]
CAPTION = ["cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", "t_embedder.mlp.2.weight"]
Z_IMAGE = [*CAPTION, "layers.0.adaLN_modulation.0.weight", "layers.0.attention.qkv.weight"]
PADDING = ["x_pad_token", "cap_pad_token"]
FILES = {
    "MOSS-Image": [
        "shared_block_modulation.weight",
        "text_embedder.proj.weight",
        "text_embedder.blocks.0.qkv.weight",
        "layers.0.norm1.weight",
        "layers.0.proj.qkv.weight",
        "layers.0.proj.ffn_up_gate.weight",
    ],
    "SeedVR2": ["vid_in.proj.weight", "emb_in.proj_in.weight", "blocks.0.attn.proj_qkv.vid.weight"],
    "SCAIL-2": [*WAN, "patch_embedding_pose.weight", "patch_embedding_mask.weight"],
    "SCAIL": [*WAN, "patch_embedding_pose.weight"],
    "Wan 2.2 S2V": [*WAN, "casual_audio_encoder.weights"],
    "Wan 2.2 camera control": [*WAN, "control_adapter.conv.weight"],
    "HuMo": [*WAN, "audio_proj.audio_proj_glob_1.layer.bias"],
    "WanDancer": [*WAN, "patch_embedding_global.weight"],
    "Mage-Flow": QWEN,
    "Lens": [
        *QWEN,
        "transformer_blocks.0.attn.norm_added_q.weight",
        "transformer_blocks.0.img_mlp.w1.weight",
    ],
    "Ming-Image Design": Z_IMAGE,
    "Ming-Image Layer": [*Z_IMAGE, *PADDING, "__ming_image__"],
    "Z-Image in pixels": [*Z_IMAGE, *PADDING, "dec_net.cond_embed.weight"],
    "Z-Image L2P": [*Z_IMAGE, *PADDING, "local_decoder.0.weight"],
    "NewBie-Image": [*CAPTION, "layers.0.adaLN_modulation.1.weight", "clip_text_pooled_proj.0.weight"],
    "OmniGen2": [
        *LUMINA,
        "ref_image_patch_embedder.weight",
        "image_index_embedding",
        "ref_image_refiner.0.attn.to_q.weight",
    ],
    "Boogu-Image": [
        *LUMINA,
        "ref_image_patch_embedder.weight",
        "image_index_embedding",
        "ref_image_refiner.0.attn.to_q.weight",
        "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight",
    ],
    "Chroma Radiance": [
        "distilled_guidance_layer.in_proj.weight",
        "nerf_blocks.0.param_generator.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ],
    "PixelDiT": ["core.pixel_embedder.proj.weight", "core.pixel_blocks.0.attn.qkv.weight"],
    "PiD": ["pixel_embedder.proj.weight", "pixel_blocks.0.attn.qkv.weight", "lq_proj.latent_proj.0.weight"],
    "HiDream-O1": ["t_embedder1.mlp.0.weight", "x_embedder.proj1.weight"],
    "SenseNova U1.5": [
        "fm_modules.vision_model_mot_gen.embeddings.patch_embedding.weight",
        "language_model.model.layers.0.self_attn.q_proj_mot_gen.weight",
    ],
}
# what alone tells some of them from others with the very same names
ROWS = {"Mage-Flow": {"txt_norm.weight": 2560, "proj_out.weight": 128}}


def make_shapes(keys: Sequence[str], rows: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {key: (rows.get(key, 8), 8) for key in keys}


@pytest.mark.parametrize("name", FILES)
def test_a_model_without_a_class_is_named_and_is_no_family(name: str) -> None:
    shapes = make_shapes(FILES[name], ROWS.get(name, {}))

    assert find_model_without_class(shapes, shapes) == name
    assert detect_denoiser(shapes, load_families().values(), shapes) is None


def test_every_model_without_a_class_has_a_file_here() -> None:
    assert set(FILES) == set(read_models_without_class())


@pytest.mark.parametrize(
    ("family", "keys", "rows"),
    [
        ("wan", WAN, {}),
        ("qwen_image", QWEN, {"txt_norm.weight": 3584, "proj_out.weight": 64}),
        ("lumina2", LUMINA, {}),
        ("z_image", [*Z_IMAGE, *PADDING], {}),
    ],
)
def test_models_with_a_class_are_not_named(family: str, keys: Sequence[str], rows: Mapping[str, int]) -> None:
    shapes = make_shapes(keys, rows)

    detected = detect_denoiser(shapes, load_families().values(), shapes)

    assert find_model_without_class(shapes, shapes) is None
    assert detected is not None
    assert detected[0].name == family


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
