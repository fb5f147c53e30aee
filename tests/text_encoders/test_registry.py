"""What is known about every text encoder: its fingerprints, its rules, and that its file is complete."""

import pytest
import transformers

from int8run.errors import ConfigError
from int8run.models.fingerprint import SizedFingerprint
from int8run.quant.formats import FORMATS
from int8run.text_encoders.registry import (
    EncoderFamily,
    get_encoder,
    list_supported_encoders,
    load_encoders,
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
        "gpt_oss",
        "jina_clip",
        "ming",
        "t5_gemma",
    }


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

    assert SizedFingerprint(["a.*"]).matches(shapes)
    assert not SizedFingerprint(["c"]).matches(shapes)
    assert not SizedFingerprint(["b"], ["a.?"]).matches(shapes)
    assert SizedFingerprint(["b"], rows={"a.0": [3, 4]}).matches(shapes)
    assert not SizedFingerprint(["b"], rows={"a.0": 3}).matches(shapes)
    assert not SizedFingerprint(["b"], rows={"c": 4}).matches(shapes)
    assert not SizedFingerprint(["b"], not_rows={"a.0": 4}).matches(shapes)
    assert SizedFingerprint(["b"], not_rows={"a.0": 3, "c": 4}).matches(shapes)
