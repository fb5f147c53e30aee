"""Which encoder a file holds, where its tensors go, and its configuration.

With tiny models of every class, and full sizes as shapes alone.
"""

import copy
import logging
import re
from collections.abc import Mapping

import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_open_clip_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
)
from safetensors.torch import load_file
from text_encoders.tiny_encoders import CLIP, LLM, QWEN25, T5, TINY, answers, tiny_model
from torch import Tensor, nn

from int8run.errors import ConfigError, FileError
from int8run.models.family import load_families
from int8run.models.name_pattern import match_pattern
from int8run.models.state_dict_adapter import TensorPart
from int8run.quant.formats import FORMATS
from int8run.text_encoders.detect import detect_encoder, find_encoder_of_class, find_prefixes, match_encoders
from int8run.text_encoders.model_config import build_config, load_tokenizer
from int8run.text_encoders.registry import (
    EncoderFamily,
    EncoderFingerprint,
    get_encoder,
    list_supported_encoders,
    load_encoders,
)
from int8run.text_encoders.skeleton import build_skeleton, remove_optional_modules
from int8run.text_encoders.state_dict_adapter import build_encoder_layout, map_canonical_names

SEES = r"^(model\.)?(visual|vision_model|vision_tower|multi_modal_projector)\."


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
    pairs = list(zip(answers(model), answers(other), strict=True))
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


@pytest.mark.parametrize("name", TINY)
def test_file_of_every_class_is_detected_and_fills_its_model(name, tmp_path):
    tiny, model = TINY[name], tiny_model(name)
    model.save_pretrained(tmp_path)
    own = tiny.file(model)

    encoder = find_encoder_of_class(tiny.cls, shapes_of(own))

    assert has_same_output(model, fill_model(encoder, tiny.cls, tiny.config, own))
    for file in (own, load_file(tmp_path / "model.safetensors"), model.state_dict()):
        shapes = shapes_of(file)
        assert detect_encoder(shapes).encoder.name == tiny.encoder
        assert find_encoder_of_class(tiny.cls, shapes) is encoder
        parts, dropped = map_canonical_names(get_encoder(tiny.encoder), shapes)
        assert set(parts) - {"lm_head.weight"} == set(own) - {"lm_head.weight"}
        assert set(dropped) <= {"encoder.embed_tokens.weight"}
        assert all(torch.equal(file[part.key], own[key]) for key, (part,) in parts.items() if key in own)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if "vision_config" in tiny.config])
def test_vision_tower_that_a_file_lacks_is_removed(name, caplog):
    tiny, model = TINY[name], tiny_model(name)
    file = {key: value for key, value in tiny.file(model).items() if not re.match(SEES + "|lm_head", key)}
    encoder = find_encoder_of_class(tiny.cls, shapes_of(file))

    with caplog.at_level(logging.INFO):
        built = fill_model(encoder, tiny.cls, tiny.config, file)

    assert has_same_output(model, built)
    assert "is not in the file: the file has no vision tower; use text prompts only" in caplog.text

    inner = getattr(built, "model", built)
    tower = inner.visual if hasattr(inner, "visual") else inner.vision_tower

    with pytest.raises(
        FileError,
        match=r"(visual|vision_tower|vision_model) is needed and was not in the text encoder's file: the "
        r"file has no vision",
    ):
        tower(torch.zeros(1))


@pytest.mark.parametrize("cls", ["Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"])
@pytest.mark.parametrize("root", ["", "model."])
def test_names_of_hub_folders_become_canonical(cls, root):
    tiny, model = TINY[cls], tiny_model(cls)
    own = tiny.file(model)
    moved = [
        (r"^(model\.|lm_head)", rf"{root}language_model.\1"),
        ("^vision_model", f"{root}vision_tower.vision_model"),
        ("^multi", f"{root}multi"),
    ]
    file = {}
    for key, value in own.items():
        for pattern, new in moved:
            key = re.sub(pattern, new, key)
        file[key] = value
    encoder = get_encoder(tiny.encoder)

    parts, dropped = map_canonical_names(encoder, shapes_of(file))

    assert detect_encoder(shapes_of(file)).encoder is encoder
    assert parts.keys() == own.keys()
    assert not dropped
    assert all(torch.equal(file[part.key], own[key]) for key, (part,) in parts.items())


def test_half_of_an_optional_module_is_missing_not_removed():
    tiny, model = TINY["Mistral3Model"], tiny_model("Mistral3Model")
    file = tiny.file(model)
    del file["vision_tower.ln_pre.weight"]

    encoder, empty = get_encoder("mistral3"), build_skeleton("Mistral3Model", tiny.config, torch.float32)

    assert remove_optional_modules(encoder, shapes_of(file), empty) == {}
    assert build_encoder_layout(encoder, shapes_of(file), empty).missing == ("vision_tower.ln_pre.weight",)


PREFIXES = {
    "clip": [
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_l.",
        "cond_stage_model.transformer.",
        "text_encoder.",
        "text_encoder_2.",
        "conditioner.embedders.0.transformer.",
        "clip_l.transformer.",
        "clip_l.",
        "transformer.",
        "te1.",
        "",
    ],
    "t5": [
        "text_encoders.t5xxl.transformer.",
        "t5xxl.transformer.",
        "t5xxl.",
        "text_encoder_3.",
        "transformer.",
        "",
    ],
    "llama": [
        "text_encoders.llama.transformer.",
        "text_encoders.llama.model.",
        "text_encoders.llama.",
        "llama.",
        "",
    ],
}


