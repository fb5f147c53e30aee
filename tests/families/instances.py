"""Tiny random pipelines of FLUX, Qwen-Image, Z-Image, ERNIE-Image and Krea.

Of diffusers' real classes, without a download.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from int8run.models.sampling import Sampling

PROMPT = "a b"
TEXT = 32  # width of the text encoders' outputs


@dataclass(frozen=True)
class Instance:
    """A tiny pipeline of a family.

    Args:
        family: the name that it must be recognised as.
        build: makes it, the same one at every call.
        sampling: two steps at the smallest size that its pipeline takes, and the images that it needs.
        denoiser: makes its first denoiser alone; None: only with the pipeline.
        pipeline: its class; None: known when it is built.
        source: further settings of its `ModelSource`.
    """

    family: str
    build: Callable[[], DiffusionPipeline]
    sampling: Sampling
    prompt: str = PROMPT
    denoiser: Callable[[], nn.Module] | None = None
    pipeline: type[DiffusionPipeline] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)


def seeded(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Set the same weights at every call, none all zero: a gate of zero would hide what a block computes."""

    def again() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = build()
            for module in [m for m in pipe.components.values() if isinstance(m, nn.Module)]:
                module.eval()
                for parameter in module.parameters():
                    if not parameter.any():
                        nn.init.normal_(parameter, std=0.1)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return again


def image_vae(channels: int = 4, levels: int = 2) -> AutoencoderKL:
    """Latents are half as large with each level but the first."""
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        norm_num_groups=2,
        shift_factor=0.0,
        scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    """Its latents are packed to 8 channels."""
    return AutoencoderKLFlux2(
        latent_channels=2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def qwen_vae() -> AutoencoderKLQwenImage:
    """Eight times smaller, packed by two: images are multiples of 16."""
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes for words, and the special words of the templates."""
    letters = sorted(ByteLevel.alphabet())
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    ]
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], model_max_length=512
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# content is a string, or a list of parts as processors have it
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part.get('text', '') }}{% endfor %}{% endif "
    "%}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the numbers of these words in `qwen_tokenizer`
IMAGE_TOKENS = {
    "image_token_id": 259,
    "video_token_id": 260,
    "vision_start_token_id": 261,
    "vision_end_token_id": 262,
}
WORDS = 272  # of `qwen_tokenizer`, and a few to spare
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": TEXT,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
# three axes of rotary positions share the eight frequencies
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}


def vision(**sizes: int) -> dict[str, int]:
    """An image tower that is never called."""
    return {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT,
        **sizes,
    }


def qwen3_vl() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={**SIZES, **ROPE},
        vision_config={**vision(num_position_embeddings=16), "deepstack_visual_indexes": [0]},
        **IMAGE_TOKENS,
    )


def mistral3() -> Mistral3Config:
    tower = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return Mistral3Config(
        text_config={"model_type": "mistral", **SIZES}, vision_config=tower, image_token_index=259
    )


def t5(words: int = 8) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=words, d_model=TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2, use_cache=False)
    )


def flux() -> FluxPipeline:
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    clip = CLIPTextConfig(
        vocab_size=4,
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=CLIPTextModel(clip),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8),
        text_encoder_2=t5(),
        tokenizer_2=T5Tokenizer(extra_ids=0, model_max_length=16),
        transformer=transformer,
    )


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=t5(),
        tokenizer=T5Tokenizer(extra_ids=0, model_max_length=16),
        transformer=transformer,
    )


def flux2_transformer(guidance: bool) -> Flux2Transformer2DModel:
    """Reads three layers of the text encoder, side by side."""
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=3 * TEXT,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def flux2() -> Flux2Pipeline:
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(mistral3()),
        tokenizer=qwen_tokenizer(),
        transformer=flux2_transformer(guidance=True),
    )


def flux2_klein() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        tokenizer=qwen_tokenizer(),
        transformer=flux2_transformer(guidance=False),
        is_distilled=True,
    )


def z_image_transformer(siglip: int | None = None) -> ZImageTransformer2DModel:
    """One width for its time embedding is fixed in its code."""
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        siglip_feat_dim=siglip,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 32, 32],
    )


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**SIZES)),
        tokenizer=qwen_tokenizer(),
        transformer=z_image_transformer(),
    )


def qwen_image_transformer(**more: bool) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        **more,
    )


def qwen_image() -> QwenImagePipeline:
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = Qwen2_5_VLConfig(
        text_config={**sizes, **ROPE},
        vision_config={**vision(), "fullatt_block_indexes": [0]},
        **IMAGE_TOKENS,
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
        transformer=qwen_image_transformer(),
    )


class TextProcessor(Qwen3VLProcessor):
    """Without the part for videos, which needs torchvision; nothing here has one."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def qwen_image_21_transformer() -> QwenImage21Transformer2DModel:
    return QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        context_in_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_image_21() -> QwenImage21Pipeline:
    """Its pipeline takes latents as 16 times smaller, whatever the VAE says."""
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    processor = TextProcessor(Qwen2VLImageProcessor(), qwen_tokenizer(), None, chat_template=TEMPLATE)
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl()),
        processor=processor,
        transformer=qwen_image_21_transformer(),
    )


