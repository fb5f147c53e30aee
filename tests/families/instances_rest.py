"""Tiny random pipelines of further families: CogView 4, GLM-Image, JoyImage, PRX and Sana-Video.

Of diffusers' real classes, without a download.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    CogView4ControlPipeline,
    CogView4Pipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    PRXPipeline,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
)
from families import denoisers
from families.instances import SIZES, TEMPLATE, Instance, TextProcessor, image_vae, qwen3_vl, qwen_tokenizer
from families.instances_b import PLAIN, gemma, gemma_tokenizer
from families.instances_edit import make_image, make_instance
from families.instances_more import byte_t5
from transformers import (
    ByT5Tokenizer,
    GlmConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    GlmModel,
    Qwen2VLImageProcessor,
    Qwen3VLForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

IMAGE = make_image()


def cogview4_parts() -> dict[str, Any]:
    return {
        "tokenizer": qwen_tokenizer(),
        "text_encoder": GlmModel(GlmConfig(**SIZES)),
        "vae": image_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    }


def cogview4() -> DiffusionPipeline:
    return CogView4Pipeline(**cogview4_parts(), transformer=denoisers.cogview4())


def cogview4_control() -> DiffusionPipeline:
    return CogView4ControlPipeline(**cogview4_parts(), transformer=denoisers.cogview4_control())


class GemmaEncoder(T5GemmaEncoder):
    """Its config is that of one half of the model, which transformers does not read again."""


def prx() -> DiffusionPipeline:
    sizes = {
        **SIZES,
        "vocab_size": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "query_pre_attn_scalar": 16,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**sizes), decoder=T5GemmaModuleConfig(**sizes), vocab_size=8
    )
    return PRXPipeline(
        transformer=denoisers.prx(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=GemmaEncoder(config.encoder),
        tokenizer=gemma_tokenizer(),
        vae=image_vae(),
    )


def wan_vae(levels: int, channels: int) -> AutoencoderKLWan:
    """Latents are half as large with each level but the first."""
    return AutoencoderKLWan(
        base_dim=2 if levels > 4 else 4,
        z_dim=channels,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_spatial=2 ** (levels - 1),
        scale_factor_temporal=1,
    )


def sana_video_parts() -> dict[str, Any]:
    return {
        "tokenizer": gemma_tokenizer(),
        "text_encoder": gemma(),
        "vae": wan_vae(levels=4, channels=16),
        "transformer": denoisers.sana_video(),
    }


def sana_video() -> DiffusionPipeline:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return SanaVideoPipeline(**sana_video_parts(), scheduler=scheduler)


def sana_video_i2v() -> DiffusionPipeline:
    return SanaImageToVideoPipeline(**sana_video_parts(), scheduler=FlowMatchEulerDiscreteScheduler())


def joyimage_parts() -> dict[str, Any]:
    """A VAE 64 times smaller: these pipelines bring every image to about 1024 x 1024."""
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.5),
        "vae": wan_vae(levels=7, channels=4),
        "text_encoder": Qwen3VLForConditionalGeneration(qwen3_vl()),
        "tokenizer": qwen_tokenizer(),
        "processor": TextProcessor(images, qwen_tokenizer(), None, chat_template=TEMPLATE),
    }


def joyimage_edit() -> DiffusionPipeline:
    return JoyImageEditPipeline(**joyimage_parts(), transformer=denoisers.joyimage_edit())


def joyimage_edit_plus() -> DiffusionPipeline:
    return JoyImageEditPlusPipeline(**joyimage_parts(), transformer=denoisers.joyimage_edit_plus())


class TokenProcessor(GlmImageProcessor):
    """The tokens that the language model would draw are given, so it prepares nothing."""

    def __init__(self) -> None:
        self.image_processor = None


def glm_image() -> DiffusionPipeline:
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    sizes = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 256,
        "vision_vocab_size": 80,
        "eos_token_id": 65,
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "image_size": 32}
    tokens = {"embed_dim": 16, "num_embeddings": 64, "latent_channels": 16}
    language_model = GlmImageConfig(
        text_config=sizes,
        vision_config=vision,
        vq_config=tokens,
        image_token_id=259,
        image_start_token_id=64,
        image_end_token_id=65,
    )
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=TokenProcessor(),
        text_encoder=byte_t5(),
        vision_language_encoder=GlmImageForConditionalGeneration(language_model),
        vae=vae,
        transformer=denoisers.glm_image(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


SANA_CALL: dict[str, Any] = {
    **PLAIN,
    "frames": 5,
    "complex_human_instruction": [],
    "max_sequence_length": 12,
}
INSTANCES: dict[str, Instance] = {
    "cogview4": make_instance(
        "cogview4", CogView4Pipeline, cogview4, denoisers.cogview4, size=32, guidance=5.0, negative_prompt="b"
    ),
    "cogview4_control": make_instance(
        "cogview4",
        CogView4ControlPipeline,
        cogview4_control,
        denoisers.cogview4_control,
        size=32,
        guidance=5.0,
        control_image=make_image(32),
        negative_prompt="b",
    ),
    "prx": make_instance(
        "prx", PRXPipeline, prx, denoisers.prx, size=32, guidance=4.0, use_resolution_binning=False
    ),
    "sana_video": make_instance(
        "sana_video", SanaVideoPipeline, sana_video, denoisers.sana_video, size=64, guidance=6.0, **SANA_CALL
    ),
    "sana_video_i2v": make_instance(
        "sana_video",
        SanaImageToVideoPipeline,
        sana_video_i2v,
        denoisers.sana_video,
        size=64,
        guidance=6.0,
        image=IMAGE,
        **SANA_CALL,
    ),
    "joyimage_edit": make_instance(
        "joyimage",
        JoyImageEditPipeline,
        joyimage_edit,
        denoisers.joyimage_edit,
        guidance=4.0,
        image=IMAGE,
    ),
    "joyimage_edit_plus": make_instance(
        "joyimage",
        JoyImageEditPlusPipeline,
        joyimage_edit_plus,
        denoisers.joyimage_edit_plus,
        guidance=4.0,
        images=[IMAGE, make_image(shade=200)],
    ),
    "glm_image": make_instance(
        "glm_image",
        GlmImagePipeline,
        glm_image,
        denoisers.glm_image,
        size=32,
        guidance=1.5,
        prior_token_ids=torch.arange(64).reshape(1, 64),
    ),
}
