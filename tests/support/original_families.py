"""Every architecture with names of its own: the diffusers class at a small size, and how diffusers reads its
authors' files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import diffusers
import torch
from diffusers.loaders import single_file_utils as converters
from torch import Tensor, nn

# the converters of these families have the width of the real model written into them: on the meta device it
# costs nothing
HIDDEN = {"attention_head_dim": 128, "num_attention_heads": 24}
FLUX = {**HIDDEN, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 8}
WAN = {
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "image_dim": 8,
    "added_kv_proj_dim": 24,
}
HUNYUAN = {
    **HIDDEN,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 8,
    "pooled_projection_dim": 6,
}
LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "cross_attention_dim": 8,
    "caption_channels": 6,
}
SANA = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "caption_channels": 8,
    "sample_size": 8,
}
SANA_MORE = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
UNET = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
DOWN, UP, DOWN_ATTENTION, UP_ATTENTION = (
    "DownBlock2D",
    "UpBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnUpBlock2D",
)


@dataclass(frozen=True)
class Family:
    """One architecture: the diffusers class with a small configuration, and how diffusers converts its
    authors' checkpoints.
    """

    cls: str
    config: dict
    convert: Callable[..., dict]
    prefix: str = ""
    besides: tuple[str, ...] = ()  # parameters that a converter demands and that belong to no module
    unchanged: str = r"$^"  # modules whose authors' names are those of diffusers
    same: str = r"$^"  # parameters of no such module whose authors' names are those of diffusers
    # all parts of the authors' names, where the converter takes a mixture of theirs and those of diffusers
    words: str = ""
    dropped: tuple[str, ...] = ()  # keys of the authors' files that the model has no place for


# name in diffusers -> name in the authors' files
PIXART_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
}
PIXART_BLOCK_NAMES = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def convert_pixart(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers has no converter for PixArt, but a script (`convert_pixart_sigma_to_diffusers.py`): what it
    does, in short.
    """
    model = {"scale_shift_table": file["final_layer.scale_shift_table"]}
    for parameter in ("weight", "bias"):
        for here, there in PIXART_NAMES.items():
            model[f"{here}.{parameter}"] = file[f"{there}.{parameter}"]

    numbers = [int(key.split(".")[1]) for key in file if key.startswith("blocks.")]
    for number in range(1 + max(numbers)):
        block = convert_pixart_block(file, f"blocks.{number}")
        for name, value in block.items():
            model[f"transformer_blocks.{number}.{name}"] = value
    return model