def ernie_image() -> ErnieImagePipeline:
    """Without the model that rewrites prompts."""
    transformer = ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=96,
        in_channels=8,
        out_channels=8,
        text_in_dim=TEXT,
        rope_axes_dim=(8, 12, 12),
    )
    return ErnieImagePipeline(
        transformer=transformer,
        vae=flux2_vae(),
        text_encoder=Mistral3Model(mistral3()),
        tokenizer=qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def krea2() -> Krea2Pipeline:
    """Reads two layers of the text encoder."""
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        timestep_embed_dim=32,
        text_hidden_dim=TEXT,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(qwen3_vl()),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
    )


def cosmos() -> CosmosTransformer3DModel:
    """The denoiser of Anima, as its converter makes it: that of Cosmos-Predict2."""
    return CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        text_embed_dim=1024,
        adaln_lora_dim=32,
        max_size=(1, 16, 16),
        extra_pos_embed_type=None,
        concat_padding_mask=True,
    )


def made(
    family: str,
    build: Callable[[], DiffusionPipeline],
    size: int = 32,
    guidance: float | None = None,
    **extra: object,
) -> Instance:
    return Instance(
        family, seeded(build), Sampling(steps=2, guidance=guidance, height=size, width=size, extra=extra)
    )


LENGTH = {"max_sequence_length": 16}  # more rows than the float fallback takes
LAYERS: Sequence[int] = [1, 2, 3]
INSTANCES: dict[str, Instance] = {
    "flux": made("flux", flux, guidance=3.5, **LENGTH),
    "flux2": made("flux2", flux2, guidance=4.0, text_encoder_out_layers=LAYERS, **LENGTH),
    "flux2_klein": made("flux2", flux2_klein, guidance=1.0, text_encoder_out_layers=LAYERS, **LENGTH),
    "chroma": made("chroma", chroma, guidance=3.0, negative_prompt="b", **LENGTH),
    "z_image": made("z_image", z_image, guidance=4.0, **LENGTH),
    "qwen_image": made("qwen_image", qwen_image, size=64, true_cfg_scale=4.0, negative_prompt=" "),
    "qwen_image_21": made("qwen_image", qwen_image_21, size=128),
    "ernie_image": made("ernie_image", ernie_image, guidance=4.0, use_pe=False),
    "krea2": made("krea2", krea2, size=64, guidance=4.5, **LENGTH),
}
# denoisers of a family that no pipeline here has: their layers are known by its rules all the same
OTHERS: dict[str, Sequence[Callable[[], nn.Module]]] = {
    "z_image": [lambda: z_image_transformer(siglip=32)],  # Omni: needs an image
    "anima": [cosmos],  # modular only
}
