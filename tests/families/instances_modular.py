"""Tiny random pipelines of families that diffusers has as modular pipelines only.

Of diffusers' real classes, without a download, built as `instances_edit.py` builds those with images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AnimaModularPipeline,
    AnimaTextConditioner,
    FlowMatchEulerDiscreteScheduler,
    ModularPipeline,
)
from diffusers.models.transformers import transformer_cosmos
from families.instances import LENGTH, SIZES, TEXT, Instance, cosmos, qwen_tokenizer, qwen_vae
from families.instances_edit import make_image, make_instance
from torch import nn
from transformers import Qwen3Config, Qwen3Model, T5Tokenizer

from int8run.models.modular_pipeline import build_blocks, get_call_class, make_pipeline


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


def make_modular(cls: type[ModularPipeline], **components: Any) -> ModularPipeline:
    """A modular pipeline with diffusers' own blocks."""
    return make_pipeline(cls, build_blocks(cls), components, {})


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


ANIMA = get_call_class(AnimaModularPipeline)
QUICK: dict[str, Instance] = {
    "anima": make_instance("anima", ANIMA, anima, cosmos, size=32, guidance=4.0, **LENGTH),
}
LONG_TAIL: dict[str, Instance] = {
    "anima_img2img": make_instance(
        "anima", ANIMA, anima, cosmos, size=32, guidance=4.0, image=make_image(32), **LENGTH
    ),
}
