"""Tiny random pipelines of videos that begin with images: Wan and what is built on it, LTX-2.

Of diffusers' real classes, without a download, built as `instances_b.py` builds those without images.
"""

from typing import Any

from diffusers import (
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    DiffusionPipeline,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from families.instances import Instance
from families.instances_b import LENGTH, WAN_SIZES, ltx2, ltx2_transformer, wan
from families.instances_edit import make_image, make_instance, make_mask, reuse
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

# beside 16 channels of noise 4 of a mask and 16 of the image
GIVEN_IMAGE = {"in_channels": 36}
# as Wan 2.1: the blocks also read the image as CLIP sees it
CLIP_IMAGE = {"image_dim": 32, "added_kv_proj_dim": 64}


def clip_vision() -> dict[str, Any]:
    """An image encoder of 17 tokens, and what prepares its images."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return {"image_encoder": CLIPVisionModel(config), "image_processor": processor}


def wan_i2v_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(**{**WAN_SIZES, **GIVEN_IMAGE, **CLIP_IMAGE})


def wan_i2v() -> DiffusionPipeline:
    """Wan 2.1."""
    return reuse(wan(), WanImageToVideoPipeline, transformer=wan_i2v_transformer(), **clip_vision())


def wan_flf2v_transformer() -> WanTransformer3DModel:
    """Two images of 17 tokens."""
    return WanTransformer3DModel(**{**WAN_SIZES, **GIVEN_IMAGE, **CLIP_IMAGE}, pos_embed_seq_len=2 * 17)


def wan_flf2v() -> DiffusionPipeline:
    """Wan 2.1 from the first and the last frame."""
    return reuse(wan(), WanImageToVideoPipeline, transformer=wan_flf2v_transformer(), **clip_vision())


def wan22_expert() -> WanTransformer3DModel:
    return WanTransformer3DModel(**{**WAN_SIZES, **GIVEN_IMAGE})


def wan22_i2v() -> DiffusionPipeline:
    """Wan 2.2: two experts, and no image encoder."""
    return reuse(
        wan(),
        WanImageToVideoPipeline,
        transformer=wan22_expert(),
        transformer_2=wan22_expert(),
        boundary_ratio=0.9,
    )


def wan22_5b_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(**WAN_SIZES)


def wan22_5b_i2v() -> DiffusionPipeline:
    """Wan 2.2 5B: the image is the first latent frame, without noise."""
    return reuse(wan(), WanImageToVideoPipeline, expand_timesteps=True)


def wan_vace_transformer() -> WanVACETransformer3DModel:
    """The latents of what changes and of what stays beside a mask of 8 x 8 for each latent pixel."""
    return WanVACETransformer3DModel(**WAN_SIZES, vace_layers=[0, 1], vace_in_channels=2 * 16 + 64)


def wan_vace() -> DiffusionPipeline:
    return reuse(wan(), WanVACEPipeline, transformer=wan_vace_transformer())


def wan_animate_transformer() -> WanAnimateTransformer3DModel:
    return WanAnimateTransformer3DModel(
        **{**WAN_SIZES, **GIVEN_IMAGE, **CLIP_IMAGE},
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=16,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )


def wan_animate() -> DiffusionPipeline:
    return reuse(wan(), WanAnimatePipeline, transformer=wan_animate_transformer(), **clip_vision())


def chronoedit_transformer() -> ChronoEditTransformer3DModel:
    return ChronoEditTransformer3DModel(**{**WAN_SIZES, **GIVEN_IMAGE, **CLIP_IMAGE})


def chronoedit() -> DiffusionPipeline:
    return reuse(wan(), ChronoEditPipeline, transformer=chronoedit_transformer(), **clip_vision())


def skyreels_transformer() -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(**WAN_SIZES)


def skyreels_i2v_transformer() -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(**{**WAN_SIZES, **GIVEN_IMAGE, **CLIP_IMAGE})


def skyreels_df_transformer() -> SkyReelsV2Transformer3DModel:
    """Diffusion forcing: it is told the frame rate, too."""
    return SkyReelsV2Transformer3DModel(**WAN_SIZES, inject_sample_info=True)


def skyreels() -> DiffusionPipeline:
    return reuse(wan(), SkyReelsV2Pipeline, transformer=skyreels_transformer())


def skyreels_i2v() -> DiffusionPipeline:
    transformer = skyreels_i2v_transformer()
    return reuse(wan(), SkyReelsV2ImageToVideoPipeline, transformer=transformer, **clip_vision())


def skyreels_df() -> DiffusionPipeline:
    return reuse(wan(), SkyReelsV2DiffusionForcingPipeline, transformer=skyreels_df_transformer())


def ltx2_i2v() -> DiffusionPipeline:
    return reuse(ltx2(), LTX2ImageToVideoPipeline)


def ltx2_condition() -> DiffusionPipeline:
    return reuse(ltx2(), LTX2ConditionPipeline)


FIRST, LAST = make_image(48), make_image(48, shade=200)
VIDEO = [make_image(48, shade=40 * i) for i in range(5)]
FRAMES = {"num_frames": 5, **LENGTH}
# where the blocks read an image, this many rows of the text are counted on
CLIP_FRAMES = {"num_frames": 5, "max_sequence_length": 512}
LTX2_CALL = {"num_frames": 9, "spatio_temporal_guidance_blocks": [1], **LENGTH}
Entry = tuple[Any, Any, Any, float, dict[str, Any]]
# family, pipeline, what makes it, its denoiser, guidance, further arguments
WAN: dict[str, Entry] = {
    "wan_i2v": (
        WanImageToVideoPipeline,
        wan_i2v,
        wan_i2v_transformer,
        5.0,
        {"image": FIRST, **CLIP_FRAMES},
    ),
    "wan_flf2v": (
        WanImageToVideoPipeline,
        wan_flf2v,
        wan_flf2v_transformer,
        5.0,
        {"image": FIRST, "last_image": LAST, **CLIP_FRAMES},
    ),
    "wan22_i2v": (
        WanImageToVideoPipeline,
        wan22_i2v,
        wan22_expert,
        3.5,
        {"image": FIRST, "last_image": LAST, "guidance_scale_2": 3.5, **FRAMES},
    ),
    "wan22_5b_i2v": (
        WanImageToVideoPipeline,
        wan22_5b_i2v,
        wan22_5b_transformer,
        5.0,
        {"image": FIRST, **FRAMES},
    ),
    "wan_vace": (
        WanVACEPipeline,
        wan_vace,
        wan_vace_transformer,
        5.0,
        {"video": VIDEO, "mask": [make_mask(48)] * 5, "reference_images": [FIRST], **FRAMES},
    ),
    "wan_animate": (
        WanAnimatePipeline,
        wan_animate,
        wan_animate_transformer,
        1.0,
        {
            "image": FIRST,
            "pose_video": VIDEO,
            "face_video": VIDEO,
            "segment_frame_length": 5,
            "max_sequence_length": 512,
        },
    ),
    "chronoedit": (
        ChronoEditPipeline,
        chronoedit,
        chronoedit_transformer,
        5.0,
        {"image": FIRST, **CLIP_FRAMES},
    ),
    "skyreels": (SkyReelsV2Pipeline, skyreels, skyreels_transformer, 6.0, FRAMES),
    "skyreels_i2v": (
        SkyReelsV2ImageToVideoPipeline,
        skyreels_i2v,
        skyreels_i2v_transformer,
        5.0,
        {"image": FIRST, **CLIP_FRAMES},
    ),
    "skyreels_df": (
        SkyReelsV2DiffusionForcingPipeline,
        skyreels_df,
        skyreels_df_transformer,
        6.0,
        {"base_num_frames": 5, **FRAMES},
    ),
}


def make_video(family: str, entry: Entry, size: int) -> Instance:
    """An instance of two steps."""
    pipeline, build, denoiser, guidance, extra = entry
    return make_instance(family, pipeline, build, denoiser, size=size, guidance=guidance, **extra)


def make_ltx2(pipeline: type[DiffusionPipeline], build: Any, **given: Any) -> Instance:
    """Video and sound."""
    denoiser: type[nn.Module] | Any = ltx2_transformer
    return make_video("ltx2", (pipeline, build, denoiser, 3.0, {**LTX2_CALL, **given}), 32)


INSTANCES: dict[str, Instance] = {
    **{name: make_video("wan", entry, 48) for name, entry in WAN.items()},
    "ltx2_i2v": make_ltx2(LTX2ImageToVideoPipeline, ltx2_i2v, image=make_image(32), image_crf=0),
    "ltx2_condition": make_ltx2(
        LTX2ConditionPipeline,
        ltx2_condition,
        conditions=[LTX2VideoCondition(frames=make_image(32), index=0, strength=1.0, crf=0)],
    ),
}