@pytest.mark.parametrize(
    "name, prefix", [(name, prefix) for name, all_of in PREFIXES.items() for prefix in all_of]
)
def test_encoder_is_detected_behind_every_prefix(name, prefix):
    cls = {"clip": "CLIPTextModelWithProjection", "t5": "T5EncoderModel", "llama": "LlamaModel"}[name]
    file = TINY[cls].file(tiny_model(cls))
    shapes = {prefix + key: tuple(value.shape) for key, value in file.items()}
    shapes |= {
        "model.diffusion_model.input_blocks.0.0.weight": (4, 4),
        "first_stage_model.decoder.conv_in.weight": (4, 4),
    }
    shapes |= {
        f"{prefix}logit_scale": (),
        f"{prefix}scaled_fp8": (2,),
        f"{prefix}encoder.block.0.layer.0.SelfAttention.k.comfy_quant": (9,),
    }

    found = detect_encoder(shapes)

    assert (found.encoder.name, found.prefix) == (name, prefix)


def test_prefixes_are_found_shortest_first():
    keys = [
        "text_encoders.clip_l.transformer.text_model.a",
        "text_encoders.t5xxl.logit",
        "other.transformer.a",
        "model.b",
    ]
    assert find_prefixes(keys) == [
        "",
        "text_encoders.t5xxl.",
        "text_encoders.clip_l.",
        "text_encoders.clip_l.transformer.",
    ]


def make_checkpoint_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {f"text_encoders.clip_l.transformer.{k}": s for k, s in make_clip_shapes(768, 1).items()}
    shapes |= {f"text_encoders.clip_g.transformer.{k}": s for k, s in make_clip_shapes(1280, 1).items()}
    return shapes | {
        f"text_encoders.t5xxl.transformer.{k}": s for k, s in make_t5_shapes(32, 2, 64, 4).items()
    }


@pytest.mark.parametrize(
    "which, name",
    [
        ("clip_l", "clip_l"),
        ("clip_g", "clip_g"),
        ("t5", "t5"),
        ("t5xxl", "t5"),
        ("text_encoders.t5xxl.transformer.", "t5"),
    ],
)
def test_one_of_several_encoders_is_chosen(which, name):
    assert detect_encoder(make_checkpoint_shapes(), which).encoder.name == name


def test_several_encoders_without_a_choice_are_an_error():
    held = (
        r"t5 \(text_encoders.t5xxl.transformer.\), clip_g \(text_encoders.clip_g.transformer.\), "
        r"clip_l \(.*\)"
    )
    shapes = make_checkpoint_shapes()

    with pytest.raises(
        FileError,
        match=f"the file holds several text encoders: {held}; choose one: t5 or clip_g or clip_l",
    ):
        detect_encoder(shapes)
    with pytest.raises(FileError, match=f"the file holds no text encoder called 'umt5'; it holds {held}"):
        detect_encoder(shapes, "umt5")


DENOISER = [key.replace("*", "0") for key in load_families()["flux"].fingerprints[0].all]


@pytest.mark.parametrize(
    "shapes, message",
    [
        (
            {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (4, 4)},
            "it is a LoRA; a LoRA is given with lora=",
        ),
        ({"text_model.encoder.layers.0.mlp.fc2.lora_A.weight": (4, 4)}, "it is a LoRA"),
        ({"x.lokr_w1": (4, 4)}, "it is a LoRA"),
        (dict.fromkeys(DENOISER, (128, 4)), "it holds the denoiser of flux; that is given as model.location"),
        (
            {"first_stage_model.decoder.conv_out.weight": (3, 4, 3, 3)},
            "it holds a VAE, which is not quantized",
        ),
        ({"decoder.conv_in.weight": (4, 4, 3, 3)}, "it holds a VAE"),
        (
            {"a.weight": (4, 4), "b.weight": (2,)},
            "2 tensors, such as a.weight, b.weight; known are clip, clip_g, .*, umt5",
        ),
        ({}, "0 tensors, such as none; known are"),
        (
            {"encoder.block.0.layer.0.SelfAttention.k.weight": (64, 64)},
            "such as encoder.block.0.*; t5 would have encoder.block.0.layer.1.DenseReluDense.wi_1.weight; "
            "t5_old would have .*wi.w",
        ),
    ],
)
def test_file_without_an_encoder_is_an_error_that_says_what_it_is(shapes, message):
    with pytest.raises(FileError, match="the file holds no text encoder that is known: ") as error:
        detect_encoder(shapes)
    assert re.search(message, str(error.value))


LAYER = "model.layers.0"


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("byt5", make_t5_shapes(1510, 2, 1472, 6)),
        ("ming", {"thinker.layers.1.mlp.image_gate.proj.weight": (8, 8)}),
        ("jina_clip", {"model.encoder.layers.0.mixer.Wqkv.weight": (8, 8)}),
        ("t5_gemma", {"model.encoder.layers.0.pre_self_attn_layernorm.weight": (8,)}),
        ("gpt_oss", {f"{LAYER}.self_attn.sinks": (8,), f"{LAYER}.post_attention_layernorm.weight": (8,)}),
        ("qwen3_5", {"model.language_model.layers.0.linear_attn.A_log": (8,)}),
        (
            "gemma4",
            {
                f"{LAYER}.{n}": (8,)
                for n in ("layer_scalar", "post_feedforward_layernorm.weight", "self_attn.q_norm.weight")
            },
        ),
        (
            "gemma4",
            {
                f"{LAYER}.post_feedforward_layernorm.weight": (8,),
                "model.embed_tokens_per_layer.weight": (8, 8),
            },
        ),
    ],
)
def test_known_but_unsupported_encoder_is_an_error(name, shapes):
    if name == "gemma4" and len(shapes) == 2:
        shapes |= {f"{LAYER}.self_attn.q_norm.weight": (8,)}

    with pytest.raises(
        FileError,
        match=f"holds the text encoder {name}, which int8run does not support; it has clip, clip_g, .*, umt5",
    ):
        detect_encoder(shapes)
    assert [encoder.name for encoder in match_encoders(shapes, load_encoders())] == [name]


