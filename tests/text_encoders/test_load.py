"""The public pair: a quantized file as tensors and metadata, and the transformers model of these."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.clip_files import answer, changed, file_of
from support.compare import assert_close
from support.parameter_ids import name_parameter
from support.tiny_pipeline import random_pipeline
from text_encoders.files import File, make_encoder_file

import int8run
from int8run.errors import ConfigError, FileError
from int8run.text_encoders.load import build_text_encoder, load_text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("int8_convrot", "float8_e4m3fn", "nvfp4", "mxfp8", "int8_block3d", "float8_e5m2_cast")
T5 = "encoder.block.0.layer.0.SelfAttention"


def write_file(file: File, folder: Path) -> Path:
    return file.write(folder / "x.safetensors")


def test_package_exports_load_and_build() -> None:
    assert int8run.load_text_encoder is load_text_encoder
    assert int8run.build_text_encoder is build_text_encoder
    assert {"load_text_encoder", "build_text_encoder"} <= set(int8run.__all__)


def test_loaded_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_file(make_encoder_file("t5", words=WORDS), tmp_path)
    state, _ = load_text_encoder(path)
    held = load_file(path)

    markers = {key for key in held if key.endswith(".comfy_quant")}

    assert state.keys() == held.keys() - markers
    for key, tensor in state.items():
        assert tensor.dtype == held[key].dtype and tensor.is_contiguous(), key
        assert tensor.shape == held[key].shape and tensor.flatten().view(torch.uint8).equal(
            held[key].flatten().view(torch.uint8)
        ), key
    assert type(state) is dict
    assert f"{T5}.q.weight_scale" in state
    assert f"{T5}.v.weight_scale_2" in state
    assert f"{'encoder.block.0.layer.1.DenseReluDense.wi_1'}.weight_scale" not in state, (
        "a plain cast has none"
    )


def test_metadata_describes_every_quantized_layer(tmp_path: Path) -> None:
    file = make_encoder_file("t5", words=WORDS)
    file.text("spiece_model", {"a": 1})
    path = write_file(file, tmp_path)

    _, metadata = load_text_encoder(path, kernel_backend="reference")

    assert json.loads(json.dumps(metadata)) == metadata, "plain values"
    assert (metadata["encoder"], metadata["classes"], metadata["prefix"]) == ("t5", ["T5EncoderModel"], "")
    assert metadata["quant_format"] == {"asked": "auto", "found": "mixed"}
    assert metadata["kernel_backend"] == "reference"
    assert {name: layer["format"] for name, layer in metadata["layers"].items()} == file.words
    assert metadata["formats"] == {word: list(file.words.values()).count(word) for word in WORDS}
    assert metadata["read_as_float"] == {}

    rotated = metadata["layers"][f"{T5}.q"]

    assert (rotated["kind"], rotated["shape"], rotated["group_size"], rotated["outlier"]) == (
        "int8",
        [64, 64],
        16,
        "convrot",
    )
    assert metadata["layers"][f"{T5}.v"]["swizzled"]
    assert metadata["layers"][f"{T5}.v"]["high_first"]
    assert metadata["config"]["d_model"] == 64
    assert metadata["config"]["d_ff"] == 128
    assert list(metadata["dropped"]) == ["spiece_model"]
    assert all(metadata["dropped"].values())
    assert set(metadata["tokenizer"]) == {"location", "subfolder"}
    assert metadata["files"] == [str(path)]


@pytest.mark.parametrize("word", ["", "nvfp4"])
def test_metadata_names_encoder_and_format(word: str, tmp_path: Path) -> None:
    _, metadata = load_text_encoder(
        str(write_file(make_encoder_file("qwen3", word), tmp_path)), word or "auto"
    )

    assert metadata["quant_format"] == {"asked": word or "auto", "found": word or "none"}
    assert len(metadata["layers"]) == 7 * bool(word)


def test_casts_beside_scaled_layers_are_one_format(tmp_path: Path) -> None:
    _, metadata = load_text_encoder(
        write_file(make_encoder_file("t5", words=["float8_e4m3fn", "float8_e4m3fn_cast"]), tmp_path),
        "float8_e4m3fn",
    )

    assert metadata["quant_format"]["found"] == "float8_e4m3fn"
    assert len(metadata["formats"]) == 2

    _, metadata = load_text_encoder(write_file(make_encoder_file("t5", "float8_e4m3fn_cast"), tmp_path))

    assert metadata["quant_format"]["found"] == "float8_e4m3fn_cast"


def test_casts_beside_layers_with_a_scale_per_row_are_one_format(tmp_path: Path) -> None:
    words = ["float8_e4m3fn_rowwise", "float8_e4m3fn_cast"]

    _, metadata = load_text_encoder(write_file(make_encoder_file("t5", words=words), tmp_path))

    assert metadata["quant_format"]["found"] == "float8_e4m3fn_rowwise"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["int8_rowwise"], "int8_tensorwise"),
        (["int8_convrot"], "int8_tensorwise"),
        (["float8_e4m3fn", "float8_e4m3fn_cast"], "float8_e4m3fn"),
        (["float8_e4m3fn_rowwise", "float8_e4m3fn_cast"], "float8_e4m3fn_rowwise"),
        (["float8_e4m3fn_block3d", "float8_e4m3fn_cast"], "float8_e4m3fn_block3d"),
        (["int8_blockwise", "int8_rowwise"], "int8_blockwise"),
        (["int8_rowwise", "int8_convrot"], "int8_convrot"),
        (["float8_e4m3fn_block3d", "float8_e4m3fn_rowwise"], "float8_e4m3fn_block3d"),
    ],
    ids=name_parameter,
)
def test_broader_format_accepts_narrower_ones(words: list[str], asked: str, tmp_path: Path) -> None:
    """ComfyUI's word for all of int8; casts; and what a layer becomes that the format cannot take."""
    _, metadata = load_text_encoder(write_file(make_encoder_file("t5", words=words), tmp_path), asked)

    assert metadata["quant_format"]["asked"] == asked
    assert set(metadata["formats"]) == set(words)


