"""Tiny random pipelines that begin with an image: FLUX, FLUX.2, Qwen-Image and Z-Image.

Of diffusers' real classes, without a download. They are built as `instances.py` builds those without images.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImage21Pipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
)
from families.instances import (
    LAYERS,
    LENGTH,
    PROMPT,
    TEMPLATE,
    Instance,
    TextProcessor,
    flux,
    flux2,
    flux2_klein,
    flux2_transformer,
    image_vae,
    qwen_image,
    qwen_image_21,
    qwen_image_21_transformer,
    qwen_image_transformer,
    qwen_tokenizer,
    seeded,
    z_image,
    z_image_transformer,
)
from PIL import Image
from torch import nn
from transformers import (
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from int8run.models.sampling import Sampling

Settings = dict[str, Any]


def make_image(size: int = 64, shade: int = 0) -> Image.Image:
    """A square image in which every pixel has another color."""
    image = Image.new("RGB", (size, size))
    image.putdata([(4 * x % 256, 4 * y % 256, shade) for y in range(size) for x in range(size)])
    return image


def make_mask(size: int = 64) -> Image.Image:
    """White, which is drawn anew, in the left half."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    return mask


class PlainText:
    """Takes the place of ftfy, which repairs characters, where it is not installed."""

    @staticmethod
    def fix_text(text: str) -> str:
        return text


def replace_missing_ftfy(pipeline: type[DiffusionPipeline]) -> None:
    """Let a pipeline clean its text without the library; the prompts here are clean."""
    module: Any = sys.modules[pipeline.__module__]
    if hasattr(module, "is_ftfy_available") and not hasattr(module, "ftfy"):
        module.ftfy = PlainText


def make_instance(
    family: str,
    pipeline: type[DiffusionPipeline],
    build: Callable[[], DiffusionPipeline],
    denoiser: Callable[[], nn.Module],
    *,
    size: int | None = None,
    guidance: float | None = None,
    prompt: str = PROMPT,
    **extra: Any,
) -> Instance:
    """An instance of two steps; its images are arguments of the call."""
    replace_missing_ftfy(pipeline)
    return Instance(
        family=family,
        build=seeded(build),
        sampling=Sampling(steps=2, guidance=guidance, height=size, width=size, extra=extra),
        prompt=prompt,
        denoiser=denoiser,
        pipeline=pipeline,
    )


def reuse(pipe: DiffusionPipeline, cls: type[DiffusionPipeline], **others: Any) -> DiffusionPipeline:
    """Another pipeline with the components of one, but for those given here."""
    expected = cls._get_signature_types()
    components = {name: part for name, part in pipe.components.items() if name in expected}
    return cls(**{**components, **others})


def flux_transformer(in_channels: int = 16) -> FluxTransformer2DModel:
    """More inputs than outputs: what is given stands beside the noise."""
    return FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )


def flux_fill_transformer() -> FluxTransformer2DModel:
    """Beside 16 channels of noise 16 of the image and 16 of the mask, 2 x 2 for each latent pixel."""
    return flux_transformer(48)


def flux_control_transformer() -> FluxTransformer2DModel:
    return flux_transformer(32)


def flux_kontext() -> DiffusionPipeline:
    return reuse(flux(), FluxKontextPipeline)


def flux_fill() -> DiffusionPipeline:
    return reuse(flux(), FluxFillPipeline, transformer=flux_fill_transformer())


def flux_control() -> DiffusionPipeline:
    return reuse(flux(), FluxControlPipeline, transformer=flux_control_transformer())


def flux2_transformer_dev() -> nn.Module:
    return flux2_transformer(guidance=True)


def flux2_transformer_klein() -> nn.Module:
    return flux2_transformer(guidance=False)


