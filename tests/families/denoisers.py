"""Small denoisers of the families whose pipelines only slow tests build; on the meta device they are free."""

from typing import Any

from diffusers import (
    BriaFibo2Transformer2DModel,
    CogView4Transformer2DModel,
    GlmImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PRXTransformer2DModel,
    SanaVideoTransformer3DModel,
)

TEXT = 32  # width of the text encoders' outputs
HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16}
FLUX_LIKE: dict[str, Any] = {
    **HEADS,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (4, 6, 6),
}


def hunyuan_video15(task: str = "t2v", **more: Any) -> HunyuanVideo15Transformer3DModel:
    """Beside the noise as many channels of a given image, and one that tells where it is given."""
    return HunyuanVideo15Transformer3DModel(
        **HEADS,
        in_channels=2 * 4 + 1,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        image_embed_dim=TEXT,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        task_type=task,
        **more,
    )


def kandinsky6_sr_transformer() -> Kandinsky6SRTransformer3DModel:
    """Kandinsky 6 without text and sound, for larger videos; its scheduler wants two outputs for each."""
    return Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=8,
        time_dim=32,
        model_dim=64,
        ff_dim=96,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        tile_sizes=((32, 32),),
    )


def hunyuan_video15_i2v() -> HunyuanVideo15Transformer3DModel:
    return hunyuan_video15("i2v")


def hunyuan_image(**more: Any) -> HunyuanImageTransformer2DModel:
    return HunyuanImageTransformer2DModel(
        **{
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT,
            "text_embed_2_dim": TEXT,
            "rope_axes_dim": (8, 8),
            **more,
        }
    )


def hunyuan_image_distilled() -> HunyuanImageTransformer2DModel:
    """It is told the guidance, and the time at which the step ends."""
    return hunyuan_image(guidance_embeds=True, use_meanflow=True)


def ideogram4() -> Ideogram4Transformer2DModel:
    """Reads 13 layers of the text encoder."""
    return Ideogram4Transformer2DModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        intermediate_size=96,
        adaln_dim=16,
        llm_features_dim=13 * TEXT,
        mrope_section=(2, 2, 2),
    )


def fibo2() -> BriaFibo2Transformer2DModel:
    """Reads three layers of the text encoder at each of two places."""
    return BriaFibo2Transformer2DModel(
        in_channels=2,
        dim=64,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * TEXT,
        injection_layer_ids=(0, 2),
        perceiver_num_layers=1,
        min_num_gist_tokens=8,
        max_num_gist_tokens=16,
        gist_step=8,
        gist_min_text_len=8,
        gist_max_text_len=32,
        axes_dims=(8, 12, 12),
        axes_lens=(2048, 64, 64),
    )


def kandinsky5(visual_cond: bool = False) -> Kandinsky5Transformer3DModel:
    return Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=TEXT,
        time_dim=32,
        out_visual_dim=4,
        model_dim=64,
        ff_dim=96,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        visual_cond=visual_cond,
    )


def kandinsky5_cond() -> Kandinsky5Transformer3DModel:
    """Also of text to video: its channels for an image are empty then."""
    return kandinsky5(visual_cond=True)


def longcat_image() -> LongCatImageTransformer2DModel:
    return LongCatImageTransformer2DModel(**{**FLUX_LIKE, "in_channels": 64}, pooled_projection_dim=TEXT)


def ovis_image() -> OvisImageTransformer2DModel:
    return OvisImageTransformer2DModel(**FLUX_LIKE, out_channels=16)


def glm_image() -> GlmImageTransformer2DModel:
    return GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=TEXT,
        time_embed_dim=32,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=64,
    )


JOY: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "text_dim": TEXT,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def joyimage_edit() -> JoyImageEditTransformer3DModel:
    return JoyImageEditTransformer3DModel(**JOY)


def joyimage_edit_plus() -> JoyImageEditPlusTransformer3DModel:
    return JoyImageEditPlusTransformer3DModel(**JOY)


def sana_video() -> SanaVideoTransformer3DModel:
    return SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=TEXT,
        sample_size=8,
    )


def cogview4(channels: int = 4) -> CogView4Transformer2DModel:
    return CogView4Transformer2DModel(
        in_channels=channels,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        text_embed_dim=TEXT,
        time_embed_dim=32,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )


def cogview4_control() -> CogView4Transformer2DModel:
    """As many channels of a given image beside the noise."""
    return cogview4(channels=8)


def prx() -> PRXTransformer2DModel:
    return PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=TEXT,
        hidden_size=64,
        mlp_ratio=2.0,
        num_heads=4,
        depth=3,
        axes_dim=[8, 8],
    )
