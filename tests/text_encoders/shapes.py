"""Shapes of the files of text encoders, and models that are filled from files; shared by the tests."""

from collections.abc import Mapping

import torch
from text_encoders.tiny_encoders import run_model
from torch import Tensor, nn

from int8run.text_encoders.registry import (
    EncoderFamily,
)
from int8run.text_encoders.skeleton import build_skeleton, remove_optional_modules
from int8run.text_encoders.state_dict_adapter import build_encoder_layout


def shapes_of(file: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in file.items()}


def fill_model(encoder: EncoderFamily, cls: str, config: Mapping, file: Mapping[str, Tensor]) -> nn.Module:
    """A model with the values of a file, by the layout; nothing is missing, and nothing without a place."""
    model = build_skeleton(cls, config, torch.float32)
    shapes = shapes_of(file)
    remove_optional_modules(encoder, shapes, model)
    layout = build_encoder_layout(encoder, shapes, model)
    assert layout.unused == ()
    assert layout.missing == ()
    for name, parts in layout.parts.items():
        place, _, word = name.rpartition(".")
        tensor = torch.cat([part.extract(file[part.key]) for part in parts])
        module = model.get_submodule(place)
        (module._parameters if word in module._parameters else module._buffers)[word] = nn.Parameter(
            tensor, requires_grad=False
        )
    return model


def has_same_output(model: nn.Module, other: nn.Module) -> bool:
    pairs = list(zip(run_model(model), run_model(other), strict=True))
    return len(pairs) >= 3 and all(torch.equal(a, b) for a, b in pairs)


def make_clip_shapes(
    wide: int, layers: int, positions: int = 77, projection: int | None = None, words: int = 49408
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (words, wide),
        "text_model.embeddings.position_embedding.weight": (positions, wide),
        "text_model.final_layer_norm.weight": (wide,),
        "text_model.final_layer_norm.bias": (wide,),
    }
    for i in range(layers):
        inner = {f"self_attn.{x}_proj": (wide, wide) for x in ("q", "k", "v", "out")}
        inner |= {
            "mlp.fc1": (4 * wide, wide),
            "mlp.fc2": (wide, 4 * wide),
            "layer_norm1": (wide,),
            "layer_norm2": (wide,),
        }
        found |= {f"text_model.encoder.layers.{i}.{name}.weight": shape for name, shape in inner.items()}
        found |= {f"text_model.encoder.layers.{i}.{name}.bias": shape[:1] for name, shape in inner.items()}
    return found if projection is None else found | {"text_projection.weight": (projection, wide)}


def make_t5_shapes(
    words: int, layers: int, wide: int, heads: int, feed: int = 128, tables: int = 1
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "shared.weight": (words, wide),
        "encoder.final_layer_norm.weight": (wide,),
    }
    for i in range(layers):
        block = f"encoder.block.{i}.layer"
        found |= {f"{block}.0.SelfAttention.{x}.weight": (heads * 64, wide) for x in "qkv"}
        found |= {
            f"{block}.0.SelfAttention.o.weight": (wide, heads * 64),
            f"{block}.1.DenseReluDense.wo.weight": (wide, feed),
        }
        found |= {f"{block}.1.DenseReluDense.wi_{x}.weight": (feed, wide) for x in (0, 1)}
        found |= {f"{block}.{x}.layer_norm.weight": (wide,) for x in (0, 1)}
        found |= (
            {f"{block}.0.SelfAttention.relative_attention_bias.weight": (32, heads)} if i < tables else {}
        )
    return found


def make_llm_shapes(
    words: int,
    wide: int,
    feed: int,
    layers: int,
    heads: int,
    groups: int,
    head: int = 128,
    root: str = "model",
    norms: bool = False,
    bias: bool = False,
    gemma: bool = False,
) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        f"{root}.embed_tokens.weight": (words, wide),
        f"{root}.norm.weight": (wide,),
    }
    more = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if gemma else ()
    for i in range(layers):
        inner = dict.fromkeys(("input_layernorm", "post_attention_layernorm", *more), (wide,))
        inner |= {
            f"self_attn.{x}_proj": (n * head, wide) for x, n in (("q", heads), ("k", groups), ("v", groups))
        }
        inner |= {f"self_attn.{x}_norm": (head,) for x in "qk"} if norms else {}
        inner |= {
            "self_attn.o_proj": (wide, heads * head),
            "mlp.gate_proj": (feed, wide),
            "mlp.up_proj": (feed, wide),
        }
        inner |= {"mlp.down_proj": (wide, feed)}
        found |= {f"{root}.layers.{i}.{name}.weight": shape for name, shape in inner.items()}
        found |= {
            f"{root}.layers.{i}.self_attn.{x}_proj.bias": (n * head,)
            for x, n in (("q", heads), ("k", groups), ("v", groups))
            if bias
        }
    return found