def convert_pixart_block(file: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One block: q, k and v of a layer that has them together are cut apart."""
    block = {"scale_shift_table": file[f"{prefix}.scale_shift_table"]}
    for parameter in ("weight", "bias"):
        query, key, value = file[f"{prefix}.attn.qkv.{parameter}"].chunk(3)
        block[f"attn1.to_q.{parameter}"] = query
        block[f"attn1.to_k.{parameter}"] = key
        block[f"attn1.to_v.{parameter}"] = value

        key, value = file[f"{prefix}.cross_attn.kv_linear.{parameter}"].chunk(2)
        block[f"attn2.to_k.{parameter}"] = key
        block[f"attn2.to_v.{parameter}"] = value

        for here, there in PIXART_BLOCK_NAMES.items():
            block[f"{here}.{parameter}"] = file[f"{prefix}.{there}.{parameter}"]
    return block


def convert_sana_sprint(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers' script for Sana (`convert_sana_to_diffusers.py`) does it; its converter knows the other
    Sanas only.
    """
    model = {}
    for key in [
        key
        for key in file
        if ("_norm." in key and key.startswith("blocks.")) or key.startswith("cfg_embedder.")
    ]:
        new = key.replace("cfg_embedder.mlp.0", "time_embed.guidance_embedder.linear_1")
        new = new.replace("cfg_embedder.mlp.2", "time_embed.guidance_embedder.linear_2")
        new = (
            new.replace("blocks.", "transformer_blocks.")
            .replace(".cross_attn.", ".attn2.")
            .replace(".attn.", ".attn1.")
        )
        model[new.replace("q_norm", "norm_q").replace("k_norm", "norm_k")] = file.pop(key)
    others = converters.convert_sana_transformer_to_diffusers(file)
    return model | {key.replace("time_embed.emb.", "time_embed."): value for key, value in others.items()}


def convert_wan_first_last(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers' script for Wan (`convert_wan_to_diffusers.py`) does it; its converter leaves this one
    name.
    """
    positions = {"condition_embedder.image_embedder.pos_embed": file.pop("img_emb.emb_pos")}
    return converters.convert_wan_transformer_to_diffusers(file) | positions


def convert_skyreels(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers' script for SkyReels (`convert_skyreelsv2_to_diffusers.py`) does it; its converter leaves
    these names.
    """
    frame_rate = {key: file.pop(key) for key in list(file) if key.startswith("fps_projection.")}
    names = {"fps_projection.0.": "fps_projection.net.0.proj.", "fps_projection.2.": "fps_projection.net.2."}
    made = {}
    for key, value in frame_rate.items():
        number = key[: len("fps_projection.0.")]
        made[names[number] + key.removeprefix(number)] = value
    return converters.convert_wan_transformer_to_diffusers(file) | made


FAMILIES = {
    "flux": Family(
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 6, "guidance_embeds": True},
        converters.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "chroma": Family(
        "ChromaTransformer2DModel",
        {**FLUX, "approximator_layers": 2, "approximator_hidden_dim": 8, "approximator_num_channels": 8},
        converters.convert_chroma_transformer_checkpoint_to_diffusers,
        unchanged=r"distilled_guidance_layer\.(in_proj|out_proj|norms\.\d+)",
    ),
    "flux2": Family(
        "Flux2Transformer2DModel",
        FLUX,
        converters.convert_flux2_transformer_checkpoint_to_diffusers,
        words="""
            img_in txt_in time_in guidance_in in_layer out_layer
            double_stream_modulation_img double_stream_modulation_txt
            single_stream_modulation lin double_blocks img_attn txt_attn qkv norm query_norm key_norm proj
            img_mlp txt_mlp single_blocks
            linear1 linear2 final_layer linear adaLN_modulation weight scale
        """,
    ),
    "sd3": Family(
        "SD3Transformer2DModel",
        {
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 8,
            "pooled_projection_dim": 6,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 4,
        },
        converters.convert_sd3_transformer_checkpoint_to_diffusers,
        besides=("pos_embed",),
        unchanged="context_embedder",
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
        },
        dict,
        unchanged=".*",
    ),
    "qwen_image_21": Family(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "context_in_dim": 8,
        },
        converters.convert_qwen_image21_transformer_checkpoint_to_diffusers,
        unchanged=r"(?!.*img_mlp\.(gate_layer|proj)$).*",
    ),
    "z_image": Family(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [2, 2, 4],
        },
        converters.convert_z_image_transformer_checkpoint_to_diffusers,
        same="(x|cap)_pad_token",
        dropped=("norm_final.weight",),
        unchanged=r"(cap_embedder|t_embedder)\..*|.*\.(attention_norm|ffn_norm)\d|.*\.feed_forward\.w\d|(layers|noise_refiner)\.\d\.adaLN_modulation\.0",
    ),
    "lumina2": Family(
        "Lumina2Transformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 2304,
            "num_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "cap_feat_dim": 8,
        },
        converters.convert_lumina2_to_diffusers,
        unchanged=r"x_embedder|.*\.ffn_norm\d",
        dropped=("norm_final.weight",),
    ),
    "wan": Family(
        "WanTransformer3DModel",
        WAN,
        converters.convert_wan_transformer_to_diffusers,
        unchanged="patch_embedding",
    ),
    "wan_first_last": Family(
        "WanTransformer3DModel",
        {**WAN, "pos_embed_seq_len": 4},
        convert_wan_first_last,
        unchanged="patch_embedding",
    ),
    "wan_vace": Family(
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0, 1], "vace_in_channels": 4},
        converters.convert_wan_transformer_to_diffusers,
        unchanged="(vace_)?patch_embedding",
    ),
    "wan_animate": Family(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
            "motion_encoder_size": 512,
            "motion_encoder_channel_sizes": {str(2**i): 4 for i in range(2, 10)},
        },
        converters.convert_wan_transformer_to_diffusers,
        unchanged=r"(pose_)?patch_embedding|face_encoder\.out_proj",
        same=r"face_encoder\.padding_tokens",
    ),
    "skyreels": Family(
        "SkyReelsV2Transformer3DModel",
        WAN,
        converters.convert_wan_transformer_to_diffusers,
        unchanged="patch_embedding",
    ),
    "skyreels_df": Family(
        "SkyReelsV2Transformer3DModel",
        {**WAN, "inject_sample_info": True},
        convert_skyreels,
        unchanged="patch_embedding|fps_embedding",
    ),
    "chronoedit": Family(
        "ChronoEditTransformer3DModel",
        WAN,
        converters.convert_wan_transformer_to_diffusers,
        unchanged="patch_embedding",
    ),
    "hunyuan_video": Family(
        "HunyuanVideoTransformer3DModel", HUNYUAN, converters.convert_hunyuan_video_transformer_to_diffusers
    ),
    "framepack": Family(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN,
        converters.convert_hunyuan_video_transformer_to_diffusers,
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel",
        LTX,
        converters.convert_ltx_transformer_checkpoint_to_diffusers,
        unchanged=r"caption_projection\..*|proj_out|transformer_blocks\.(?!.*norm).*",
        same=".*scale_shift_table",
    ),
    "ltx2": Family(
        "LTX2VideoTransformer3DModel",
        {
            **LTX,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
        },
        converters.convert_ltx2_transformer_to_diffusers,
        unchanged=r"(audio_)?(caption_projection\..*|proj_out)|transformer_blocks\.(?!.*norm).*",
        same=r"(transformer_blocks\.\d\.)?(audio_)?scale_shift_table",
        dropped=(
            "video_embeddings_connector.learnable_registers",
            "audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight",
        ),
    ),
    "ltx25": Family(
        "LTX2VideoTransformer3DModel",
        {
            **LTX,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "gated_attn": True,
            "audio_gated_attn": True,
            "cross_attn_mod": True,
            "audio_cross_attn_mod": True,
            "perturbed_attn": True,
            "ff_bias": False,
            "audio_ff_bias": False,
            "use_prompt_embeddings": False,
            "use_prompt_adaln_single": False,
            "use_keyframes_abs_pos_embedding": True,
        },
        converters.convert_ltx2_transformer_to_diffusers,
        unchanged=r"(audio_)?proj_out|transformer_blocks\.(?!.*norm).*",
        same=r"keyframes_abs_pos_embedding|(transformer_blocks\.\d\.)?(audio_)?(prompt_)?scale_shift_table",
    ),
    "flux3": Family(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "timestep_channels": 8,
            "axes_dims_rope": (2, 2, 2, 2),
            "flow_map": True,
        },
        converters.convert_flux3_transformer_checkpoint_to_diffusers,
        dropped=("repa_projectors.0.weight",),
    ),
    "minimax_h3": Family(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "hidden_size": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 24,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 8,
            "time_embed_dim": 8,
            "rope_freq_dim": 1,
        },
        partial(converters.convert_minimax_h3_transformer_checkpoint_to_diffusers, config={}),
        unchanged=r"token_refiner\.final_norm",
        dropped=("rope.inv_freq",),
    ),
    "sd15": Family(
        "UNet2DConditionModel",
        {
            **UNET,
            "block_out_channels": (4, 8, 8, 12),
            "down_block_types": (DOWN_ATTENTION, DOWN_ATTENTION, DOWN_ATTENTION, DOWN),
            "up_block_types": (UP, UP_ATTENTION, UP_ATTENTION, UP_ATTENTION),
        },
        converters.convert_ldm_unet_checkpoint,
        prefix="model.diffusion_model.",
    ),
    "sdxl": Family(
        "UNet2DConditionModel",
        {
            **UNET,
            "block_out_channels": (4, 8, 12),
            "down_block_types": (DOWN, DOWN_ATTENTION, DOWN_ATTENTION),
            "up_block_types": (UP_ATTENTION, UP_ATTENTION, UP),
            "transformer_layers_per_block": (1, 2, 3),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 24,
        },
        converters.convert_ldm_unet_checkpoint,
        prefix="model.diffusion_model.",
    ),
    "ernie_image": Family(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 2, 2),
        },
        converters.convert_ernie_image_transformer_checkpoint_to_diffusers,
        unchanged=".*",
    ),
    "krea2": Family(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 8,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        converters.convert_krea2_transformer_checkpoint_to_diffusers,
        words="""
            first tmlp tproj txtfusion layerwise_blocks refiner_blocks projector txtmlp blocks last linear
            norm modulation mod lin
            prenorm postnorm attn wq wk wv wo gate qknorm qnorm knorm mlp up down weight bias scale
        """,
    ),
    "anima": Family(
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 8,
            "adaln_lora_dim": 4,
            "max_size": (8, 8, 8),
            "extra_pos_embed_type": None,
        },
        converters.convert_cosmos_transformer_checkpoint_to_diffusers,
        prefix="net.",
        dropped=(
            "pos_embedder.seq",
            "pos_embedder.dim_spatial_range",
            "pos_embedder.dim_temporal_range",
            "accum_video_sample_counter",
            "accum_image_sample_counter",
            "accum_iteration",
            "accum_train_in_hours",
            "blocks.0.self_attn.q_norm._extra_state",
        ),
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "caption_channels": 8,
            "use_additional_conditions": True,
        },
        convert_pixart,
        dropped=("pos_embed", "y_embedder.y_embedding"),
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        SANA,
        converters.convert_sana_transformer_to_diffusers,
        dropped=SANA_MORE,
    ),
    "sana_sprint": Family(
        "SanaTransformer2DModel",
        {**SANA, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        convert_sana_sprint,
        dropped=SANA_MORE,
    ),
    "hidream": Family(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [8, 8],
            "text_emb_dim": 8,
            "axes_dims_rope": (4, 4),
            "llama_layers": [0, 1],
        },
        converters.convert_hidream_transformer_to_diffusers,
        unchanged=".*",
    ),
}


def tiny(family: Family) -> nn.Module:
    """The real class, on the meta device."""
    with torch.device("meta"):
        return getattr(diffusers, family.cls)(**family.config)