QWEN3_VL = "model.language_model"
EYES = {"model.visual.deepstack_merger_list.0.norm.weight": (4096,)}
FULL: dict[str, tuple[str, dict[str, tuple[int, ...]], dict]] = {
    "CLIP-L": (
        "clip_l",
        make_clip_shapes(768, 12),
        dict(
            hidden_size=768,
            num_hidden_layers=12,
            intermediate_size=3072,
            num_attention_heads=12,
            vocab_size=49408,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=768,
        ),
    ),
    "LongCLIP-L": (
        "clip_l",
        make_clip_shapes(768, 12, 248),
        dict(max_position_embeddings=248, hidden_size=768),
    ),
    "CLIP-G": (
        "clip_g",
        make_clip_shapes(1280, 32, projection=1280),
        dict(
            hidden_size=1280,
            num_hidden_layers=32,
            intermediate_size=5120,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            eos_token_id=2,
        ),
    ),
    "CLIP-H": (
        "clip_h",
        make_clip_shapes(1024, 23),
        dict(hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"),
    ),
    "CLIP-B": (
        "clip",
        make_clip_shapes(512, 12, projection=512),
        dict(hidden_size=512, num_attention_heads=8, hidden_act="quick_gelu"),
    ),
    "T5-XXL": (
        "t5",
        make_t5_shapes(32128, 24, 4096, 64, 10240),
        dict(
            d_model=4096,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            d_kv=64,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=32,
        ),
    ),
    "UMT5-XXL": (
        "umt5",
        make_t5_shapes(256384, 24, 4096, 64, 10240, 24),
        dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, vocab_size=256384),
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        make_llm_shapes(152064, 3584, 18944, 28, 28, 4, bias=True) | {"visual.merger.ln_q.weight": (1280,)},
        dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
    ),
    "Qwen2.5-VL-7B, text": (
        "qwen2_5_vl",
        make_llm_shapes(152064, 3584, 18944, 28, 28, 4, bias=True),
        dict(hidden_size=3584),
    ),
    "Qwen2.5-3B": (
        "qwen2_5",
        make_llm_shapes(151936, 2048, 11008, 36, 16, 2, bias=True),
        dict(
            hidden_size=2048,
            num_hidden_layers=36,
            intermediate_size=11008,
            num_attention_heads=16,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen3-4B": (
        "qwen3",
        make_llm_shapes(151936, 2560, 9728, 36, 32, 8, norms=True),
        dict(
            hidden_size=2560,
            num_hidden_layers=36,
            vocab_size=151936,
            intermediate_size=9728,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen3-8B": (
        "qwen3",
        make_llm_shapes(151936, 4096, 12288, 36, 32, 8, norms=True),
        dict(hidden_size=4096, tie_word_embeddings=False),
    ),
    "Qwen3-VL-4B": (
        "qwen3_vl",
        make_llm_shapes(151936, 2560, 9728, 36, 32, 8, 128, QWEN3_VL, True)
        | EYES
        | {"model.visual.blocks.0.norm1.weight": (1024,)},
        dict(hidden_size=2560, head_dim=128, rope_theta=5e6),
    ),
    "Gemma2-2B": (
        "gemma2",
        make_llm_shapes(256000, 2304, 9216, 26, 8, 4, 256, gemma=True),
        dict(
            hidden_size=2304,
            num_hidden_layers=26,
            intermediate_size=9216,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            vocab_size=256000,
        ),
    ),
    "Gemma3-4B": (
        "gemma3",
        make_llm_shapes(262208, 2560, 10240, 34, 8, 4, 256, norms=True, gemma=True),
        dict(
            hidden_size=2560,
            num_hidden_layers=34,
            intermediate_size=10240,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=262208,
        ),
    ),
    "Gemma3-12B": (
        "gemma3",
        make_llm_shapes(262208, 3840, 15360, 48, 16, 8, 256, norms=True, gemma=True),
        dict(
            hidden_size=3840,
            num_hidden_layers=48,
            intermediate_size=15360,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
        ),
    ),
    "Mistral-3 24B": (
        "mistral3",
        make_llm_shapes(131072, 5120, 32768, 40, 32, 8),
        dict(
            hidden_size=5120,
            num_hidden_layers=40,
            vocab_size=131072,
            intermediate_size=32768,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_theta=1e9,
            model_type="mistral",
        ),
    ),
    "Mistral-3 24B of FLUX.2": (
        "mistral3_pruned",
        make_llm_shapes(131072, 5120, 32768, 30, 32, 8),
        dict(num_hidden_layers=30, rope_theta=1e9),
    ),
    "Ministral-3 3B": (
        "ministral3",
        make_llm_shapes(131072, 3072, 9216, 26, 32, 8),
        dict(
            hidden_size=3072,
            num_hidden_layers=26,
            intermediate_size=9216,
            num_attention_heads=32,
            num_key_value_heads=8,
            model_type="ministral3",
        ),
    ),
    "Llama-3 8B": (
        "llama",
        make_llm_shapes(128320, 4096, 14336, 32, 32, 8),
        dict(
            hidden_size=4096,
            num_hidden_layers=32,
            vocab_size=128320,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_theta=5e5,
            max_position_embeddings=8192,
        ),
    ),
    "Llama-3.1 8B": (
        "llama",
        make_llm_shapes(128256, 4096, 14336, 32, 32, 8),
        dict(max_position_embeddings=131072),
    ),
    "Mistral 7B": ("llama", make_llm_shapes(32000, 4096, 14336, 32, 32, 8), dict(vocab_size=32000)),
    "Llama-2 13B": ("llama", make_llm_shapes(32000, 5120, 13824, 40, 40, 40), dict(num_attention_heads=40)),
    "Mistral-NeMo 12B": (
        "mistral3",
        make_llm_shapes(131072, 5120, 14336, 40, 32, 8),
        dict(num_hidden_layers=40),
    ),
}


@pytest.mark.parametrize("key", FULL)
def test_config_of_full_sizes_is_the_published_one(key):
    name, shapes, published = FULL[key]
    found = match_encoders(shapes, load_encoders())

    assert [encoder.name for encoder in found] == [name]

    config = build_config(found[0], shapes)

    assert published.items() <= {**config, **config.get("text_config", {})}.items()


@pytest.mark.parametrize("key, tensors", [("CLIP-L", 196), ("CLIP-G", 517), ("UMT5-XXL", 243)])
def test_full_model_fits_its_file(key, tensors):
    name, shapes, _ = FULL[key]
    encoder = get_encoder(name)

    layout = build_encoder_layout(
        encoder, shapes, build_skeleton(encoder.classes[0], build_config(encoder, shapes), torch.bfloat16)
    )

    assert len(layout.parts) == tensors
    assert (layout.unused, layout.missing, layout.dropped) == ((), (), {})


def test_rope_is_scaled_for_llama_3_1_only():
    scaled = build_config(get_encoder("llama"), FULL["Llama-3.1 8B"][1])["rope_scaling"]

    assert (scaled["rope_type"], scaled["factor"]) == ("llama3", 8.0)
    assert "rope_scaling" not in build_config(get_encoder("llama"), FULL["Llama-3 8B"][1])


def test_vision_config_depends_on_the_size_of_qwen3_vl():
    small, large = (
        (
            EYES
            | {
                "model.visual.blocks.0.norm1.weight": (n,),
                f"{QWEN3_VL}.layers.0.input_layernorm.weight": (64,),
            }
        )
        for n in (1024, 1152)
    )
    config = {name: value for name, value in get_encoder("qwen3_vl").config.items() if name != "text_config"}

    seen = [
        build_config(EncoderFamily("qwen3_vl", config=config, variants=get_encoder("qwen3_vl").variants), s)
        for s in (small, large)
    ]

    assert [one["vision_config"]["deepstack_visual_indexes"] for one in seen] == [[5, 11, 17], [8, 16, 24]]
    assert [one["vision_config"]["hidden_size"] for one in seen] == [1024, 1152]
    assert seen[1]["vision_config"]["patch_size"] == 16


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
    "gemma2": make_llm_shapes(40, 64, 32, 2, 2, 1, 256, gemma=True),
    "gemma3": make_llm_shapes(40, 64, 32, 2, 2, 1, 256, norms=True, gemma=True),
    "mistral3": make_llm_shapes(40, 64, 32, 2, 2, 1),
    "mistral3_pruned": make_llm_shapes(40, 64, 32, 2, 2, 1),
    "ministral3": make_llm_shapes(40, 64, 32, 2, 2, 1),
    "llama": make_llm_shapes(40, 64, 32, 2, 2, 1),
}


@pytest.mark.parametrize(
    "name, cls",
    [(name, cls) for name, encoder in list_supported_encoders().items() for cls in encoder.classes],
)
def test_model_of_every_class_is_built_from_shapes_alone_and_runs(name, cls):
    encoder, shapes = get_encoder(name), SMALL[name]
    empty = build_skeleton(cls, build_config(encoder, shapes), torch.float32)
    remove_optional_modules(encoder, shapes, empty)

    layout = build_encoder_layout(encoder, shapes, empty)

    assert (layout.unused, layout.missing) == ((), ())
    assert not any(buffer.is_meta for buffer in empty.buffers())

    for module in empty.modules():
        module._parameters.update(
            {
                n: nn.Parameter(torch.full(p.shape, 0.01))
                for n, p in module._parameters.items()
                if p is not None
            }
        )

    assert all(x.isfinite().all() for x in answers(empty))


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


@pytest.mark.parametrize(
    "prefix",
    ["conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "cond_stage_model.model.", ""],
)
def test_openclip_names_agree_with_diffusers_converter(prefix):
    file = make_openclip_file()
    shapes = {prefix + key: tuple(value.shape) for key, value in file.items()} | {
        f"{prefix}logit_scale": (),
        f"{prefix}attn_mask": (16, 16),
    }

    found = detect_encoder(shapes)

    assert (found.encoder.name, found.prefix) == ("clip", prefix)

    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    model = build_skeleton("CLIPTextModelWithProjection", CLIP, torch.float32)
    converted = convert_open_clip_checkpoint(model, {"p." + key: value for key, value in file.items()}, "p.")
    layout, (names, dropped) = (
        build_encoder_layout(found.encoder, inside, model),
        map_canonical_names(found.encoder, inside),
    )

    assert set(layout.dropped) == set(dropped) == {"logit_scale", "attn_mask"}
    assert layout.missing == layout.unused == ()
    for parts in (layout.parts, names):
        made = {name: part.extract(file[part.key]) for name, (part,) in parts.items()}
        assert made.keys() == converted.keys()
        assert all(torch.equal(made[name], converted[name]) for name in made)


def test_config_is_read_from_an_openclip_file():
    shapes = shapes_of(make_openclip_file(1024)) | {"text_projection": (1024, 512)}
    config = build_config(get_encoder("clip_h"), shapes)

    assert (
        config["hidden_size"],
        config["projection_dim"],
        config["num_hidden_layers"],
        config["vocab_size"],
    ) == (1024, 512, 2, 40)

    third = {"rows": "text_model.encoder.layers.1.self_attn.k_proj.weight"}

    assert build_config(EncoderFamily("clip_h", config={"rows": third}), shapes) == {"rows": 1024}


@pytest.mark.parametrize(
    "key, shape",
    [
        ("transformer.resblocks.0.attn.in_proj_weight", (7, 64)),
        ("transformer.resblocks.0.attn.in_proj_bias", (8,)),
        ("text_projection", (64,)),
    ],
)
def test_damaged_openclip_tensor_is_an_error(key, shape):
    with pytest.raises(
        FileError, match=rf"{key} holds .*, but its shape is \[{shape[0]}.*; the file is damaged"
    ):
        map_canonical_names(get_encoder("clip"), shapes_of(make_openclip_file()) | {key: shape})


def test_names_of_old_diffusers_and_sd1_files_become_canonical():
    tiny, model = TINY["CLIPTextModelWithProjection"], tiny_model("CLIPTextModelWithProjection")
    file = {
        re.sub(r"self_attn\.(\w+)_proj", r"self_attn.to_\1", key): value
        for key, value in tiny.file(model).items()
    }

    old = {key.removeprefix("text_model."): value for key, value in tiny.file(model).items()}

    for one in (file, old):
        assert detect_encoder(shapes_of(one)).encoder.name == "clip"
        assert has_same_output(model, fill_model(get_encoder("clip"), tiny.cls, tiny.config, one))


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


def test_names_of_wan_become_canonical():
    tiny, model = TINY["UMT5EncoderModel"], tiny_model("UMT5EncoderModel")
    file = {}
    for name, value in tiny.file(model).items():
        for pattern, new in WAN.items():
            name = re.sub(pattern, new, name)
        file[name] = value

    assert {"blocks.1.ffn.gate.0.weight", "blocks.0.pos_embedding.embedding.weight", "norm.weight"} <= set(
        file
    )
    assert detect_encoder(shapes_of(file)).encoder.name == "umt5"
    assert has_same_output(model, fill_model(get_encoder("umt5"), tiny.cls, tiny.config, file))


def test_t5_of_sd3_agrees_with_diffusers_converter():
    model = tiny_model("T5EncoderModel")
    prefix = "text_encoders.t5xxl.transformer."
    file = {prefix + key: value for key, value in TINY["T5EncoderModel"].file(model).items()}
    found = detect_encoder(shapes_of(file))
    names, _ = map_canonical_names(
        found.encoder, shapes_of({key.removeprefix(found.prefix): value for key, value in file.items()})
    )

    converted = convert_sd3_t5_checkpoint_to_diffusers(file)

    assert {name: TensorPart(key) for name, key in zip(converted, converted, strict=True)} == {
        name: part for name, (part,) in names.items()
    }


@pytest.mark.parametrize("held", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_embedding_under_either_of_its_two_names_is_one(held):
    tiny, model = TINY["T5EncoderModel"], tiny_model("T5EncoderModel")
    file = tiny.file(model)
    table = file.pop("shared.weight")
    file |= {f"{name}.weight": table for name in held}
    empty = build_skeleton(tiny.cls, tiny.config, torch.float32)

    layout = build_encoder_layout(get_encoder("t5"), shapes_of(file), empty)

    assert (
        layout.parts["shared.weight"]
        == layout.parts["encoder.embed_tokens.weight"]
        == (TensorPart(f"{held[0]}.weight"),)
    )
    assert layout.missing == ()
    assert layout.dropped == (
        {} if len(held) == 1 else {"encoder.embed_tokens.weight": "the same as shared.weight"}
    )
    assert has_same_output(model, fill_model(get_encoder("t5"), tiny.cls, tiny.config, file))


def test_tied_head_is_filled_from_the_embedding():
    tiny, model = TINY["Qwen3ForCausalLM"], tiny_model("Qwen3ForCausalLM")
    built = fill_model(get_encoder("qwen3"), tiny.cls, tiny.config, tiny.file(model))

    words = torch.tensor([[3, 4]])

    assert torch.equal(built(words).logits, model(words).logits)

    loose = fill_model(
        get_encoder("qwen3"), tiny.cls, {**tiny.config, "tie_word_embeddings": False}, tiny.file(model)
    )

    assert isinstance(loose.lm_head, nn.Identity)
    assert has_same_output(model, loose)


def test_keys_without_a_place_are_dropped_with_a_reason():
    clip = make_clip_shapes(64, 1) | {
        "text_model.embeddings.position_ids": (1, 77),
        "logit_scale": (),
        "logit_bias": (),
    }
    t5 = make_t5_shapes(40, 1, 64, 1) | {
        "decoder.block.0.layer.0.SelfAttention.q.weight": (8, 8),
        "lm_head.weight": (40, 64),
        "spiece_model": (99,),
    }

    mistral = make_llm_shapes(40, 64, 32, 1, 2, 1) | {
        "tekken_model": (99,),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (32,),
    }

    for name, shapes, dropped in (("clip", clip, 3), ("t5", t5, 3), ("mistral3", mistral, 2)):
        encoder = get_encoder(name)
        assert len(map_canonical_names(encoder, shapes)[1]) == dropped
        empty = build_skeleton(encoder.classes[0], build_config(encoder, shapes), torch.float32)
        remove_optional_modules(encoder, shapes, empty)
        layout = build_encoder_layout(encoder, shapes | {"junk.weight": (1,)}, empty)
        assert len(layout.dropped) == dropped
        assert layout.unused == ("junk.weight",)
        assert layout.missing == ()


def test_projection_is_dropped_for_a_class_without_one():
    encoder, shapes = get_encoder("clip"), make_clip_shapes(64, 1, projection=64)
    layout = build_encoder_layout(
        encoder, shapes, build_skeleton("CLIPTextModel", build_config(encoder, shapes), torch.float32)
    )

    assert layout.dropped == {"text_projection.weight": "the CLIPTextModel has no place for it"}
    assert layout.unused == ()


def test_missing_projection_is_the_identity_for_clip_l_only(caplog):
    tiny, model = TINY["CLIPTextModelWithProjection"], tiny_model("CLIPTextModelWithProjection")
    file = {key: value for key, value in tiny.file(model).items() if key != "text_projection.weight"}
    with caplog.at_level(logging.INFO):
        built = fill_model(get_encoder("clip_l"), tiny.cls, tiny.config, file)

    reference = fill_model(
        get_encoder("clip_l"), tiny.cls, tiny.config, file | {"text_projection.weight": torch.eye(64)}
    )

    assert has_same_output(built, reference)
    assert "text_projection is not in the file: " in caplog.text
    assert "the identity" in caplog.text

    # of the others the projection is none: it would be another embedding
    shapes = make_clip_shapes(1280, 1)
    empty = build_skeleton(
        "CLIPTextModelWithProjection", build_config(get_encoder("clip_g"), shapes), torch.float32
    )

    assert remove_optional_modules(get_encoder("clip_g"), shapes, empty) == {}
    assert build_encoder_layout(get_encoder("clip_g"), shapes, empty).missing == ("text_projection.weight",)


@pytest.mark.parametrize("norm", [True, False])
def test_pruned_mistral_has_no_final_norm(norm):
    tiny, model = TINY["Mistral3Model"], tiny_model("Mistral3Model")
    file = {key: value for key, value in tiny.file(model).items() if norm or key != "model.norm.weight"}
    encoder = get_encoder("mistral3_pruned")
    built = fill_model(encoder, tiny.cls, tiny.config, file)
    words = torch.tensor([[3, 4, 5]])
    last = built(words, output_hidden_states=True).hidden_states[-1]

    expected = model(words, output_hidden_states=True).hidden_states[-1]

    assert torch.equal(model.language_model.norm(last), expected)
    assert not torch.equal(last, expected)
    assert ("model.norm.weight" in map_canonical_names(encoder, shapes_of(file))[1]) == norm


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"text_model.encoder.layers.0.mlp.fc1.weight": (96, 64)},
            r"fc1.weight of the file has the shape \[96, 64\], but .* need \[256, 64\]",
        ),
        (
            {"encoder.layers.0.mlp.fc1.weight": (256, 64)},
            "holds text_model.encoder.layers.0.mlp.fc1.weight of the clip twice: as text_model",
        ),
    ],
)
def test_file_that_does_not_fit_is_an_error(change, message):
    encoder, shapes = get_encoder("clip"), make_clip_shapes(64, 1)
    model = build_skeleton("CLIPTextModelWithProjection", build_config(encoder, shapes), torch.float32)

    with pytest.raises(FileError, match=message):
        build_encoder_layout(encoder, shapes | change, model)