@pytest.mark.parametrize(
    ("word", "asked"),
    [
        ("int8_tensorwise", "int8_rowwise"),
        ("float8_e4m3fn", "float8_e4m3fn_cast"),
        ("", "nvfp4"),
        ("int8_rowwise", "int8_blockwise"),
    ],
)
def test_another_format_than_requested_is_an_error(word: str, asked: str, tmp_path: Path) -> None:
    held = f"7 layers {word}" if word else "no quantized layer"
    advice = (
        "clip=auto"
        if word
        else f"`int8run task=quantize task.component=text_encoder clip={asked} model.location=FILE save=NEW`"
    )

    with pytest.raises(ConfigError, match=f"x.safetensors holds {held}, and {asked} was asked for; {advice}"):
        load_text_encoder(write_file(make_encoder_file("t5", word), tmp_path), asked)


def test_mixed_file_is_neither_of_its_formats(tmp_path: Path) -> None:
    path = write_file(make_encoder_file("t5", words=["int8_rowwise", "nvfp4"]), tmp_path)
    for asked in ("int8_rowwise", "nvfp4"):
        with pytest.raises(
            ConfigError, match=f"holds 4 layers int8_rowwise, 3 layers nvfp4, and {asked} was asked for"
        ):
            load_text_encoder(path, asked)


