"""Tiny random pipelines of families that diffusers has as modular pipelines only.

Of diffusers' real classes, without a download, built as `instances_edit.py` builds those with images.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    FlowMatchEulerDiscreteScheduler,
    Flux3DistilledModularPipeline,
    Flux3ModularPipeline,
    Flux3Transformer2DModel,
    LTX2VideoDiffusionDecoderModel,
    LTX2VideoTransformer3DModel,
    LTX25ModularPipeline,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
    ModularPipeline,
    WanAnimate2ModularPipeline,
    WanAnimate2Transformer3DModel,
)
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.ltx2 import LTX2DurationHead, LTX2TextConnectors
from families.instances import (
    LAYERS,
    LENGTH,
    SIZES,
    TEMPLATE,
    TEXT,
    Instance,
    TextProcessor,
    cosmos,
    flux2_vae,
    qwen3_vl,
    qwen_tokenizer,
    qwen_vae,
)
from families.instances_b import LTX2_SIZES, ltx2, wan
from families.instances_edit import make_image, make_instance
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    T5Tokenizer,
)

from int8run.models.minimax_h3_pruned import MiniMaxH3PrunedTransformer3DModel
from int8run.models.modular_blocks import build_blocks
from int8run.models.modular_pipeline import get_call_class, make_pipeline


class Resize:
    """Takes the place of torchvision's `transforms` where that is not installed: Cosmos resizes a mask."""

    class functional:  # noqa: N801
        @staticmethod
        def resize(mask: torch.Tensor, size: Sequence[int], interpolation: object) -> torch.Tensor:
            return nn.functional.interpolate(mask, list(size), mode="nearest")

    class InterpolationMode:
        NEAREST = "nearest"


if not hasattr(transformer_cosmos, "transforms"):
    transformer_cosmos.transforms = Resize


def make_modular(cls: type[ModularPipeline], skip: Sequence[str] = (), **components: Any) -> ModularPipeline:
    """A modular pipeline with diffusers' own blocks, but for those that are skipped."""
    return make_pipeline(cls, build_blocks(cls, skip=skip), components, {})


def anima() -> ModularPipeline:
    """Reads 512 text rows however short the prompt is, as the checkpoints do; here 16."""
    conditioner = AnimaTextConditioner(
        source_dim=TEXT,
        target_dim=1024,
        model_dim=TEXT,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=8,
        min_sequence_length=16,
    )
    return make_modular(
        AnimaModularPipeline,
        text_encoder=Qwen3Model(Qwen3Config(**SIZES)),
        tokenizer=qwen_tokenizer(),
        t5_tokenizer=T5Tokenizer(extra_ids=0, model_max_length=16),
        text_conditioner=conditioner,
        transformer=cosmos(),
        vae=qwen_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def vision_processor() -> Qwen3VLProcessor:
    """Of text and images, as Qwen3-VL has it."""
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=128 * 128)
    return TextProcessor(images, qwen_tokenizer(), None, chat_template=TEMPLATE)


def flux3_transformer(flow_map: bool = False) -> Flux3Transformer2DModel:
    """Reads three layers of the text encoder, side by side."""
    return Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=3 * TEXT,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )


def flux3_distilled_transformer() -> Flux3Transformer2DModel:
    """Knows the time that a step goes to."""
    return flux3_transformer(flow_map=True)


def flux3(
    cls: type[ModularPipeline] = Flux3ModularPipeline, denoiser: Callable[[], nn.Module] = flux3_transformer
) -> ModularPipeline:
    """Without the model that rewrites prompts."""
    return make_modular(
        cls,
        skip=["prompt_upsampler"],
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl()),
        tokenizer=vision_processor(),
        vae=flux2_vae(),
        transformer=denoiser(),
    )


def flux3_distilled() -> ModularPipeline:
    return flux3(Flux3DistilledModularPipeline, flux3_distilled_transformer)


