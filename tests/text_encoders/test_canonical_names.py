"""Where the tensors of a file go: tiny models of every class, and the names of other programs."""

import re

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_open_clip_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
)
from safetensors.torch import load_file
from support.parameter_ids import name_parameter
from text_encoders.shapes import (
    SMALL,
    WAN,
    fill_model,
    has_same_output,
    make_clip_shapes,
    make_llm_shapes,
    make_openclip_file,
    make_t5_shapes,
    shapes_of,
)
from text_encoders.tiny_encoders import CLIP, TINY, run_model, tiny_model
from torch import nn

from int8run.errors import FileError
from int8run.models.name_pattern import match_pattern
from int8run.models.tensor_part import TensorPart
from int8run.text_encoders.detect import detect_encoder, find_encoder_of_class
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.registry import (
    get_encoder,
    list_supported_encoders,
)
from int8run.text_encoders.skeleton import build_skeleton, remove_optional_modules
from int8run.text_encoders.state_dict_adapter import build_encoder_layout, map_canonical_names


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

    assert all(x.isfinite().all() for x in run_model(empty))


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
    ids=name_parameter,
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