QWEN3_VL = "model.language_model"


def make_qwen3_5_shapes(
    words: int, wide: int, feed: int, layers: int, heads: int, groups: int, value_heads: int
) -> dict[str, tuple[int, ...]]:
    """Qwen3.5: every fourth layer has full attention with a gate, the others linear attention."""
    head, key_width, value_width = 256, 16 * 128, value_heads * 128
    root = "model.language_model"
    found: dict[str, tuple[int, ...]] = {
        f"{root}.embed_tokens.weight": (words, wide),
        f"{root}.norm.weight": (wide,),
    }
    full_attention = {
        "self_attn.q_proj.weight": (2 * heads * head, wide),
        "self_attn.k_proj.weight": (groups * head, wide),
        "self_attn.v_proj.weight": (groups * head, wide),
        "self_attn.o_proj.weight": (wide, heads * head),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
    }
    linear_attention = {
        "linear_attn.in_proj_qkv.weight": (2 * key_width + value_width, wide),
        "linear_attn.in_proj_z.weight": (value_width, wide),
        "linear_attn.in_proj_a.weight": (value_heads, wide),
        "linear_attn.in_proj_b.weight": (value_heads, wide),
        "linear_attn.out_proj.weight": (wide, value_width),
        "linear_attn.conv1d.weight": (2 * key_width + value_width, 1, 4),
        "linear_attn.norm.weight": (128,),
        "linear_attn.A_log": (value_heads,),
        "linear_attn.dt_bias": (value_heads,),
    }
    both: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (wide,),
        "post_attention_layernorm.weight": (wide,),
        "mlp.gate_proj.weight": (feed, wide),
        "mlp.up_proj.weight": (feed, wide),
        "mlp.down_proj.weight": (wide, feed),
    }
    for i in range(layers):
        attention = full_attention if i % 4 == 3 else linear_attention
        for name, shape in (both | attention).items():
            found[f"{root}.layers.{i}.{name}"] = shape
    return found


