"""Tiny random pipelines of Kandinsky 6, which makes videos with sound or larger, and of FIBO 1.

Of diffusers' real classes, without a download, built as `instances_more.py` builds those of their relatives.
"""

from diffusers import (
    BriaFiboEditPipeline,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6SRPipeline,
    Kandinsky6SRVAE,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    PiflowScheduler,
)
from families.denoisers import kandinsky6_sr_transformer
from families.instances import LENGTH, SIZES, TEXT, Instance, qwen_tokenizer
from families.instances_b import wan
from families.instances_edit import make_image, make_instance, reuse
from families.instances_more import kandinsky5_parts, qwen_processor, video_vae
from transformers import SmolLM3Config, SmolLM3ForCausalLM


def kandinsky6_transformer() -> Kandinsky6Transformer3DModel:
    """The blocks for the sound are half as wide as those for the video; the rest is as published."""
    return Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=TEXT,
        time_dim=32,
        model_dim=64,
        ff_dim=96,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        model_dim_a=32,
        time_dim_a=32,
        ff_dim_a=48,
        axes_dims_a=(4, 6, 6),
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )


def kandinsky6() -> DiffusionPipeline:
    """Its sound has 1600 samples a second, and a latent for each 32 of them."""
    audio_vae = MMAudioVAE(
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 1, 1),
        layers_per_block=1,
        sample_rate=1600,
        n_fft=32,
        hop_length=16,
    )
    vocoder = MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(4, 4),
        upsample_kernel_sizes=(8, 8),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3, 5),),
    )
    return Kandinsky6TI2VAPipeline(
        transformer=kandinsky6_transformer(),
        vae=video_vae(),
        audio_vae=audio_vae,
        vocoder=vocoder,
        **kandinsky5_parts(qwen_processor()),
    )


def kandinsky6_sr() -> DiffusionPipeline:
    """Without text: tiles of 16 x 16 pixels of a video become 32 x 32."""
    vae = Kandinsky6SRVAE(
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        layers_per_block=1,
    )
    return Kandinsky6SRPipeline(
        transformer=kandinsky6_sr_transformer(),
        vae=vae,
        scheduler=PiflowScheduler(n_grid=2, num_policy_substeps=4),
    )


def fibo_transformer() -> BriaFiboTransformer2DModel:
    """Reads one layer of the text encoder in each block, and two at the beginning."""
    return BriaFiboTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=TEXT,
    )


def fibo() -> DiffusionPipeline:
    """Its latents are those of Wan's VAE."""
    return BriaFiboPipeline(
        transformer=fibo_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=wan().vae,
        text_encoder=SmolLM3ForCausalLM(SmolLM3Config(**SIZES)),
        tokenizer=qwen_tokenizer(),
    )


def fibo_edit() -> DiffusionPipeline:
    """The same parts."""
    return reuse(fibo(), BriaFiboEditPipeline)


VIDEO = {"num_frames": 5, **LENGTH}
INSTANCES: dict[str, Instance] = {
    "kandinsky6": make_instance(
        "kandinsky6",
        Kandinsky6TI2VAPipeline,
        kandinsky6,
        kandinsky6_transformer,
        size=32,
        guidance=5.0,
        **VIDEO,
    ),
    "kandinsky6_i2v": make_instance(
        "kandinsky6",
        Kandinsky6TI2VAPipeline,
        kandinsky6,
        kandinsky6_transformer,
        size=32,
        guidance=5.0,
        image=make_image(32),
        **VIDEO,
    ),
    "kandinsky6_sr": make_instance(
        "kandinsky6",
        Kandinsky6SRPipeline,
        kandinsky6_sr,
        kandinsky6_sr_transformer,
        video=[make_image(16, shade=40 * i) for i in range(5)],
        resolution_scale=2,
    ),
    # without a negative prompt it reads a token of its own vocabulary
    "fibo": make_instance(
        "fibo", BriaFiboPipeline, fibo, fibo_transformer, size=64, guidance=5.0, negative_prompt="b"
    ),
    "fibo_edit": make_instance(
        "fibo",
        BriaFiboEditPipeline,
        fibo_edit,
        fibo_transformer,
        size=64,
        guidance=5.0,
        prompt='{"edit_instruction": "a red apple"}',
        negative_prompt="b",
        image=make_image(64),
    ),
}
