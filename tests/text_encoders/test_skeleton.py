"""Models without weights: their dtypes and buffers, and modules that are taken out of them."""

import copy
import logging
import re

import pytest
import torch
import transformers
from support.parameter_ids import name_parameter
from text_encoders.shapes import fill_model, has_same_output, make_clip_shapes, shapes_of
from text_encoders.tiny_encoders import LLM, QWEN25, T5, TINY, tiny_model

from int8run.errors import ConfigError, FileError
from int8run.text_encoders.detect import find_encoder_of_class
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.registry import (
    get_encoder,
)
from int8run.text_encoders.skeleton import build_skeleton, remove_optional_modules
from int8run.text_encoders.state_dict_adapter import build_encoder_layout, map_canonical_names

SEES = r"^(model\.)?(visual|vision_model|vision_tower|multi_modal_projector)\."


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


def test_half_of_an_optional_module_is_missing_not_removed():
    tiny, model = TINY["Mistral3Model"], tiny_model("Mistral3Model")
    file = tiny.file(model)
    del file["vision_tower.ln_pre.weight"]

    encoder, empty = get_encoder("mistral3"), build_skeleton("Mistral3Model", tiny.config, torch.float32)

    assert remove_optional_modules(encoder, shapes_of(file), empty) == {}
    assert build_encoder_layout(encoder, shapes_of(file), empty).missing == ("vision_tower.ln_pre.weight",)


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
    ids=name_parameter,
)
def test_skeleton_that_cannot_be_built_is_an_error(cls, config, error, message):
    with pytest.raises(error, match=message):
        build_skeleton(cls, config, torch.float32)