def test_one_encoder_of_a_full_checkpoint_is_loaded(tmp_path: Path) -> None:
    parts = {
        "text_encoders.clip_l.transformer.": make_encoder_file("clip_l", "int8_rowwise"),
        "text_encoders.t5xxl.transformer.": make_encoder_file("t5", "nvfp4"),
    }
    file = File()
    for prefix, part in parts.items():
        file.tensors |= part.prefixed(prefix).tensors

    path = write_file(file, tmp_path)

    with pytest.raises(
        FileError,
        match=r"several text encoders: .*clip \(text_encoders\.clip_l\.transformer\.\).*choose one: t5 or "
        r"clip",
    ):
        load_text_encoder(path)
    for which, prefix, word in (
        ("clip_l", "clip_l", "int8_rowwise"),
        ("t5", "t5xxl", "nvfp4"),
        ("t5xxl", "t5xxl", "nvfp4"),
    ):
        state, metadata = load_text_encoder(path, which=which)
        assert metadata["prefix"] == f"text_encoders.{prefix}.transformer."
        assert set(metadata["formats"]) == {word}
        alone, _ = load_text_encoder(
            make_encoder_file("clip_l" if word[0] == "i" else "t5", word).write(
                tmp_path / "alone.safetensors"
            )
        )
        assert state.keys() == alone.keys()
        assert all(
            torch.equal(state[k].view(torch.uint8), alone[k].view(torch.uint8))
            for k in state
            if state[k].dim()
        )


def test_unknown_setting_is_an_error(tmp_path: Path) -> None:
    path = write_file(make_encoder_file("t5", "nvfp4"), tmp_path)

    with pytest.raises(
        ConfigError, match=r"kernel_backend is 'cuda'; choose from auto, .*dequantize, .*reference"
    ):
        load_text_encoder(path, kernel_backend="cuda")
    with pytest.raises(ConfigError, match=r"quant_format is 'int4'; choose from auto, .*nvfp4"):
        load_text_encoder(path, "int4")

    state, metadata = load_text_encoder(path)

    with pytest.raises(ConfigError, match="class_name is 'CLIPTextModel'; choose from T5EncoderModel"):
        build_text_encoder(state, metadata, class_name="CLIPTextModel")


def test_class_must_hold_the_encoder(tmp_path: Path) -> None:
    state, metadata = load_text_encoder(write_file(make_encoder_file("clip_g", "float8_e4m3fn"), tmp_path))
    names = {
        type(build_text_encoder(state, metadata, name)).__name__ for name in (None, *metadata["classes"])
    }

    assert names == set(metadata["classes"])
    assert len(names) == 2


def test_config_of_a_folder_is_used(tmp_path: Path) -> None:
    """Two heads of 64 by the shapes, four by the folder."""
    model = random_pipeline(text=128).text_encoder.eval()
    model.config.num_attention_heads = 4
    four = type(model)(model.config).eval()
    four.load_state_dict(model.state_dict())
    four.save_pretrained(tmp_path / "folder")

    state, metadata = load_text_encoder(tmp_path / "folder")

    assert metadata["config"]["num_attention_heads"] == 4
    assert_close(
        "heads", answer(build_text_encoder(state, metadata, dtype=torch.float32)), answer(four), 1e-6
    )


def test_config_that_the_shapes_do_not_say_is_given_while_loading(tmp_path: Path) -> None:
    """Heads of 48 in a width of 96 cannot be derived: CLIP-L's have 64, and 96 is no multiple of it."""
    model = random_pipeline(text=128).text_encoder.eval()
    config = model.config.to_dict() | {"hidden_size": 96, "num_attention_heads": 2}
    odd = type(model)(type(model.config).from_dict(config)).eval()
    path = write_file(file_of(odd, "int8_rowwise"), tmp_path)
    with pytest.raises(FileError, match=r"pass the config of its model: load_text_encoder\(path, config=…\)"):
        load_text_encoder(path)

    own = odd.config.to_dict()
    for given in (own, own | {"architectures": [type(odd).__name__]}):
        state, metadata = load_text_encoder(path, kernel_backend="dequantize", config=given)
        assert metadata["config"] == given
    made = build_text_encoder(state, metadata, dtype=torch.float32)
    assert_close("odd", answer(made), answer(changed(odd, file_of(odd, "int8_rowwise").real)), 1e-5)