def test_tensor_under_two_names_is_an_error():
    message = (
        r"the file holds (text_model.final_layer_norm.bias) of clip twice: as \1 and as "
        r"ln_final.bias; remove one"
    )
    with pytest.raises(FileError, match=message):
        map_canonical_names(get_encoder("clip"), make_clip_shapes(64, 1) | {"ln_final.bias": (64,)})


WORDS, CLIP_LAYER = "text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0"
ATTENTION = "encoder.block.0.layer.0.SelfAttention"


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "clip",
            {WORDS: None},
            f"the file has no {WORDS}, which says the vocab_size of clip; it is incomplete",
        ),
        (
            "clip",
            {"text_model.final_layer_norm.weight": (96,)},
            "weight has 96 rows, not a multiple of 64: the num_attention_heads of this clip",
        ),
        (
            "clip",
            {f"{CLIP_LAYER}.layer_norm1.weight": None},
            r"has no .*layers.\*.layer_norm1.weight, which says the num_hidden_layers",
        ),
        (
            "t5",
            {f"{ATTENTION}.relative_attention_bias.weight": (32,)},
            "which says the num_heads of t5; it is incomplete",
        ),
        (
            "t5",
            {f"{ATTENTION}.q.weight": (63, 8)},
            "q.weight has 63 rows, not a multiple of 2: the d_kv of this t5 cannot be derived from the file",
        ),
        (
            "clip",
            {"text_model.embeddings.position_embedding.weight": (2**40, 0)},
            "has no .*, which says the max_position_embeddings",
        ),
        (
            "llama",
            {"model.embed_tokens.weight": ()},
            "no model.embed_tokens.weight, which says the vocab_size of llama",
        ),
    ],
)
def test_size_that_cannot_be_derived_is_an_error(name, change, message):
    shapes = {
        key: shape
        for key, shape in (SMALL[name] if name != "clip" else make_clip_shapes(64, 1)).items()
        if change.get(key, 1) is not None
    }
    with pytest.raises(FileError, match=message):
        build_config(
            get_encoder(name), shapes | {key: shape for key, shape in change.items() if shape is not None}
        )