def make_gemma4_shapes(
    words: int, wide: int, feed: int, layers: int, heads: int, groups: int, global_groups: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Gemma 4: every sixth layer has heads of twice the width.

    Args:
        global_groups: key heads of these layers, whose values are their keys; None: as the others.
    """
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, wide)}
    found["model.norm.weight"] = (wide,)
    for i in range(layers):
        is_full = i % 6 == 5
        head = 512 if is_full else 256
        num_groups = global_groups or groups if is_full else groups
        inner: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (heads * head, wide),
            "self_attn.k_proj.weight": (num_groups * head, wide),
            "self_attn.o_proj.weight": (wide, heads * head),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "mlp.gate_proj.weight": (feed, wide),
            "mlp.up_proj.weight": (feed, wide),
            "mlp.down_proj.weight": (wide, feed),
            "input_layernorm.weight": (wide,),
            "post_attention_layernorm.weight": (wide,),
            "pre_feedforward_layernorm.weight": (wide,),
            "post_feedforward_layernorm.weight": (wide,),
            "layer_scalar": (1,),
        }
        if not (is_full and global_groups):
            inner["self_attn.v_proj.weight"] = (num_groups * head, wide)
        found |= {f"model.layers.{i}.{name}": shape for name, shape in inner.items()}
    return found


def make_gemma4_e_shapes(
    words: int, wide: int, feed: int, layers: int, heads: int, groups: int
) -> dict[str, tuple[int, ...]]:
    """Gemma 4 E4B: each layer adds a row of a table of its own."""
    width = 256
    found = make_gemma4_shapes(words, wide, feed, layers, heads, groups)
    found["model.embed_tokens_per_layer.weight"] = (words, layers * width)
    found["model.per_layer_model_projection.weight"] = (layers * width, wide)
    found["model.per_layer_projection_norm.weight"] = (width,)
    for i in range(layers):
        found[f"model.layers.{i}.per_layer_input_gate.weight"] = (width, wide)
        found[f"model.layers.{i}.per_layer_projection.weight"] = (wide, width)
        found[f"model.layers.{i}.post_per_layer_input_norm.weight"] = (wide,)
    return found


def make_gemma4_moe_shapes(
    words: int, wide: int, feed: int, layers: int, heads: int, groups: int, experts: int
) -> dict[str, tuple[int, ...]]:
    """Gemma 4 26B-A4B: each layer has experts besides, three of which are as wide as its MLP."""
    found = make_gemma4_shapes(words, wide, feed, layers, heads, groups, max(1, groups // 4))
    inner = feed // 3
    for i in range(layers):
        layer = f"model.layers.{i}"
        found[f"{layer}.router.proj.weight"] = (experts, wide)
        found[f"{layer}.router.scale"] = (wide,)
        found[f"{layer}.router.per_expert_scale"] = (experts,)
        found[f"{layer}.experts.gate_up_proj"] = (experts, 2 * inner, wide)
        found[f"{layer}.experts.down_proj"] = (experts, wide, inner)
        for norm in (
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
        ):
            found[f"{layer}.{norm}.weight"] = (wide,)
    return found


SMALL = {
    "clip_l": make_clip_shapes(768, 1, words=40),
    "clip_g": make_clip_shapes(1280, 1, projection=1280, words=40),
    "clip_h": make_clip_shapes(1024, 1, projection=1024, words=40),
    "clip": make_clip_shapes(64, 2, words=40),
    "t5": make_t5_shapes(40, 2, 64, 2),
    "umt5": make_t5_shapes(40, 2, 64, 2, tables=2),
    "qwen2_5_vl": make_llm_shapes(40, 256, 32, 2, 2, 1, bias=True),
    "t5_old": {
        key.replace("wi_0", "wi"): shape
        for key, shape in make_t5_shapes(40, 2, 64, 2).items()
        if "wi_1" not in key
    },
    "qwen2_5": make_llm_shapes(40, 256, 32, 2, 2, 1, bias=True),
    "qwen3": make_llm_shapes(40, 64, 32, 2, 2, 1, norms=True),
    "qwen3_vl": make_llm_shapes(40, 64, 32, 2, 2, 1, 128, QWEN3_VL, True),
    "qwen3_5": make_qwen3_5_shapes(40, 64, 32, 4, 2, 1, 16),
    "gemma4": make_gemma4_e_shapes(40, 64, 32, 24, 2, 1),
    "gemma4_unified": make_gemma4_shapes(40, 64, 32, 6, 2, 1, 1),
    "gemma4_moe": make_gemma4_moe_shapes(40, 64, 48, 6, 2, 1, experts=16),
    "gemma2": make_llm_shapes(40, 64, 32, 2, 2, 1, 256, gemma=True),
    "gemma3": make_llm_shapes(40, 64, 32, 2, 2, 1, 256, norms=True, gemma=True),
    "mistral3": make_llm_shapes(40, 64, 32, 2, 2, 1),
    "mistral3_pruned": make_llm_shapes(40, 64, 32, 2, 2, 1),
    "ministral3": make_llm_shapes(40, 64, 32, 2, 2, 1),
    "llama": make_llm_shapes(40, 64, 32, 2, 2, 1),
}


def make_openclip_file(wide: int = 64, layers: int = 2) -> dict[str, Tensor]:
    """Random weights by OpenCLIP's names."""
    inner = {
        "ln_1.weight": (wide,),
        "ln_1.bias": (wide,),
        "ln_2.weight": (wide,),
        "ln_2.bias": (wide,),
        "attn.in_proj_weight": (3 * wide, wide),
        "attn.in_proj_bias": (3 * wide,),
        "attn.out_proj.weight": (wide, wide),
        "attn.out_proj.bias": (wide,),
        "mlp.c_fc.weight": (48, wide),
        "mlp.c_fc.bias": (48,),
        "mlp.c_proj.weight": (wide, 48),
        "mlp.c_proj.bias": (wide,),
    }
    shapes = {
        "token_embedding.weight": (40, wide),
        "positional_embedding": (16, wide),
        "ln_final.weight": (wide,),
        "ln_final.bias": (wide,),
    }
    shapes |= {
        f"transformer.resblocks.{i}.{name}": shape for i in range(layers) for name, shape in inner.items()
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {
        "text_projection": torch.randn(wide, wide)
    }


WAN = {
    r"^shared\.": "token_embedding.",
    r"^encoder\.final_layer_norm\.": "norm.",
    r"^encoder\.block\.(\d+)\.layer\.": r"blocks.\1.",
    r"\.0\.SelfAttention\.relative_attention_bias\.": ".pos_embedding.embedding.",
    r"\.0\.SelfAttention\.": ".attn.",
    r"\.0\.layer_norm": ".norm1",
    r"\.1\.layer_norm": ".norm2",
    r"\.1\.DenseReluDense\.wi_0": ".ffn.gate.0",
    r"\.1\.DenseReluDense\.wi_1": ".ffn.fc1",
    r"\.1\.DenseReluDense\.wo": ".ffn.fc2",
}