def test_given_config_is_used(tmp_path: Path) -> None:
    model = random_pipeline(text=128).text_encoder.eval()
    file = file_of(model, "int8_rowwise")
    state, metadata = load_text_encoder(write_file(file, tmp_path), kernel_backend="dequantize")
    config = model.config.to_dict()

    made = build_text_encoder(state, metadata, class_name="CLIPTextModel", config=config, dtype=torch.float32)

    assert_close("own", answer(made), answer(changed(model, file.real)), 1e-5)
    with pytest.raises(FileError, match=r"x\.safetensors.*(shape|parameters)"):
        build_text_encoder(
            state,
            metadata,
            class_name="CLIPTextModel",
            config=config | {"hidden_size": 64, "intermediate_size": 64},
        )
    with pytest.raises(
        FileError,
        match=r"\d+ parameters of the clip encoder are not there \(first: .*layers\.1\..*the file is "
        r"incomplete",
    ):
        build_text_encoder(
            state, metadata, class_name="CLIPTextModel", config=config | {"num_hidden_layers": 2}
        )


def test_metadata_of_another_file_is_an_error(tmp_path: Path) -> None:
    state, metadata = load_text_encoder(write_file(make_encoder_file("t5", "int8_rowwise"), tmp_path))
    other, _ = load_text_encoder(make_encoder_file("clip_l").write(tmp_path / "y.safetensors"))

    with pytest.raises(
        ConfigError,
        match=r"the metadata describes .*, and the state_dict has no weight of it; pass what was loaded "
        r"together",
    ):
        build_text_encoder(other, metadata)

    lacking = {key: tensor for key, tensor in state.items() if key != "encoder.final_layer_norm.weight"}

    with pytest.raises(
        FileError,
        match=r"1 parameters of the t5 encoder are not there \(first: encoder\.final_layer_norm\.weight\)",
    ):
        build_text_encoder(lacking, metadata)
    with pytest.raises(ConfigError, match=r"no text encoder called 't6'; .*choose from .*t5"):
        build_text_encoder(state, metadata | {"encoder": "t6"})


def test_tensor_without_a_place_is_an_error(tmp_path: Path) -> None:
    """Sizes are read from the file: a tensor that they leave out must not make a smaller encoder of it."""
    file = make_encoder_file("t5", "int8_rowwise")

    with pytest.raises(FileError, match=r"encoder\.final_layer_norm\.weight"):
        load_text_encoder(
            write_file(make_encoder_file("t5", "int8_rowwise").drop("final_layer_norm.weight"), tmp_path)
        )

    file.put("encoder.block.0.layer.0.SelfAttention.bonus.weight", "F32", np.ones((64, 64)))

    with pytest.raises(
        FileError,
        match=r"1 tensor has no place in the t5 encoder .*first: encoder\.block\.0\..*bonus\.weight",
    ):
        load_text_encoder(write_file(file, tmp_path))


def test_file_that_lost_its_markers_is_an_error(tmp_path: Path) -> None:
    """The shapes of a rotated layer are those of any other; the header still tells what it was."""
    file = make_encoder_file("t5", "int8_convrot", carrier="none")

    assert load_text_encoder(write_file(file, tmp_path))[1]["formats"] == {"int8_rowwise": 7}

    file.metadata["int8run"] = json.dumps({"format": "int8_convrot"})

    with pytest.raises(
        FileError, match="was made as int8_convrot, and the comfy_quant markers of its layers are not there"
    ):
        load_text_encoder(write_file(file, tmp_path))


def test_loaded_tensors_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    """A program may keep the pair in files of its own."""
    state, metadata = load_text_encoder(
        write_file(make_encoder_file("t5", words=WORDS), tmp_path), kernel_backend="dequantize"
    )
    torch.save(state, tmp_path / "state.pt")
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    found: Any = torch.load(tmp_path / "state.pt", weights_only=True)

    again = build_text_encoder(
        found, json.loads((tmp_path / "metadata.json").read_text()), dtype=torch.float32
    )

    assert torch.equal(answer(again), answer(build_text_encoder(state, metadata, dtype=torch.float32)))