@pytest.mark.parametrize(
    "name, layer, why",
    [
        ("clip_g", "text_projection", "at the very end"),
        ("clip_g", "text_model.encoder.layers.0.mlp.fc1", None),
        ("clip_g", "transformer.resblocks.0.mlp.c_fc", None),
        ("clip_l", "embeddings.token_embedding", "looked up"),
        ("t5", "encoder.block.3.layer.1.DenseReluDense.wo", "outliers"),
        ("umt5", "blocks.3.ffn.fc2", "outliers"),
        ("t5", "encoder.block.3.layer.1.DenseReluDense.wi_1", None),
        ("t5", "encoder.embed_tokens", "looked up"),
        ("umt5", "blocks.3.pos_embedding.embedding", "added to attention"),
        ("qwen3", "layers.0.mlp.up_proj", None),
        ("qwen3", "lm_head", "next token"),
        ("qwen2_5_vl", "model.visual.blocks.0.attn.qkv", "vision tower"),
        ("qwen3_vl", "visual.blocks.0.attn.qkv", "vision tower"),
        ("qwen3_vl", "language_model.embed_tokens", "looked up"),
        ("gemma3", "model.vision_tower.encoder.layers.0.mlp.fc1", "vision tower"),
        ("mistral3", "language_model.model.layers.0.mlp.up_proj", None),
        ("mistral3", "model.multi_modal_projector.linear_1", "vision tower"),
    ],
)
def test_ignore_rules_name_the_reason(name, layer, why):
    found = get_encoder(name).find_skip_reason(layer, "int8_rowwise")
    assert found is None if why is None else why in found