MINIMAX_H3_SIZES: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "hidden_size": 64,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "ffn_dim": 96,
    "in_channels": 4,
    "audio_in_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 32,
    "time_embed_hidden_dim": 32,
    "time_embed_dim": 32,
    "rope_freq_dim": 2,
}


def minimax_h3_transformer() -> MiniMaxH3Transformer3DModel:
    return MiniMaxH3Transformer3DModel(**MINIMAX_H3_SIZES)


def minimax_h3_pruned_transformer() -> MiniMaxH3PrunedTransformer3DModel:
    """With a curve of eight numbers at nine times."""
    sizes = MINIMAX_H3_SIZES | {"time_embed_dim": 8}
    return MiniMaxH3PrunedTransformer3DModel(**sizes, curve_points=9)


def minimax_h3_parts() -> dict[str, Any]:
    """All but the denoiser. The 50th layer of the text encoder is what the denoiser reads."""
    text = qwen3_vl()
    text.text_config.num_hidden_layers = 51
    text.text_config.layer_types = ["full_attention"] * 51
    vae = AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(4,) * 6,
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    audio_vae = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4,
        encoder_rates=(2, 2),
        latent_dim=16,
        latent_channels=4,
        num_attention_heads=2,
        decoder_dim=16,
        decoder_rates=(2, 2),
        decoder_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3, 5),),
        sampling_rate=160,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    processor = vision_processor()
    return {
        "text_encoder": Qwen3VLForConditionalGeneration(text),
        "tokenizer": processor.tokenizer,
        "processor": processor,
        "vae": vae,
        "audio_vae": audio_vae,
        "scheduler": MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": MiniMaxH3Scheduler(shift=3.0),
    }


def minimax_h3(denoiser: Callable[[], nn.Module] = minimax_h3_transformer) -> ModularPipeline:
    """Without the denoiser of references."""
    return make_modular(MiniMaxH3ModularPipeline, **minimax_h3_parts(), transformer=denoiser())


def ltx25_transformer() -> LTX2VideoTransformer3DModel:
    """Reads texts that are projected elsewhere; no biases in its feed-forwards."""
    return LTX2VideoTransformer3DModel(
        **LTX2_SIZES,
        use_prompt_embeddings=False,
        use_prompt_adaln_single=False,
        use_keyframes_abs_pos_embedding=True,
        ff_bias=False,
        audio_ff_bias=False,
    )


def ltx25_connectors() -> LTX2TextConnectors:
    """As wide as the blocks for the video and for the sound."""
    return LTX2TextConnectors(
        caption_channels=TEXT,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=32,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=16,
        rope_type="split",
        per_modality_projections=True,
        video_hidden_dim=64,
        audio_hidden_dim=32,
    )


def ltx25_decoder() -> LTX2VideoDiffusionDecoderModel:
    """Makes the frames in one step."""
    return LTX2VideoDiffusionDecoderModel(
        latent_channels=8,
        patch_size=1,
        decoder_head_dim=8,
        decoder_stage_channels=(16,) * 5,
        decoder_stage_depths=(1,) * 5,
        decoder_stage_kernels=((1, 3, 3),) * 4,
        decoder_upsample_strides=((1, 1, 1),) * 4,
        decoder_upsample_channel_reductions=(1,) * 4,
        decoder_stage5_kernel=(1, 3, 3),
        decoder_t_emb_dim=16,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    )


def ltx25() -> ModularPipeline:
    """Without the model that rewrites prompts."""
    parts = {name: part for name, part in ltx2().components.items() if part is not None}
    given = {
        "connectors": ltx25_connectors(),
        "transformer": ltx25_transformer(),
        "diffusion_decoder": ltx25_decoder(),
        "duration_head": LTX2DurationHead(
            video_cross_attention_dim=64,
            audio_cross_attention_dim=32,
            pooler_hidden_dim=16,
            mlp_hidden_dim=16,
        ),
    }
    return make_modular(LTX25ModularPipeline, **{**parts, **given})


