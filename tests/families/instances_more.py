"""Tiny random pipelines of further families: Hunyuan's, Ideogram, FIBO, Kandinsky, LongCat, Ovis.

Of diffusers' real classes, without a download.
"""

from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    BriaFibo2Pipeline,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    Ideogram4Pipeline,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    OvisImagePipeline,
)
from families import denoisers
from families.instances import (
    LENGTH,
    ROPE,
    SIZES,
    TEMPLATE,
    Instance,
    TextProcessor,
    flux2_vae,
    image_vae,
    qwen_image,
    qwen_tokenizer,
)
from families.instances_b import clip_config, clip_tokenizer
from families.instances_edit import ImageProcessor, make_image, make_instance, make_mask, qwen_processor
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

IMAGE, MASK = make_image(), make_mask()


def qwen_text() -> Qwen2_5_VLTextModel:
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**sizes, **ROPE))


def qwen_vl() -> nn.Module:
    """A language model that sees images."""
    return qwen_image().text_encoder


def deep_qwen3_vl() -> Qwen3VLConfig:
    """As many layers as are read of the real one."""
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**SIZES, **ROPE, "num_hidden_layers": 36}
    return Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=259, video_token_id=260)


def byte_t5() -> T5EncoderModel:
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, use_cache=False)
    return T5EncoderModel(config)


def hunyuan_video15_parts() -> dict[str, Any]:
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    )
    return {
        "vae": vae,
        "text_encoder": qwen_text(),
        "tokenizer": qwen_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": byte_t5(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def hunyuan_video15() -> DiffusionPipeline:
    return HunyuanVideo15Pipeline(**hunyuan_video15_parts(), transformer=denoisers.hunyuan_video15())


def hunyuan_video15_i2v() -> DiffusionPipeline:
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **hunyuan_video15_parts(),
        transformer=denoisers.hunyuan_video15_i2v(),
        image_encoder=SiglipVisionModel(config),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )


def hunyuan_image_parts() -> dict[str, Any]:
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=1.0,
    )
    return {
        "vae": vae,
        "text_encoder": qwen_vl(),
        "tokenizer": qwen_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": byte_t5(),
        "tokenizer_2": ByT5Tokenizer(),
    }


def hunyuan_image() -> DiffusionPipeline:
    return HunyuanImagePipeline(
        **hunyuan_image_parts(),
        transformer=denoisers.hunyuan_image(),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )


def hunyuan_image_distilled() -> DiffusionPipeline:
    return HunyuanImagePipeline(**hunyuan_image_parts(), transformer=denoisers.hunyuan_image_distilled())


def ideogram4() -> DiffusionPipeline:
    """The two denoisers have weights of their own; both are called in every step."""
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=Qwen3VLModel(deep_qwen3_vl()),
        tokenizer=qwen_tokenizer(),
        transformer=denoisers.ideogram4(),
        unconditional_transformer=denoisers.ideogram4(),
    )


