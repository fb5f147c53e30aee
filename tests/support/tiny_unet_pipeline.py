"""A StableDiffusionPipeline with a few thousand random weights, whose denoiser is mostly convolutions."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from support.tiny_pipeline import build_clip
from transformers import CLIPTokenizer

TEXT_WIDTH = 768  # by which SD 1.x is told from others of its class


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,  # as the names of the model's authors are for
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def random_unet_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Seeded; 16x16 images make sense (latents 8x8)."""
    torch.manual_seed(seed)
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    return StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_clip(TEXT_WIDTH),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8),
        unet=build_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_unet_pipeline(folder: Path, seed: int = 0) -> Path:
    """The same as a diffusers folder."""
    random_unet_pipeline(seed).save_pretrained(folder)
    return folder
