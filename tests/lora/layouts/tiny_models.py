"""Tiny models of diffusers' and transformers' own classes, for which the LoRA files are made."""

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def make_tiny_models() -> dict[str, dict[str, nn.Module]]:
    """Base -> component -> model, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux, unet = make_tiny_flux(), make_tiny_unet()
        clip_config = make_clip_config()
        clip, clip_2 = CLIPTextModel(clip_config), CLIPTextModelWithProjection(clip_config)
    for model in (flux, unet, clip, clip_2):
        model.eval().requires_grad_(False)
    return {
        "flux": {"denoiser": flux, "text_encoder": clip},
        "sdxl": {"denoiser": unet, "text_encoder": clip, "text_encoder_2": clip_2},
    }


def make_tiny_flux() -> FluxTransformer2DModel:
    """FLUX.1 with two blocks of each kind."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def make_tiny_unet() -> UNet2DConditionModel:
    """SDXL's UNet with two levels."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def make_clip_config() -> CLIPTextConfig:
    """CLIP's text encoder with two layers."""
    return CLIPTextConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=6,
        bos_token_id=0,
        eos_token_id=1,
    )
