"""What each written format takes of full-size encoders, by shapes alone; `measure.py` writes the rows."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, Qwen2_5_VLConfig, Qwen3Config, T5Config

from int8run.quant.formats import BLOCK, FORMATS, WeightFormat, choose_format
from int8run.text_encoders import registry
from int8run.text_encoders.skeleton import build_skeleton

Row = dict[str, Any]


WRITTEN = tuple(name for name, form in FORMATS.items() if not form.is_read_only)


# full-size encoders as their configs were published, for sizes alone
FULL: Mapping[str, tuple[str, str, Any]] = {
    "CLIP-L": (
        "clip_l",
        "CLIPTextModel",
        lambda: CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        ),
    ),
    "CLIP-G": (
        "clip_g",
        "CLIPTextModelWithProjection",
        lambda: CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
        ),
    ),
    "T5-XXL": (
        "t5",
        "T5EncoderModel",
        lambda: T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_heads=64,
            num_layers=24,
            feed_forward_proj="gated-gelu",
        ),
    ),
    "Qwen3-4B": (
        "qwen3",
        "Qwen3ForCausalLM",
        lambda: Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        lambda: Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=152064,
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
            ),
            vision_config=dict(
                hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, out_hidden_size=3584
            ),
            tie_word_embeddings=False,
        ),
    ),
}


def measure_sizes() -> Iterator[Row]:
    """Rows of sizes.csv: what each format takes of full-size encoders, by shapes alone.

    All other parameters in bfloat16.
    """
    for title, (encoder_name, class_name, config) in FULL.items():
        encoder = registry.get_encoder(encoder_name)
        model = build_skeleton(class_name, config().to_dict(), torch.bfloat16)
        linears = {}
        for name, module in model.named_modules():
            if type(module) is nn.Linear:
                linears[name] = (module.out_features, module.in_features)
        whole = sum(2 * p.numel() for p in model.parameters())
        for form in WRITTEN:
            shapes = []
            for name, shape in linears.items():
                if encoder.find_skip_reason(name, form) is None:
                    shapes.append(shape)
            ours = sum(weight_bytes(choose_format(form, *shape), *shape) for shape in shapes)
            as_bf16 = sum(2 * prod(shape) for shape in shapes)
            yield {
                "device": "",
                "case": title,
                "format": form,
                "layers": len(shapes),
                "bf16_gb": whole / 1e9,
                "quantized_share": as_bf16 / whole,
                "layers_vs_bf16": ours / as_bf16,
                "whole_vs_bf16": (whole - as_bf16 + ours) / whole,
            }


def weight_bytes(form: WeightFormat, rows: int, columns: int) -> int:
    """Of codes and scales."""
    codes = prod(form.get_qdata_shape(rows, columns))
    scales = form.get_scale_shape(rows, columns)
    if scales is None:
        return codes
    bytes_per_scale = 1 if form.granularity == BLOCK else 4
    return codes + bytes_per_scale * prod(scales)
