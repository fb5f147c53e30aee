"""Tiny random pipelines of Stable Diffusion, Wan, LTX, PixArt, Sana, Lumina 2 and HiDream.

Of diffusers' real classes, without a download.
"""

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from families.instances import Instance, seeded
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from int8run.models.sampling import Sampling


def clip_config(width: int = 32, projection: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=4,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3},
        merges=[],
        model_max_length=16,
    )


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, use_cache=False)
    )


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(extra_ids=0, model_max_length=16)


def gemma_tokenizer() -> GemmaTokenizer:
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "a", "b", "▁"]
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(vocab)}, model_max_length=16)


def gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config)


def image_vae(levels: int = 2) -> AutoencoderKL:
    """The latents of one more level are half as large."""
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        norm_num_groups=2,
        shift_factor=0.0,
        scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )


def sd15() -> StableDiffusionPipeline:
    """A UNet of Stable Diffusion 1.

    It has four levels as the real one, so that each has an original name; the text is as wide as the real
    one's, by which the family is detected.
    """
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32, 64, 64),
        cross_attention_dim=768,
        attention_head_dim=2,
        norm_num_groups=8,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=image_vae(),
        text_encoder=CLIPTextModel(clip_config(768)),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """A UNet of SDXL.

    The added conditions are as wide as the real ones, by which the family is detected: 1280 of pooled text,
    six sizes of 256.
    """
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=64,
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        norm_num_groups=8,
        sample_size=16,
    )
    return StableDiffusionXLPipeline(
        vae=image_vae(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(projection=1280)),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """As SD 3.5 medium: a second attention in the first block, and normed queries and keys."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=CLIPTextModelWithProjection(clip_config(16)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


WAN_SIZES: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 128,
    "num_layers": 2,
}


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(**WAN_SIZES)


def wan(second: WanTransformer3DModel | None = None, boundary: float | None = None) -> WanPipeline:
    config = UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, use_cache=False)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(config),
        vae=vae,
        transformer=wan_transformer(),
        transformer_2=second,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=boundary,
    )


def wan22() -> WanPipeline:
    """Two experts: of two steps one has the noise for the first, one for the second."""
    return wan(wan_transformer(), boundary=0.875)


def ltx() -> LTXPipeline:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=32,
    )
    return LTXPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


LTX2_SIZES: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "audio_in_channels": 32,
    "audio_out_channels": 32,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 32,
    "rope_type": "split",
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
}


def ltx2_transformer() -> LTX2VideoTransformer3DModel:
    return LTX2VideoTransformer3DModel(**LTX2_SIZES)


def ltx2() -> LTX2Pipeline:
    """Video and sound, with all that LTX-2.0 or 2.3 has.

    That is caption projections of the one; gates, modulated texts and skipped attentions of the other.
    """
    text = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    gemma3 = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=7)
    connector: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_learnable_registers": None,
    }
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=2,
        connector_rope_base_seq_len=16,
        rope_type="split",
        **{
            f"{kind}_connector_{key}": value
            for kind in ("video", "audio")
            for key, value in connector.items()
        },
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=32, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=4, mel_bins=32
    )
    vocoder = LTX2Vocoder(
        in_channels=64,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=16000,
    )
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=Gemma3ForConditionalGeneration(gemma3),
        tokenizer=gemma_tokenizer(),
        connectors=connectors,
        transformer=ltx2_transformer(),
        vocoder=vocoder,
    )


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=8,
        caption_channels=32,
    )
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=image_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def sana() -> SanaPipeline:
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=8,
    )
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def lumina2() -> Lumina2Pipeline:
    """The pipeline counts on latents of an eighth of the image's size."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=32,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(levels=4),
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
    )


def hidream() -> HiDreamImagePipeline:
    """The pipeline brings every image to latents of 128 x 128; patches of 8 x 8 leave 256 tokens."""
    llama = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        output_hidden_states=True,
    )
    vocab = ["<pad>", "</s>", "<s>", "<unk>", "▁a", "▁b", "▁", "c"]
    transformer = HiDreamImageTransformer2DModel(
        patch_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_channels=[32, 32],
        text_emb_dim=64,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(128, 128),
        llama_layers=[0, 1, 1, 2],
    )
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(levels=1),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=LlamaForCausalLM(llama),
        tokenizer_4=LlamaTokenizer(
            vocab={word: i for i, word in enumerate(vocab)}, merges=[], model_max_length=16
        ),
        transformer=transformer,
    )


def instance(
    family: str, build: Callable[[], DiffusionPipeline], size: int, guidance: float, extra: dict[str, Any]
) -> Instance:
    """Two steps, square."""
    sampling = Sampling(steps=2, guidance=guidance, height=size, width=size, extra=extra)
    return Instance(family, seeded(build), sampling)


# more rows than the float fallback takes
LENGTH = {"max_sequence_length": 12}
PLAIN = {"clean_caption": False, "use_resolution_binning": False}
INSTANCES: dict[str, Instance] = {
    "sd15": instance("sd15", sd15, 32, 7.5, {}),
    "sdxl": instance("sdxl", sdxl, 32, 5.0, {}),
    "sd3": instance("sd3", sd3, 16, 7.0, LENGTH),
    "wan": instance("wan", wan, 48, 5.0, {"num_frames": 5, **LENGTH}),
    "wan22": instance("wan", wan22, 48, 4.0, {"num_frames": 5, "guidance_scale_2": 3.0, **LENGTH}),
    "ltx": instance("ltx", ltx, 32, 3.0, {"num_frames": 9, **LENGTH}),
    "ltx2": instance(
        "ltx2", ltx2, 32, 3.0, {"num_frames": 9, "spatio_temporal_guidance_blocks": [1], **LENGTH}
    ),
    "pixart": instance("pixart", pixart, 16, 4.5, {**PLAIN, **LENGTH}),
    "sana": instance("sana", sana, 32, 4.5, {**PLAIN, "complex_human_instruction": [], **LENGTH}),
    "lumina2": instance("lumina2", lumina2, 64, 4.0, LENGTH),
    "hidream": instance("hidream", hidream, 128, 5.0, LENGTH),
}