@pytest.mark.parametrize("name", ["t5", "umt5", "t5_old"])
def test_wo_of_t5_stays_float_in_int8_formats_without_rotation(name):
    why = {
        form: get_encoder(name).find_skip_reason("encoder.block.0.layer.1.DenseReluDense.wo", form)
        for form in FORMATS
    }
    assert {form for form in why if why[form]} == {
        "int8_tensorwise",
        "int8_rowwise",
        "int8_blockwise",
        "int8_block3d",
    }


def test_every_supported_encoder_is_complete():
    for encoder in list_supported_encoders().values():
        assert all(
            issubclass(getattr(transformers, cls), transformers.PreTrainedModel) for cls in encoder.classes
        )
        assert encoder.fingerprints
        assert encoder.ignore
        assert encoder.config
        assert encoder.num_tokens in (77, 256, 512)
        assert set(encoder.tokenizer) == {"location", "subfolder"}
        assert "/" in encoder.tokenizer["location"]
    assert {name for name, encoder in load_encoders().items() if not encoder.classes} == {
        "byt5",
        "gemma4",
        "gpt_oss",
        "jina_clip",
        "ming",
        "qwen3_5",
        "t5_gemma",
    }


def test_every_key_mapping_matches_some_key():
    files = [tiny.file(tiny_model(name)) for name, tiny in TINY.items()] + [
        tiny_model(name).state_dict() for name in TINY
    ]
    keys = (
        {key for file in files for key in file}
        | set(make_openclip_file())
        | {key for shapes in SMALL.values() for key in shapes}
    )
    keys |= {
        "text_model.encoder.layers.0.self_attn.to_q.weight",
        "text_model.encoder.layers.0.self_attn.to_out.weight",
    }
    keys |= {re.sub("to_q", f"to_{x}", key) for key in keys for x in "kv"}
    keys |= (
        {f"language_model.{key}" for key in keys}
        | {f"language_model.model.{key}" for key in keys}
        | {key.replace("vision_model", "vision_tower.vision_model") for key in keys}
    )
    keys |= (
        {f"model.{key}" for key in keys}
        | {"language_model.lm_head.weight"}
        | {key.removeprefix("text_model.") for key in keys}
    )
    t5 = TINY["UMT5EncoderModel"].file(tiny_model("UMT5EncoderModel"))
    for name in t5:
        for pattern, new in WAN.items():
            name = re.sub(pattern, new, name)
        keys.add(name)

    for name in list_supported_encoders():
        rules = (*get_encoder(name).key_mappings.names, *get_encoder(name).key_mappings.parameters)
        assert rules
        assert not [
            rule.original
            for rule in rules
            if not any(match_pattern(rule.original, rule.extract_name(key)) for key in keys)
        ]


