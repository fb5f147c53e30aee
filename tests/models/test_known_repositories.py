"""The sizes in known_repositories.yaml, counted on the meta device from classes with published configs."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

from int8run.models.hub import read_known_repositories

Part = Callable[[], nn.Module]


def make_diffusers_model(name: str, **config: Any) -> Part:
    """A model of diffusers; without a config by its defaults, which are those of the first checkpoint."""
    return lambda: getattr(diffusers, name)(**config)


def make_text_encoder(name: str, config_name: str, **config: Any) -> Part:
    """A model of transformers."""
    return lambda: getattr(transformers, name)(getattr(transformers, config_name)(**config))


CLIP_L = make_text_encoder(
    "CLIPTextModel",
    "CLIPTextConfig",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)
CLIP_L_PROJECTED = make_text_encoder(
    "CLIPTextModelWithProjection",
    "CLIPTextConfig",
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)
CLIP_G = make_text_encoder(
    "CLIPTextModelWithProjection",
    "CLIPTextConfig",
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
)
T5_XXL = make_text_encoder(
    "T5EncoderModel",
    "T5Config",
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
)
UMT5_XXL = make_text_encoder(
    "UMT5EncoderModel",
    "UMT5Config",
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=24,
    vocab_size=256384,
    feed_forward_proj="gated-gelu",
)
GEMMA_2B = make_text_encoder(
    "Gemma2Model",
    "Gemma2Config",
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=256000,
)
QWEN_3_4B = make_text_encoder(
    "Qwen3Model",
    "Qwen3Config",
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)
QWEN_VL_7B = make_text_encoder(
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLConfig",
    text_config={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    vision_config={
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    tie_word_embeddings=False,
)
VAE_BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
SD_VAE = make_diffusers_model("AutoencoderKL", **VAE_BLOCKS, latent_channels=4)
SD3_VAE = make_diffusers_model(
    "AutoencoderKL", **VAE_BLOCKS, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
)
WAN_VAE = make_diffusers_model("AutoencoderKLWan")
SDXL_UNET = make_diffusers_model(
    "UNet2DConditionModel",
    block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def make_sd3_transformer(num_layers: int, **config: Any) -> Part:
    """The transformer of a Stable Diffusion 3, whose width is 64 for each layer."""
    return make_diffusers_model(
        "SD3Transformer2DModel",
        num_layers=num_layers,
        num_attention_heads=num_layers,
        caption_projection_dim=64 * num_layers,
        pos_embed_max_size=192,
        **config,
    )


SD3_ENCODERS = (CLIP_L_PROJECTED, CLIP_G, T5_XXL, SD3_VAE)
SD35_LARGE = (make_sd3_transformer(38, qk_norm="rms_norm"), *SD3_ENCODERS)
SDXL = (SDXL_UNET, CLIP_L, CLIP_G, SD_VAE)
WAN_14B = make_diffusers_model("WanTransformer3DModel")
FLUX_REST = (T5_XXL, CLIP_L, SD3_VAE)
PIXART = (make_diffusers_model("PixArtTransformer2DModel"), T5_XXL, SD_VAE)
QWEN_IMAGE = (
    make_diffusers_model("QwenImageTransformer2DModel"),
    QWEN_VL_7B,
    make_diffusers_model("AutoencoderKLQwenImage"),
)
CHROMA = (make_diffusers_model("ChromaTransformer2DModel"), T5_XXL, SD3_VAE)
Z_IMAGE = (make_diffusers_model("ZImageTransformer2DModel"), QWEN_3_4B, SD3_VAE)
FLUX_DEV = (make_diffusers_model("FluxTransformer2DModel", guidance_embeds=True), *FLUX_REST)
PARTS: Mapping[str, tuple[Part, ...]] = {
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-Krea-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-schnell": (make_diffusers_model("FluxTransformer2DModel"), *FLUX_REST),
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/sdxl-turbo": SDXL,
    "stabilityai/stable-diffusion-3-medium-diffusers": (make_sd3_transformer(24), *SD3_ENCODERS),
    "stabilityai/stable-diffusion-3.5-large": SD35_LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": SD35_LARGE,
    "PixArt-alpha/PixArt-XL-2-1024-MS": PIXART,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": PIXART,
    "Qwen/Qwen-Image": QWEN_IMAGE,
    "Qwen/Qwen-Image-2512": QWEN_IMAGE,
    "lodestones/Chroma1-HD": CHROMA,
    "lodestones/Chroma1-Base": CHROMA,
    "Tongyi-MAI/Z-Image": Z_IMAGE,
    "Tongyi-MAI/Z-Image-Turbo": Z_IMAGE,
    "Alpha-VLLM/Lumina-Image-2.0": (
        make_diffusers_model("Lumina2Transformer2DModel"),
        GEMMA_2B,
        SD3_VAE,
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        make_diffusers_model("WanTransformer3DModel", num_attention_heads=12, ffn_dim=8960, num_layers=30),
        UMT5_XXL,
        WAN_VAE,
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (WAN_14B, UMT5_XXL, WAN_VAE),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (WAN_14B, WAN_14B, UMT5_XXL, WAN_VAE),
}


def count_parameters(part: Part) -> int:
    """Of a model that is never in memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in part().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("repository", PARTS)
def test_a_size_is_that_of_the_classes(repository: str) -> None:
    billions = sum(map(count_parameters, PARTS[repository])) / 1e9

    assert read_known_repositories()[repository].parameters_b == pytest.approx(billions, abs=0.006)


def test_every_size_is_counted() -> None:
    assert set(read_known_repositories()) == set(PARTS)
