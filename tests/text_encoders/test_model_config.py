"""Configurations that are read from shapes, by the published sizes of every encoder; and tokenizers."""

import pytest
import torch
import transformers
from support.parameter_ids import name_parameter
from text_encoders.shapes import (
    QWEN3_VL,
    SMALL,
    make_clip_shapes,
    make_gemma4_e_shapes,
    make_gemma4_moe_shapes,
    make_gemma4_shapes,
    make_llm_shapes,
    make_openclip_file,
    make_qwen3_5_shapes,
    make_t5_shapes,
    shapes_of,
)

from int8run.errors import FileError
from int8run.text_encoders.detect import match_encoders
from int8run.text_encoders.model_config import build_config, load_tokenizer
from int8run.text_encoders.registry import (
    EncoderFamily,
    get_encoder,
    load_encoders,
)
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.state_dict_adapter import build_encoder_layout

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
    "Qwen3.5-9B": (
        "qwen3_5",
        make_qwen3_5_shapes(248320, 4096, 12288, 32, 16, 4, 32),
        dict(
            hidden_size=4096,
            num_hidden_layers=32,
            intermediate_size=12288,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=256,
            linear_num_value_heads=32,
            linear_value_head_dim=128,
        ),
    ),
    "Gemma 4 E4B": (
        "gemma4",
        make_gemma4_e_shapes(262144, 2560, 10240, 42, 8, 2),
        dict(
            hidden_size=2560,
            num_hidden_layers=42,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=256,
            global_head_dim=512,
            hidden_size_per_layer_input=256,
            num_kv_shared_layers=18,
        ),
    ),
    "Gemma 4 E2B": (
        "gemma4",
        make_gemma4_e_shapes(262144, 1536, 6144, 35, 8, 1),
        dict(
            hidden_size=1536,
            intermediate_size=6144,
            num_hidden_layers=35,
            num_key_value_heads=1,
            global_head_dim=512,
            num_kv_shared_layers=20,
            use_double_wide_mlp=True,
        ),
    ),
    "Gemma 4 12B": (
        "gemma4_unified",
        make_gemma4_shapes(262144, 3840, 15360, 48, 16, 8, 1),
        dict(
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            global_head_dim=512,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            sliding_window=1024,
        ),
    ),
    "Gemma 4 31B": (
        "gemma4_unified",
        make_gemma4_shapes(262144, 5376, 21504, 60, 32, 16, 4),
        dict(
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=60,
            num_attention_heads=32,
            num_key_value_heads=16,
            num_global_key_value_heads=4,
            attention_k_eq_v=True,
        ),
    ),
    "Gemma 4 26B": (
        "gemma4_moe",
        make_gemma4_moe_shapes(262144, 2816, 2112, 30, 16, 8, experts=128),
        dict(
            hidden_size=2816,
            intermediate_size=2112,
            num_hidden_layers=30,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_global_key_value_heads=2,
            attention_k_eq_v=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
        ),
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
    ids=name_parameter,
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


def test_tokenizer_that_cannot_be_downloaded_is_an_error(monkeypatch):
    asked = []

    def fetch(location, subfolder, trust_remote_code):
        assert not trust_remote_code
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
        transformers.AutoTokenizer, "from_pretrained", lambda location, subfolder, **_: (location, subfolder)
    )

    assert load_tokenizer({"location": "here"}) == ("here", "")
