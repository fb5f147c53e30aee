"""Which text encoder a file holds, behind which prefix, and what is said of files that hold none."""

import re

import pytest
from support.parameter_ids import name_parameter
from text_encoders.shapes import SMALL, make_clip_shapes, make_t5_shapes
from text_encoders.tiny_encoders import TINY, tiny_model

from int8run.errors import ConfigError, FileError
from int8run.models.family import load_families
from int8run.text_encoders.detect import detect_encoder, find_encoder_of_class, find_prefixes, match_encoders
from int8run.text_encoders.registry import (
    get_encoder,
    load_encoders,
)

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
    ids=name_parameter,
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
    ],
    ids=name_parameter,
)
def test_known_but_unsupported_encoder_is_an_error(name, shapes):
    with pytest.raises(
        FileError,
        match=f"holds the text encoder {name}, which int8run does not support; it has clip, clip_g, .*, umt5",
    ):
        detect_encoder(shapes)
    assert [encoder.name for encoder in match_encoders(shapes, load_encoders())] == [name]


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


def test_more_prefixes_than_any_file_has_are_an_error():
    # each is looked for among all names: 20,000 names with a prefix each would take minutes
    shapes = {f"text_encoders.e{i}.transformer.weight": (1, 1) for i in range(100)}
    with pytest.raises(FileError, match=r"begin with 201 prefixes of text encoders .* 32 are allowed"):
        detect_encoder(shapes)