def test_encoder_is_found_by_class_and_shapes():
    assert find_encoder_of_class("T5EncoderModel", {}).name == "t5"
    assert find_encoder_of_class("T5EncoderModel", SMALL["t5_old"]).name == "t5_old"
    assert find_encoder_of_class("CLIPTextModelWithProjection", SMALL["clip_g"]).name == "clip_g"
    assert find_encoder_of_class("BertModel", SMALL["t5"]) is None
    with pytest.raises(
        ConfigError,
        match=r"no text encoder called 'clip_k'; did you mean 'clip_l'. choose from clip, clip_g, .*, umt5",
    ):
        get_encoder("clip_k")


def test_malformed_item_is_an_error():
    with pytest.raises(
        ConfigError, match=r"x.fingerprints.0 is \{'none': \[\]\}; it needs all, none, rows, not_rows"
    ):
        EncoderFamily("x", fingerprints=[{"none": []}])
    with pytest.raises(
        ConfigError, match=r"no setting called 'x.optional_modules.0.patern'; did you mean 'pattern'"
    ):
        EncoderFamily("x", optional_modules=[{"patern": "a"}])


def test_fingerprint_matches_names_and_rows():
    shapes = {"a.0": (4, 2), "b": ()}

    assert EncoderFingerprint(["a.*"]).matches(shapes)
    assert not EncoderFingerprint(["c"]).matches(shapes)
    assert not EncoderFingerprint(["b"], ["a.?"]).matches(shapes)
    assert EncoderFingerprint(["b"], rows={"a.0": [3, 4]}).matches(shapes)
    assert not EncoderFingerprint(["b"], rows={"a.0": 3}).matches(shapes)
    assert not EncoderFingerprint(["b"], rows={"c": 4}).matches(shapes)
    assert not EncoderFingerprint(["b"], not_rows={"a.0": 4}).matches(shapes)
    assert EncoderFingerprint(["b"], not_rows={"a.0": 3, "c": 4}).matches(shapes)