class ImageProcessor(Qwen2VLProcessor):
    """Without the part for videos, which needs torchvision; nothing here has one."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        return type(argument)


def qwen_processor() -> ImageProcessor:
    """At most 16 patches of an image, in groups of 2 x 2."""
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    return ImageProcessor(images, qwen_tokenizer(), None)


def qwen_layered_transformer() -> QwenImageTransformer2DModel:
    """Tells layers that are drawn from the image that is given."""
    return QwenImageTransformer2DModel(
        in_channels=32,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        use_additional_t_cond=True,
        use_layer3d_rope=True,
    )


def coarse_vae(channels: int = 4, colors: int = 3) -> AutoencoderKLQwenImage:
    """64 times smaller: these pipelines bring every image to about 1024 x 1024."""
    return AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=channels,
        dim_mult=[1] * 7,
        num_res_blocks=1,
        temperal_downsample=[False] * 6,
        input_channels=colors,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def qwen_image_edit() -> DiffusionPipeline:
    return reuse(qwen_image(), QwenImageEditPipeline, vae=coarse_vae(), processor=qwen_processor())


def qwen_image_edit_plus() -> DiffusionPipeline:
    return reuse(qwen_image(), QwenImageEditPlusPipeline, vae=coarse_vae(), processor=qwen_processor())


def qwen_image_layered() -> DiffusionPipeline:
    """Images have alpha; latents have other channels, by which the pipeline tells the two."""
    return reuse(
        qwen_image(),
        QwenImageLayeredPipeline,
        vae=coarse_vae(channels=8, colors=4),
        processor=qwen_processor(),
        transformer=qwen_layered_transformer(),
    )


def qwen_image_21_edit() -> DiffusionPipeline:
    """Its text encoder has one token for each 2 x 2 patches of 16 x 16, as many as the denoiser counts on."""
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=128 * 128)
    processor = TextProcessor(images, qwen_tokenizer(), None, chat_template=TEMPLATE)
    return reuse(qwen_image_21(), QwenImage21Pipeline, processor=processor)


def qwen_image_inpaint() -> DiffusionPipeline:
    return reuse(qwen_image(), QwenImageInpaintPipeline)


def z_image_img2img() -> DiffusionPipeline:
    return reuse(z_image(), ZImageImg2ImgPipeline)


def z_image_inpaint() -> DiffusionPipeline:
    return reuse(z_image(), ZImageInpaintPipeline)


def z_image_omni_transformer() -> nn.Module:
    return z_image_transformer(siglip=32)


class HalfVae(AutoencoderKL):
    """Takes what its pipeline makes of an image, bfloat16 whatever the dtype of the model."""

    def encode(self, x: torch.Tensor, *, return_dict: bool = True) -> Any:
        return super().encode(x.to(self.dtype), return_dict=return_dict)


def z_image_omni() -> DiffusionPipeline:
    siglip = Siglip2VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_patches=16,
        patch_size=8,
    )
    return reuse(
        z_image(),
        ZImageOmniPipeline,
        transformer=z_image_omni_transformer(),
        vae=HalfVae(**image_vae().config),
        siglip=Siglip2VisionModel(siglip),
        siglip_processor=Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    )


IMAGE, MASK = make_image(), make_mask()
TWO_IMAGES = [IMAGE, make_image(shade=200)]
TRUE_GUIDANCE = {"true_cfg_scale": 4.0, "negative_prompt": " "}
FLUX2_TEXT = {"text_encoder_out_layers": LAYERS, **LENGTH}
INSTANCES: dict[str, Instance] = {
    "flux_kontext": make_instance(
        "flux",
        FluxKontextPipeline,
        flux_kontext,
        flux_transformer,
        size=32,
        guidance=2.5,
        image=IMAGE,
        max_area=32 * 32,
        _auto_resize=False,
        **LENGTH,
    ),
    "flux_fill": make_instance(
        "flux",
        FluxFillPipeline,
        flux_fill,
        flux_fill_transformer,
        size=32,
        guidance=30.0,
        image=IMAGE,
        mask_image=MASK,
        **LENGTH,
    ),
    "flux_control": make_instance(
        "flux",
        FluxControlPipeline,
        flux_control,
        flux_control_transformer,
        size=32,
        guidance=10.0,
        control_image=IMAGE,
        **LENGTH,
    ),
    "flux2_edit": make_instance(
        "flux2",
        Flux2Pipeline,
        flux2,
        flux2_transformer_dev,
        size=32,
        guidance=4.0,
        image=TWO_IMAGES,
        **FLUX2_TEXT,
    ),
    "flux2_klein_edit": make_instance(
        "flux2",
        Flux2KleinPipeline,
        flux2_klein,
        flux2_transformer_klein,
        size=32,
        guidance=1.0,
        image=TWO_IMAGES,
        **FLUX2_TEXT,
    ),
    "qwen_image_edit": make_instance(
        "qwen_image",
        QwenImageEditPipeline,
        qwen_image_edit,
        qwen_image_transformer,
        size=512,
        image=IMAGE,
        **TRUE_GUIDANCE,
    ),
    "qwen_image_edit_plus": make_instance(
        "qwen_image",
        QwenImageEditPlusPipeline,
        qwen_image_edit_plus,
        qwen_image_transformer,
        size=512,
        image=TWO_IMAGES,
        **TRUE_GUIDANCE,
    ),
    "qwen_image_layered": make_instance(
        "qwen_image",
        QwenImageLayeredPipeline,
        qwen_image_layered,
        qwen_layered_transformer,
        image=IMAGE.convert("RGBA"),
        layers=2,
        resolution=640,
        **TRUE_GUIDANCE,
    ),
    "qwen_image_inpaint": make_instance(
        "qwen_image",
        QwenImageInpaintPipeline,
        qwen_image_inpaint,
        qwen_image_transformer,
        size=64,
        image=IMAGE,
        mask_image=MASK,
        strength=1.0,
        **TRUE_GUIDANCE,
    ),
    "qwen_image_21_edit": make_instance(
        "qwen_image",
        QwenImage21Pipeline,
        qwen_image_21_edit,
        qwen_image_21_transformer,
        image=IMAGE,
        output_resolution=128,
    ),
    "z_image_img2img": make_instance(
        "z_image",
        ZImageImg2ImgPipeline,
        z_image_img2img,
        z_image_transformer,
        size=32,
        guidance=4.0,
        image=make_image(32),
        strength=1.0,
        **LENGTH,
    ),
    "z_image_inpaint": make_instance(
        "z_image",
        ZImageInpaintPipeline,
        z_image_inpaint,
        z_image_transformer,
        size=32,
        guidance=4.0,
        image=make_image(32),
        mask_image=MASK,
        strength=1.0,
        **LENGTH,
    ),
    "z_image_omni": make_instance(
        "z_image",
        ZImageOmniPipeline,
        z_image_omni,
        z_image_omni_transformer,
        size=32,
        guidance=4.0,
        image=TWO_IMAGES,
        **LENGTH,
    ),
}