def minimax_h3_pruned() -> ModularPipeline:
    """With a denoiser as the pruned files hold it."""
    return minimax_h3(minimax_h3_pruned_transformer)


def make_minimax_h3(
    family: str = "minimax_h3",
    build: Callable[[], ModularPipeline] = minimax_h3,
    denoiser: Callable[[], nn.Module] = minimax_h3_transformer,
    **extra: Any,
) -> Instance:
    """An instance of the shortest video; its scheduler takes one step less than it is asked for."""
    made = make_instance(family, MINIMAX_H3, build, denoiser, size=32, num_frames=124, **extra)
    workflow = "fl2va" if extra else "t2va"
    return replace(made, sampling=replace(made.sampling, steps=3), source={"workflow": workflow})


def make_flux3(
    cls: type[ModularPipeline],
    build: Callable[[], ModularPipeline],
    denoiser: Callable[[], nn.Module],
    guidance: float | None,
) -> Instance:
    """An edit: the blocks of a reference run with a reference alone."""
    extra = {"image": make_image(64), "text_encoder_out_layers": LAYERS, **LENGTH}
    made = make_instance("flux3", cls, build, denoiser, size=64, guidance=guidance, **extra)
    return replace(made, source={"skip_blocks": ["prompt_upsampler"]})


def wan_animate_2_transformer() -> WanAnimate2Transformer3DModel:
    return WanAnimate2Transformer3DModel(
        dim=64, ffn_dim=96, freq_dim=32, text_dim=TEXT, text_len=16, num_heads=4, num_layers=2
    )


def wan_animate_2() -> ModularPipeline:
    """Sees images as CLIP-H does: 1280 numbers for each of its tokens."""
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=112
    )
    parts = wan().components
    return make_modular(
        WanAnimate2ModularPipeline,
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        vae=parts["vae"],
        image_encoder=CLIPVisionModel(config),
        transformer=wan_animate_2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


ANIMA = get_call_class(AnimaModularPipeline)
FLUX3, FLUX3_DISTILLED = map(get_call_class, (Flux3ModularPipeline, Flux3DistilledModularPipeline))
LTX25 = get_call_class(LTX25ModularPipeline)
MINIMAX_H3 = get_call_class(MiniMaxH3ModularPipeline)
QUICK: dict[str, Instance] = {
    "anima": make_instance("anima", ANIMA, anima, cosmos, size=32, guidance=4.0, **LENGTH),
    "flux3_klein_base": make_flux3(FLUX3, flux3, flux3_transformer, 3.5),
    # at least five seconds, of 24 frames
    "minimax_h3": make_minimax_h3(),
}
WAN_ANIMATE_2 = get_call_class(WanAnimate2ModularPipeline)
LONG_TAIL: dict[str, Instance] = {
    "wan_animate_2": make_instance(
        "wan",
        WAN_ANIMATE_2,
        wan_animate_2,
        wan_animate_2_transformer,
        size=32,
        guidance=3.0,
        image=make_image(32),
        driving_video=[make_image(32, shade=40 * i) for i in range(5)],
        segment_frame_length=5,
        **LENGTH,
    ),
    "anima_img2img": make_instance(
        "anima", ANIMA, anima, cosmos, size=32, guidance=4.0, image=make_image(32), **LENGTH
    ),
    "flux3_klein": make_flux3(FLUX3_DISTILLED, flux3_distilled, flux3_distilled_transformer, None),
    "ltx25": make_instance(
        "ltx2",
        LTX25,
        ltx25,
        ltx25_transformer,
        size=32,
        guidance=3.0,
        image=make_image(32),
        image_crf=0,
        num_frames=9,
        **LENGTH,
    ),
    "minimax_h3_pruned": make_minimax_h3(
        "minimax_h3_pruned", minimax_h3_pruned, minimax_h3_pruned_transformer
    ),
    "minimax_h3_fl2va": make_minimax_h3(image=make_image(32), last_image=make_image(32, shade=9)),
}
