"""A FluxPipeline with a few thousand random weights, built from diffusers' real classes: for tests of the
path, not of images.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WIDE = 256  # of text encoders with more than one block of every format in a row


def build_clip(width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=4,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def build_t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=8,
        d_model=width,
        d_kv=width // 2,
        d_ff=width,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.0,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer(text_width: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        axes_dims_rope=(4, 6, 6),
    )


def random_pipeline(seed: int = 0, text: int = 16) -> FluxPipeline:
    """Seeded; 32x32 images at most make sense (latents 16x16, packed 8x8).

    Text: width of the text encoders.
    """
    torch.manual_seed(seed)
    # the order in which the parts are built decides their weights
    vae = build_vae()
    transformer = build_transformer(text)
    clip = build_clip(text)
    t5 = build_t5(text)

    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8),
        text_encoder_2=t5,
        tokenizer_2=T5Tokenizer(extra_ids=0, model_max_length=8),
        transformer=transformer,
    )


def save_random_pipeline(folder: Path, seed: int = 0, text: int = 16) -> Path:
    """The same as a diffusers folder."""
    random_pipeline(seed, text).save_pretrained(folder)
    return folder