def fibo2() -> DiffusionPipeline:
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=64 * 64)
    return BriaFibo2Pipeline(
        transformer=denoisers.fibo2(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=Qwen3VLForConditionalGeneration(deep_qwen3_vl()),
        processor=TextProcessor(images, qwen_tokenizer(), None, chat_template=TEMPLATE),
    )


def kandinsky5_parts(processor: ImageProcessor) -> dict[str, Any]:
    """Its pooled text is always 77 tokens long."""
    config = clip_config()
    config.max_position_embeddings = 77
    return {
        "text_encoder": qwen_vl(),
        "tokenizer": processor,
        "text_encoder_2": CLIPTextModel(config),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def coarse_image_vae() -> nn.Module:
    """Its pipelines take latents as 8 times smaller, and bring images to about 1024 x 1024."""
    return image_vae(levels=4)


def video_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def kandinsky5_t2i() -> DiffusionPipeline:
    parts = kandinsky5_parts(qwen_processor())
    return Kandinsky5T2IPipeline(transformer=denoisers.kandinsky5(), vae=coarse_image_vae(), **parts)


def kandinsky5_i2i() -> DiffusionPipeline:
    parts = kandinsky5_parts(qwen_processor())
    return Kandinsky5I2IPipeline(transformer=denoisers.kandinsky5_cond(), vae=coarse_image_vae(), **parts)


def kandinsky5_t2v() -> DiffusionPipeline:
    parts = kandinsky5_parts(qwen_processor())
    return Kandinsky5T2VPipeline(transformer=denoisers.kandinsky5_cond(), vae=video_vae(), **parts)


def kandinsky5_i2v() -> DiffusionPipeline:
    parts = kandinsky5_parts(qwen_processor())
    return Kandinsky5I2VPipeline(transformer=denoisers.kandinsky5_cond(), vae=video_vae(), **parts)


def longcat_parts(vae: nn.Module) -> dict[str, Any]:
    """Its pipelines count on 16 channels of latents."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae,
        "text_encoder": qwen_vl(),
        "tokenizer": qwen_tokenizer(),
        "text_processor": qwen_processor(),
        "transformer": denoisers.longcat_image(),
    }


def longcat_image() -> DiffusionPipeline:
    return LongCatImagePipeline(**longcat_parts(image_vae(channels=16)))


def longcat_image_edit() -> DiffusionPipeline:
    """It brings every image to about 1024 x 1024."""
    return LongCatImageEditPipeline(**longcat_parts(image_vae(channels=16, levels=7)))


def ovis_image() -> DiffusionPipeline:
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**SIZES)),
        tokenizer=qwen_tokenizer(),
        transformer=denoisers.ovis_image(),
    )


INSTANCES: dict[str, Instance] = {
    "hunyuan_video15": make_instance(
        "hunyuan_video15",
        HunyuanVideo15Pipeline,
        hunyuan_video15,
        denoisers.hunyuan_video15,
        size=32,
        num_frames=5,
    ),
    "hunyuan_video15_i2v": make_instance(
        "hunyuan_video15",
        HunyuanVideo15ImageToVideoPipeline,
        hunyuan_video15_i2v,
        denoisers.hunyuan_video15_i2v,
        image=make_image(32),
        num_frames=5,
    ),
    "hunyuan_image": make_instance(
        "hunyuan_image", HunyuanImagePipeline, hunyuan_image, denoisers.hunyuan_image, size=32
    ),
    "hunyuan_image_distilled": make_instance(
        "hunyuan_image",
        HunyuanImagePipeline,
        hunyuan_image_distilled,
        denoisers.hunyuan_image_distilled,
        size=32,
    ),
    "ideogram4": make_instance(
        "ideogram4",
        Ideogram4Pipeline,
        ideogram4,
        denoisers.ideogram4,
        size=32,
        guidance_schedule=[7.0, 3.0],
        max_sequence_length=128,
    ),
    "fibo2": make_instance("fibo2", BriaFibo2Pipeline, fibo2, denoisers.fibo2, size=64, guidance=5.0),
    "fibo2_edit": make_instance(
        "fibo2",
        BriaFibo2Pipeline,
        fibo2,
        denoisers.fibo2,
        size=64,
        guidance=5.0,
        image=IMAGE,
    ),
    "kandinsky5_t2i": make_instance(
        "kandinsky5",
        Kandinsky5T2IPipeline,
        kandinsky5_t2i,
        denoisers.kandinsky5,
        size=1024,
        guidance=3.5,
        max_sequence_length=300,
    ),
    "kandinsky5_i2i": make_instance(
        "kandinsky5",
        Kandinsky5I2IPipeline,
        kandinsky5_i2i,
        denoisers.kandinsky5_cond,
        size=1024,
        guidance=3.5,
        image=IMAGE,
    ),
    "kandinsky5_t2v": make_instance(
        "kandinsky5",
        Kandinsky5T2VPipeline,
        kandinsky5_t2v,
        denoisers.kandinsky5_cond,
        size=64,
        guidance=5.0,
        num_frames=5,
        **LENGTH,
    ),
    "kandinsky5_i2v": make_instance(
        "kandinsky5",
        Kandinsky5I2VPipeline,
        kandinsky5_i2v,
        denoisers.kandinsky5_cond,
        size=64,
        guidance=5.0,
        image=IMAGE,
        num_frames=5,
        **LENGTH,
    ),
    "longcat_image": make_instance(
        "longcat_image",
        LongCatImagePipeline,
        longcat_image,
        denoisers.longcat_image,
        size=32,
        guidance=4.5,
        enable_prompt_rewrite=False,
    ),
    "longcat_image_edit": make_instance(
        "longcat_image",
        LongCatImageEditPipeline,
        longcat_image_edit,
        denoisers.longcat_image,
        guidance=4.5,
        image=IMAGE,
    ),
    "ovis_image": make_instance(
        "ovis_image", OvisImagePipeline, ovis_image, denoisers.ovis_image, size=32, guidance=5.0
    ),
}