@pytest.mark.parametrize(
    "dtype, wo",
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_skeleton_dtypes_are_those_of_transformers_loader(dtype, wo, tmp_path):
    tiny_model("T5EncoderModel").save_pretrained(tmp_path)
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=dtype)

    empty = build_skeleton("T5EncoderModel", T5, dtype)

    assert {name: p.dtype for name, p in empty.named_parameters()} == {
        name: p.dtype for name, p in loaded.named_parameters()
    }
    assert empty.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == wo
    assert empty.shared.weight.is_meta
    assert not empty.training
    assert not empty.shared.weight.requires_grad


def test_skeleton_takes_the_text_config_and_leaves_it_unchanged():
    config = {"tie_word_embeddings": True, "text_config": LLM, "vision_config": {}}
    empty = build_skeleton("Gemma3ForCausalLM", config, torch.float32)
    sees = {"text_config": copy.deepcopy(QWEN25), "vision_config": {}}
    build_skeleton("Qwen2_5_VLTextModel", sees, torch.float32)

    assert sees == {"text_config": QWEN25, "vision_config": {}}
    assert empty.lm_head.weight is empty.model.embed_tokens.weight

    loose = build_skeleton("Gemma3ForCausalLM", config | {"tie_word_embeddings": False}, torch.float32)

    assert loose.lm_head.weight is not loose.model.embed_tokens.weight


def test_skeleton_buffers_are_those_of_the_model():
    for name in ("CLIPTextModel", "Gemma3ForConditionalGeneration", "Qwen2_5_VLModel"):
        empty = dict(build_skeleton(TINY[name].cls, TINY[name].config, torch.bfloat16).named_buffers())
        own = dict(tiny_model(name).named_buffers())
        assert empty.keys() == own.keys()
        assert all(torch.equal(empty[key], own[key]) for key in own)


@pytest.mark.parametrize(
    "cls, config, error, message",
    [
        ("NoModel", {}, ConfigError, "transformers .* has no model class 'NoModel'"),
        ("T5Config", {}, ConfigError, "has no model class 'T5Config'"),
        (
            "T5EncoderModel",
            T5 | {"feed_forward_proj": "gated-no"},
            FileError,
            "the config does not fit T5EncoderModel: .*; take the one of its",
        ),
        ("T5EncoderModel", T5 | {"d_model": "wide"}, FileError, "the config does not fit T5EncoderModel: "),
        ("LlamaModel", LLM | {"pad_token_id": 99}, FileError, "the config does not fit LlamaModel: "),
    ],
)
def test_skeleton_that_cannot_be_built_is_an_error(cls, config, error, message):
    with pytest.raises(error, match=message):
        build_skeleton(cls, config, torch.float32)


def test_tokenizer_that_cannot_be_downloaded_is_an_error(monkeypatch):
    asked = []

    def fetch(location, subfolder):
        asked.append((location, subfolder))
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fetch)
    message = (
        r"the tokenizer Qwen/Qwen-Image \(tokenizer\) is not on this machine and could not be "
        r"downloaded: We couldn't connect to the hub; take"
    )

    with pytest.raises(FileError, match=message):
        load_tokenizer(get_encoder("qwen2_5_vl").tokenizer)
    with pytest.raises(FileError, match="the tokenizer google/t5-v1_1-xxl is not on"):
        load_tokenizer(get_encoder("t5").tokenizer)
    assert asked == [("Qwen/Qwen-Image", "tokenizer"), ("google/t5-v1_1-xxl", "")]

    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda location, subfolder: (location, subfolder)
    )

    assert load_tokenizer({"location": "here"}) == ("here", "")
