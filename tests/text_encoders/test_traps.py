"""What other loaders of quantized text encoders get wrong.

Each by a small file that looks right, and gives noise if it is read so.
"""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.compare import assert_close
from support.helpers import TinyModel, randn
from text_encoders import oracle
from text_encoders.files import (
    ENCODERS,
    FORMATS,
    File,
    Stored,
    make_encoder_file,
    to_legacy,
    write_int8_convrot,
)
from text_encoders.oracle_file import DTYPES
from text_encoders.probes import load_weights, probe_weights, strip_root
from torch import nn

from int8run.errors import ConfigError, FileError
from int8run.lora.entries import Entry
from int8run.lora.float_merge import FloatMerge
from int8run.lora.load import read_lora
from int8run.lora.stack import LoraStack
from int8run.pipeline.text_encoders import make_merge_reader
from int8run.text_encoders.build import build_encoder
from int8run.text_encoders.kernels import Kernels
from int8run.text_encoders.load import build_text_encoder, load_text_encoder
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.quantized_layers import WeightChange
from int8run.text_encoders.skeleton import build_skeleton, remove_optional_modules
from int8run.text_encoders.weights import EncoderFile
from int8run.utils.plurals import count_noun

CLIP, T5 = "text_model.encoder.layers.0.", "encoder.block.0.layer."
Q, FC1 = f"{CLIP}self_attn.q_proj", f"{CLIP}mlp.fc1"
INT8_BACKENDS = ("reference", "dequantize")


def assert_read_right(
    file: File, tmp_path: Path, kernel_backend: str = "dequantize", **options: object
) -> None:
    """Every matrix of the built model is what the oracle reads from the file."""
    path = file.write(tmp_path / "x.safetensors")
    expected = {strip_root(name): reading.weight for name, reading in oracle.read(path).items()}
    found = load_weights(path, kernel_backend, **options)
    assert expected.keys() <= found.keys() | {"text_projection"}, expected.keys() - found.keys()
    for name, weight in expected.items():
        if name in found:
            rows, columns = found[name].shape
            assert np.allclose(
                found[name], weight[:rows, :columns], rtol=1e-5, atol=2e-6 * abs(weight).max()
            ), name


def assert_file_error(
    file: File, tmp_path: Path, words: str, error: type[Exception] = FileError, **options: object
) -> None:
    """The file is refused in one line that says why."""
    path = file.write(tmp_path / "x.safetensors")
    with pytest.raises(error, match=words) as found:
        build_text_encoder(*load_text_encoder(path, **options))  # type: ignore[arg-type]
    assert "\n" not in str(found.value)


def reshape_scale(file: File, layer: str, shape: tuple[int, ...]) -> File:
    """The scale in another shape."""
    file.tensors[f"{layer}.weight_scale"] = file.tensors[f"{layer}.weight_scale"]._replace(shape=shape)
    return file


def test_every_format_of_every_encoder_is_read_right(tmp_path: Path) -> None:
    words = list(FORMATS)
    for turn, name in enumerate(ENCODERS):
        for word in words[turn::5]:
            assert_read_right(make_encoder_file(name, word), tmp_path)


@pytest.mark.parametrize("backend", INT8_BACKENDS)
@pytest.mark.parametrize("shape", [(64,), (64, 1)])
def test_64_scales_of_a_square_weight_belong_to_its_rows(
    shape: tuple[int, ...], backend: str, tmp_path: Path
) -> None:
    assert_read_right(reshape_scale(make_encoder_file("clip_l", "int8_rowwise"), Q, shape), tmp_path, backend)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("word", ["int8_tensorwise", "float8_e4m3fn"])
def test_single_scale_may_have_three_shapes(word: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word)
    for layer in file.words:
        reshape_scale(file, layer, shape)

    assert_read_right(file, tmp_path)

    _, metadata = load_text_encoder(tmp_path / "x.safetensors")

    assert metadata["quant_format"]["found"] == word
    assert metadata["formats"] == {word: 6}


def test_single_scale_belongs_to_the_tensor_whatever_the_marker_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = reshape_scale(make_encoder_file("t5", "float8_e4m3fn"), f"{T5}0.SelfAttention.q", (1,))
    file.text(f"{T5}0.SelfAttention.q.comfy_quant", {"format": "float8_e4m3fn_rowwise"})

    assert_read_right(file, tmp_path)

    _, metadata = load_text_encoder(tmp_path / "x.safetensors")

    assert metadata["layers"][f"{T5}0.SelfAttention.q"]["format"] == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("byte", "word"),
    [
        (0, "float8_e4m3fn"),
        (1, "float8_e4m3fn_rowwise"),
        (2, "float8_e4m3fn_blockwise"),
        (3, "float8_e4m3fn_block3d"),
        (10, "int8_blockwise"),
    ],
)
def test_marker_of_one_byte_is_read(byte: int, word: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word)
    for layer in file.words:
        file.text(f"{layer}.comfy_quant", bytes([byte]))

    assert_read_right(file, tmp_path)
    assert_file_error(replace_marker(file, bytes([4])), tmp_path, "comfy_quant is not JSON")


def test_marker_that_starts_with_a_line_break_is_json(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_convrot")
    for layer in file.words:
        file.text(f"{layer}.comfy_quant", b"\n" + file.tensors[f"{layer}.comfy_quant"].data + b"\0\0")

    assert_read_right(file, tmp_path)


def replace_marker(file: File, content: object, layer: str = Q) -> File:
    file.text(f"{layer}.comfy_quant", content)
    return file


def test_rotation_without_a_size_has_groups_of_256(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_convrot")
    for layer in file.words:
        file.text(f"{layer}.comfy_quant", {"format": "int8_tensorwise", "convrot": True})

    assert_file_error(file, tmp_path, "rotated in groups of 256, which do not divide its 64 inputs")

    two = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16, "quarot_groupsize": 64}

    assert_file_error(
        replace_marker(make_encoder_file("clip_l", "int8_convrot"), two),
        tmp_path,
        "two sizes of rotated groups",
    )


@pytest.mark.parametrize("size", [4, 32, 64])
def test_hadamard_matrix_depends_on_the_group_size(size: int, tmp_path: Path) -> None:
    file = make_encoder_file(
        "clip_l", "int8_rowwise"
    )  # read as rotated the numbers are others, and the oracle's
    for layer in file.words:
        file.text(
            f"{layer}.comfy_quant", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        )

    assert_read_right(file, tmp_path)


def test_marker_with_doubled_braces_is_read(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_convrot", carrier="header")
    file.metadata["_quantization_metadata"] = "{" + file.metadata["_quantization_metadata"] + "}"

    assert_read_right(file, tmp_path)

    file = make_encoder_file("clip_l", "int8_convrot")

    assert_read_right(
        replace_marker(file, "{" + file.tensors[f"{Q}.comfy_quant"].data.decode() + "}"), tmp_path
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"convrot": True, "convrot_groupsize": 16, "per_row": True},
        {"quarot": True, "quarot_groupsize": 16},
        {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", INT8_BACKENDS, ids=str)
def test_rotation_is_read_from_markers_without_a_format_or_from_params(
    fields: dict[str, object], backend: str, tmp_path: Path
) -> None:
    file = make_encoder_file("clip_l", "int8_convrot")
    for layer in file.words:
        file.text(f"{layer}.comfy_quant", fields)

    assert_read_right(file, tmp_path, backend)


@pytest.mark.parametrize("name", ["clip_l", "t5"])
@pytest.mark.parametrize(
    ("word", "label", "found"),
    [
        ("int8_rowwise", "int8_blockwise", "int8_rowwise"),
        ("int8_tensorwise", "int8_blockwise", "int8_tensorwise"),
        ("int8_block3d", "int8_tensorwise", "int8_block3d"),
        ("float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "float8_e4m3fn_rowwise"),
        ("float8_e5m2", "float8_e4m3fn", "float8_e5m2"),
        ("float8_e4m3fn_block3d", "float8_e4m3fn", "float8_e4m3fn_block3d"),
    ],
)
def test_marker_that_the_shape_contradicts_is_an_error(
    word: str, label: str, found: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = make_encoder_file(name, word)
    for layer in file.words:
        file.text(f"{layer}.comfy_quant", {"format": label})

    with caplog.at_level(logging.WARNING):
        assert_read_right(file, tmp_path)

    said = [record for record in caplog.records if "the shape of the scales counts" in record.getMessage()]

    # block3d under the plain name is usual, and the difference of e4m3 and e5m2 is told by the dtype
    assert len(said) == (0 if label == "float8_e4m3fn" else 1)
    assert load_text_encoder(tmp_path / "x.safetensors")[1]["quant_format"]["found"] == found


@pytest.mark.parametrize(
    "label",
    [
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fn_rowwise",
        "float8_e4m3fn_blockwise",
        "float8_e4m3fn_block3d",
    ],
)
def test_fp8_without_the_scales_of_its_marker_is_an_error(label: str, tmp_path: Path) -> None:
    assert_file_error(make_encoder_file("t5", label).drop(".weight_scale"), tmp_path, "scale")
    assert_file_error(
        make_encoder_file("t5", label, carrier="header").drop(".weight_scale"), tmp_path, "scale"
    )


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "F8_E8M0"])
def test_fp8_scale_of_an_int8_weight_is_an_error(dtype: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_rowwise")
    file.tensors[f"{Q}.weight_scale"] = Stored(dtype, (64, 1), bytes([0x38]) * 64)

    assert_file_error(file, tmp_path, f"{Q}.weight_scale is {dtype}")


@pytest.mark.parametrize("elements", [0, 2])
def test_int8_weight_beside_the_scaled_fp8_marker_is_read(elements: int, tmp_path: Path) -> None:
    assert_read_right(to_legacy(make_encoder_file("clip_l", "int8_tensorwise"), elements), tmp_path)


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
@pytest.mark.parametrize(("elements", "dtype"), [(0, "F8_E4M3"), (2, "F8_E4M3"), (0, "F8_E5M2"), (2, "F32")])
def test_scaled_fp8_files_of_2024_are_read(elements: int, dtype: str, prefix: str, tmp_path: Path) -> None:
    word = "float8_e5m2" if dtype == "F8_E5M2" else "float8_e4m3fn"
    file = to_legacy(make_encoder_file("t5", word, quantized=["shared.weight"]), elements, dtype).prefixed(
        prefix
    )
    path = file.write(tmp_path / "x.safetensors")

    state, metadata = load_text_encoder(path)

    assert metadata["prefix"] == prefix
    assert metadata["quant_format"]["found"] == word
    assert {"scaled_fp8"}.isdisjoint(state)
    assert state[f"{T5}0.SelfAttention.q.weight_scale"].dtype == torch.float32

    found = probe_weights(
        build_text_encoder(state, {**metadata, "kernel_backend": "dequantize"}, dtype=torch.float32)
    )

    for name, reading in oracle.read(path).items():
        assert np.allclose(found[strip_root(name.removeprefix(prefix))], reading.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word", ["float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise"])
def test_unmarked_fp8_that_lost_its_scales_is_an_error(word: str, tmp_path: Path) -> None:
    """Its numbers fill the range of fp8, as no cast does; one scale of many, or all of them."""
    unmarked = make_encoder_file("t5", word, carrier="none").drop(".comfy_quant")
    unmarked.metadata.pop("_quantization_metadata", None)
    scales = [key for key in unmarked.tensors if key.endswith(".weight_scale")]
    assert len(scales) > 1
    one_lost = dict(unmarked.tensors)
    for lost in (scales[:1], scales):
        unmarked.tensors = {key: tensor for key, tensor in one_lost.items() if key not in lost}
        subject = count_noun(len(lost), "fp8 weight", "have")
        assert_file_error(unmarked, tmp_path, f"{subject} no scale and numbers that no plain cast has")


def test_scaled_fp8_file_without_scales_is_an_error(tmp_path: Path) -> None:
    assert_file_error(
        to_legacy(make_encoder_file("t5", "float8_e4m3fn")).drop(".scale_weight"),
        tmp_path,
        "says that fp8 weights have scales, and none has one",
    )


def test_plain_cast_beside_scaled_layers_is_read(tmp_path: Path) -> None:
    file = make_encoder_file(
        "t5", "", words=["float8_e4m3fn", "float8_e4m3fn_cast"], quantized=["shared.weight"]
    )
    assert_read_right(to_legacy(file), tmp_path)


def test_half_precision_scales_are_multiplied_in_float32(tmp_path: Path) -> None:
    for word in ("int8_rowwise", "float8_e4m3fn", "int8_blockwise"):
        for dtype in ("BF16", "F16"):
            file = make_encoder_file("t5", word)
            for layer in file.words:
                stored = file.tensors[f"{layer}.weight_scale"]
                file.put(
                    f"{layer}.weight_scale", dtype, np.frombuffer(stored.data, "<f4").reshape(stored.shape)
                )
            assert_read_right(file, tmp_path)
            assert_read_right(file, tmp_path, "reference") if word.startswith("int8") else None


@pytest.mark.parametrize("backend", INT8_BACKENDS)
@pytest.mark.parametrize("word", ["int8_rowwise", "int8_convrot", "int8_blockwise"])
def test_int8_value_minus_128_is_read(word: str, backend: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word)
    for layer in file.words:
        stored = file.tensors[f"{layer}.weight"]
        file.tensors[f"{layer}.weight"] = stored._replace(data=stored.data.replace(b"\x81", b"\x80"))

    assert b"\x80" in file.tensors[f"{Q}.weight"].data
    assert_read_right(file, tmp_path, backend)


def test_rotation_in_the_marker_counts_when_the_header_lost_it(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_convrot", carrier="both")
    layers = {layer: {"format": "int8_tensorwise"} for layer in file.words}
    file.metadata["_quantization_metadata"] = json.dumps({"layers": layers})

    assert_read_right(file, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda layers: {f"{name}_old": fields for name, fields in layers.items()},
            "which the file does not have",
        ),
        (
            lambda layers: {
                name: {**fields, "convrot": True, "convrot_groupsize": 64} for name, fields in layers.items()
            },
            "contradict",
        ),
        (lambda layers: {name: {"format": "float8_e4m3fn"} for name in layers}, "contradict"),
        (lambda layers: {name: {"format": "int9"} for name in layers}, "'int9'; int8run reads"),
    ],
)
def test_header_that_contradicts_the_tensors_is_an_error(
    change: Callable[[dict[str, dict[str, object]]], object], words: str, tmp_path: Path
) -> None:
    file = make_encoder_file("clip_l", "int8_convrot", carrier="both")
    layers = json.loads(file.metadata["_quantization_metadata"])["layers"]
    file.metadata["_quantization_metadata"] = json.dumps({"layers": change(layers)})

    assert_file_error(file, tmp_path, words)


def test_header_without_the_prefix_is_an_error(tmp_path: Path) -> None:
    file = make_encoder_file("t5", "int8_convrot", carrier="header").prefixed(
        "text_encoders.t5xxl.transformer."
    )
    assert_file_error(file, tmp_path, "the prefix was lost")


def test_single_lost_marker_is_an_error(tmp_path: Path) -> None:
    assert_file_error(
        make_encoder_file("clip_l", "int8_convrot").drop(f"{Q}.comfy_quant"),
        tmp_path,
        "has no comfy_quant marker",
    )


def test_rotation_without_a_marker_is_read_when_the_format_is_given(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_convrot", carrier="none")
    for layer, real in list(file.real.items()):
        if layer in file.words:
            file.real[layer], _ = write_int8_convrot(file, layer, real, 64)
    path = file.write(tmp_path / "x.safetensors")

    found = load_weights(path, quant_format="int8_convrot")

    assert all(
        np.allclose(found[strip_root(layer)], file.real[layer], rtol=1e-5, atol=1e-6) for layer in file.words
    )
    # without a word rows are rows that are not rotated
    assert_read_right(file, tmp_path)
    # a file that says something of itself is believed
    assert_file_error(
        make_encoder_file("clip_l", "int8_rowwise"),
        tmp_path,
        "int8_convrot was asked for",
        ConfigError,
        quant_format="int8_convrot",
    )


@pytest.mark.parametrize("key", ["spiece_model", "tekken_model", "tokenizer_json"])
def test_embedded_tokenizer_is_dropped(key: str, tmp_path: Path) -> None:
    file = make_encoder_file("umt5" if key == "spiece_model" else "llama", "float8_e4m3fn")
    file.text(key, b"\x0a\x0e\x0a" * 50)

    assert_read_right(file, tmp_path)

    state, metadata = load_text_encoder(tmp_path / "x.safetensors")

    assert key not in state
    assert key in str(metadata["dropped"])


@pytest.mark.parametrize(
    ("word", "asked"),
    [
        ("int8_rowwise", "float8_e4m3fn"),
        ("float8_e4m3fn_rowwise", "nvfp4"),
        ("nvfp4", "mxfp8"),
        ("", "mxfp8"),
    ],
)
def test_requested_format_that_the_file_lacks_is_an_error(word: str, asked: str, tmp_path: Path) -> None:
    words = f"holds .*{word or 'no quantized layer'}.*{asked} was asked for"
    assert_file_error(make_encoder_file("clip_l", word), tmp_path, words, ConfigError, quant_format=asked)


def test_unknown_format_is_an_error(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_rowwise")
    words = "did you mean 'int8_rowwise'. choose from auto, float8_e4m3fn, .*nvfp4"

    assert_file_error(
        file, tmp_path, f"quant_format is 'int8_rowise'; {words}", ConfigError, quant_format="int8_rowise"
    )
    assert_file_error(
        file,
        tmp_path,
        "kernel_backend is 'pytorch'; .*choose from .*dequantize",
        ConfigError,
        kernel_backend="pytorch",
    )


@pytest.mark.parametrize("word", ["nvfp4", "nvfp4_modelopt"])
def test_nibble_order_is_that_of_the_requested_format(word: str, tmp_path: Path) -> None:
    # rows are multiples of 128 and blocks of 4
    file = make_encoder_file("t5", word, carrier="none")
    for layer in [layer for layer in file.words if not layer.endswith(("wi_0", "wi_1"))]:
        file.drop(f"{layer}.weight_scale", f"{layer}.weight_scale_2")
        file.tensors[f"{layer}.weight"] = make_encoder_file("t5").tensors[f"{layer}.weight"]

    assert_file_error(file, tmp_path, "clip=nvfp4 or clip=nvfp4_modelopt")

    path = file.write(tmp_path / "x.safetensors")
    found = load_weights(path, quant_format=word)

    for layer in (f"{T5}1.DenseReluDense.wi_{x}" for x in (0, 1)):
        assert np.allclose(found[layer], file.real[layer], rtol=1e-6)


def test_comfyui_marker_with_scales_in_rows_is_an_error(tmp_path: Path) -> None:
    file = make_encoder_file("t5", "nvfp4_modelopt")
    for layer in file.words:
        file.text(f"{layer}.comfy_quant", {"format": "nvfp4"})

    assert_file_error(file, tmp_path, "lie in tiles, and .* in rows; they contradict each other")


def test_weight_without_a_marker_may_be_stored_transposed(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_rowwise", carrier="none")
    for layer in file.words:
        codes = np.frombuffer(file.tensors[f"{layer}.weight"].data, "i1").reshape(
            file.tensors[f"{layer}.weight"].shape
        )
        if codes.shape[0] == codes.shape[1]:  # whose scale [1, N] may be that of columns, and is refused
            continue
        file.put(f"{layer}.weight", "I8", codes.T)
        reshape_scale(file, layer, (1, len(codes)))

    assert_read_right(file, tmp_path)
    assert_read_right(file, tmp_path, "reference")
    assert np.allclose(
        load_weights(tmp_path / "x.safetensors")[strip_root(FC1)], file.real[FC1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("word", ["int8_rowwise", "int8_convrot", "float8_e4m3fn", "nvfp4", "mxfp8"])
def test_input_factors_are_applied(word: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word)
    file.put(f"{Q}.pre_quant_scale", "F32", np.linspace(0.5, 2, 64))

    assert_read_right(file, tmp_path)


def test_two_nvfp4_conventions_in_one_file_are_an_error(tmp_path: Path) -> None:
    assert_file_error(
        make_encoder_file("t5", "", words=["nvfp4", "nvfp4_modelopt"]), tmp_path, "in tiles .* in rows"
    )


def test_formats_may_differ_by_layer(tmp_path: Path) -> None:
    words = ("int8_convrot", "float8_e4m3fn", "nvfp4", "mxfp8", "int8_blockwise", "float8_e5m2_cast")

    for name in ("clip_g", "qwen3"):
        for carrier in ("tensor", "header"):
            assert_read_right(make_encoder_file(name, words=words, carrier=carrier), tmp_path)
            assert_read_right(make_encoder_file(name, words=words, carrier=carrier), tmp_path, "reference")

    _, metadata = load_text_encoder(tmp_path / "x.safetensors")

    assert metadata["quant_format"]["found"] == "mixed"
    assert set(words) <= set(metadata["formats"])


@pytest.mark.parametrize("word", ["mxfp8", "nvfp4"])
def test_padding_is_removed(word: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word, inner=100)

    assert_read_right(file, tmp_path)
    assert load_weights(tmp_path / "x.safetensors")["encoder.layers.0.mlp.fc1"].shape == (100, 64)

    file = make_encoder_file("t5", word, inner=100)
    for layer in file.words:
        shape = {"wi_0": [100, 64], "wi_1": [100, 64], "wo": [64, 100]}.get(
            layer.rpartition(".")[2], [64, 64]
        )
        file.text(f"{layer}.comfy_quant", {"format": word, "orig_shape": shape})

    assert_read_right(file, tmp_path)
    assert load_weights(tmp_path / "x.safetensors")[f"{T5}1.DenseReluDense.wo"].shape == (64, 100)


@pytest.mark.parametrize(
    "word",
    [
        "int8_rowwise",
        "int8_convrot",
        "int8_tensorwise",
        "float8_e4m3fn_cast",
        "float8_e5m2",
        "nvfp4",
        "mxfp8",
    ],
)
@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("t5", "shared"),
        ("clip_l", "text_model.embeddings.token_embedding"),
        ("qwen3", "model.embed_tokens"),
        ("gemma2", "model.embed_tokens"),
    ],
)
def test_quantized_embedding_is_read_right(name: str, table: str, word: str, tmp_path: Path) -> None:
    file = make_encoder_file(name, word, quantized=[f"{table}.weight"])

    assert table in file.words
    assert_read_right(file, tmp_path, "reference" if word.startswith("int8") else "dequantize")


def test_tied_embedding_is_read_under_either_name(tmp_path: Path) -> None:
    for names in (("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")):
        file = make_encoder_file("t5", "int8_rowwise", quantized=["shared.weight"])
        for key in [key for key in file.tensors if key.startswith("shared.")]:
            stored = file.tensors.pop(key)
            file.tensors |= {key.replace("shared", name): stored for name in names}
        found = load_weights(file.write(tmp_path / "x.safetensors"))
        assert np.allclose(found["shared"], file.real["shared"], rtol=1e-5, atol=1e-6)


def test_keys_that_are_no_weights_are_ignored(tmp_path: Path) -> None:
    for dtype in ("I64", "F32", "BF16"):
        file = make_encoder_file("clip_l", "float8_e4m3fn")
        file.put("text_model.embeddings.position_ids", dtype, np.arange(77)[None])
        file.put("logit_scale", "F32", 4.6)
        assert_read_right(file, tmp_path)


# names of transformers -> of Wan's own file of UMT5, which lightx2v quantizes
WAN = {
    r"^shared": "token_embedding",
    r"^encoder\.final_layer_norm": "norm",
    r"^encoder\.block\.(\d+)\.layer\.": r"blocks.\1.",
    r"\.0\.layer_norm": ".norm1",
    r"\.1\.layer_norm": ".norm2",
    r"\.0\.SelfAttention\.relative_attention_bias": ".pos_embedding.embedding",
    r"\.0\.SelfAttention": ".attn",
    r"\.1\.DenseReluDense\.wi_0": ".ffn.gate.0",
    r"\.1\.DenseReluDense\.wi_1": ".ffn.fc1",
    r"\.1\.DenseReluDense\.wo": ".ffn.fc2",
}


def to_wan_name(key: str) -> str:
    for old, new in WAN.items():
        key = re.sub(old, new, key)
    return key


@pytest.mark.parametrize(
    ("word", "carrier"),
    [("int8_rowwise", "none"), ("int8_convrot", "tensor"), ("nvfp4", "tensor"), ("mxfp8", "none")],
)
def test_scales_follow_a_renamed_weight(word: str, carrier: str, tmp_path: Path) -> None:
    file = make_encoder_file("umt5", word, carrier=carrier)
    real = file.real

    found = load_weights(file.rename(to_wan_name).write(tmp_path / "x.safetensors"), "reference")

    assert "blocks.1.ffn.fc2.weight_scale" in file.tensors
    assert len(real) == 17
    for layer, weight in real.items():
        assert np.allclose(found[layer], weight, rtol=1e-5, atol=1e-6), layer


def test_quantized_decoder_and_head_are_dropped(tmp_path: Path) -> None:
    file = make_encoder_file("t5", "int8_rowwise")
    for key in [key for key in file.tensors if key.startswith("encoder.block.0.layer.1")]:
        file.tensors[key.replace("encoder.", "decoder.", 1)] = file.tensors[key]

    state, metadata = load_text_encoder(file.write(tmp_path / "x.safetensors"), kernel_backend="reference")

    assert not [key for key in state if "decoder" in key]

    found = probe_weights(build_text_encoder(state, metadata, dtype=torch.float32))

    assert all(np.allclose(found[layer], weight, rtol=1e-5, atol=1e-6) for layer, weight in file.real.items())


def test_damage_in_another_encoder_does_not_matter(tmp_path: Path) -> None:
    file = make_encoder_file("t5", "nvfp4").prefixed("text_encoders.t5xxl.transformer.")
    file.put(f"text_encoders.t5xxl.transformer.{T5}0.SelfAttention.q.weight_scale_2", "F32", np.nan)
    clip = make_encoder_file("clip_l", "int8_convrot")
    file.tensors |= clip.copy().prefixed("text_encoders.clip_l.transformer.").tensors

    assert_file_error(file, tmp_path, "several text encoders: t5 .*clip")
    assert_file_error(file, tmp_path, "weight_scale_2 are not finite", which="t5xxl")

    found = load_weights(tmp_path / "x.safetensors", which="clip_l")

    assert all(
        np.allclose(found[strip_root(layer)], weight, rtol=1e-5, atol=1e-6)
        for layer, weight in clip.real.items()
    )


@pytest.mark.parametrize("word", ["float8_e4m3fn", "float8_e4m3fn_cast"])
def test_fp8_norms_are_read_as_float(word: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word)
    file.tensors["text_model.final_layer_norm.weight"] = Stored("F8_E4M3", (64,), bytes([0x38] * 63 + [0x40]))
    if word == "float8_e4m3fn":
        file.put("text_model.final_layer_norm.weight_scale", "F32", 3.0)
    state, metadata = load_text_encoder(file.write(tmp_path / "x.safetensors"))

    norm = next(
        p
        for name, p in build_text_encoder(state, metadata).named_parameters()
        if name.endswith("final_layer_norm.weight")
    )

    assert norm[:1].item() == (3 if word == "float8_e4m3fn" else 1)
    assert norm[63] == 2 * norm[0]


def test_quantized_projection_is_read_right(tmp_path: Path) -> None:
    file = make_encoder_file("clip_g", "int8_rowwise", quantized=["text_projection.weight"])
    state, metadata = load_text_encoder(file.write(tmp_path / "x.safetensors"), kernel_backend="reference")

    found = probe_weights(
        build_text_encoder(state, metadata, "CLIPTextModelWithProjection", dtype=torch.float32)
    )

    assert np.allclose(found["text_projection"], file.real["text_projection"], rtol=1e-5, atol=1e-6)


def test_biases_are_those_of_the_file(tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_rowwise")
    bias = file.put(f"{Q}.bias", "F32", np.arange(64) * 7.0)
    state, metadata = load_text_encoder(file.write(tmp_path / "x.safetensors"), kernel_backend="reference")
    model = build_text_encoder(state, metadata, dtype=torch.float32)

    module = next(module for name, module in model.named_modules() if strip_root(name) == strip_root(Q))

    assert np.allclose(module(torch.zeros(1, 64)).detach().numpy(), bias[None])


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_nan_or_infinity_is_an_error(number: float, tmp_path: Path) -> None:
    for key in (f"{Q}.bias", f"{CLIP}layer_norm1.weight", "text_model.embeddings.token_embedding.weight"):
        file = make_encoder_file("clip_l", "int8_rowwise")
        shape = file.tensors[key].shape
        file.put(key, "F32", np.where(np.arange(np.prod(shape)).reshape(shape) == 3, number, 1.0))
        assert_file_error(file, tmp_path, "holds NaN or infinity; the file is damaged")


@pytest.mark.parametrize("word", ["float8_e4m3fn", "float8_e4m3fn_cast", "float8_e5m2", "mxfp8"])
def test_fp8_nan_is_an_error(word: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word)
    stored = file.tensors[f"{Q}.weight"]
    file.tensors[f"{Q}.weight"] = stored._replace(data=stored.data[:50] + b"\x7f" + stored.data[51:])

    assert_file_error(file, tmp_path, "NaN|not finite")


@pytest.mark.parametrize("dtype", ["I16", "U16", "I32", "BOOL", "U8", "F6_E2M3", "F4"])
def test_integer_bias_is_an_error(dtype: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_rowwise")
    file.tensors[f"{Q}.bias"] = Stored(dtype, (64,), bytes(n % 2 for n in range(8 * DTYPES[dtype][0])))

    assert_file_error(file, tmp_path, f"{Q}.bias is {dtype}")


@pytest.mark.parametrize("shape", [(2**40, 0), (0, 64), (0, 2**40)], ids=str)
def test_empty_embedding_is_an_error(shape: tuple[int, int], tmp_path: Path) -> None:
    for key in ("token", "position"):
        file = make_encoder_file("clip_l", "int8_rowwise")
        file.tensors[f"text_model.embeddings.{key}_embedding.weight"] = Stored("F32", shape, b"")
        assert_file_error(file, tmp_path, "embedding.weight")


def test_outputs_are_close_to_the_float_encoder(tmp_path: Path) -> None:
    """Every part is in its place: norms, tables and biases too."""
    tokens = torch.tensor([[3, 5, 7, 11, 13, 2]])
    for turn, name in enumerate(ENCODERS):
        file = make_encoder_file(name, ("int8_convrot", "nvfp4")[turn % 2])
        floats = make_encoder_file(name)  # what is not quantized is the same in both
        for layer in file.words:
            floats.put(f"{layer}.weight", "F32", file.real[layer])
        models = [
            build_text_encoder(
                *load_text_encoder(made.write(tmp_path / "x.safetensors"), kernel_backend="dequantize"),
                dtype=torch.float32,
            )
            for made in (file, floats)
        ]
        with torch.inference_mode():
            found, expected = (
                model(input_ids=tokens, output_hidden_states=True).hidden_states[-1] for model in models
            )
        assert_close(name, found, expected, 1e-4)


def write_lora(path: Path, down: torch.Tensor, up: torch.Tensor, alpha: float | None) -> Path:
    """A LoRA of one layer of a CLIP, by the names of kohya's trainer."""
    key = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    if alpha:
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("word", ["int8_rowwise", "nvfp4"])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_lora_without_alpha_has_the_strength_of_its_training(
    alpha: float | None, word: str, tmp_path: Path
) -> None:
    rank = 4
    down, up = randn(rank, 64, seed=1), randn(64, rank, seed=2) * 0.05
    lora = write_lora(tmp_path / "lora.safetensors", down, up, alpha)
    source = EncoderFile(make_encoder_file("clip_l", word).write(tmp_path / "x.safetensors"))
    model = build_skeleton("CLIPTextModel", build_config(source.encoder, source.shapes), torch.float32)
    remove_optional_modules(source.encoder, source.shapes, model)
    stack = LoraStack(TinyModel(), {"text_encoder": model})
    changes = stack.match_entries([Entry("a", read_lora(lora))]).by_component["text_encoder"]
    merges = []

    def attach_loras(model: nn.Module) -> WeightChange:
        merges.append(FloatMerge(model, changes))
        return make_merge_reader(merges[0])

    built = build_encoder(model, source, None, Kernels("dequantize", torch.device("cpu"), 77), attach_loras)
    (name,) = changes
    before = probe_weights(built.module)
    change = (up @ down).numpy()

    for strength in (1.0, -0.5, 0.0):
        merges[0].set_strengths([strength])
        built.refresh([name])
        moved = probe_weights(built.module)[strip_root(name)] - before[strip_root(name)]
        # alpha / rank, and 1 without an alpha; a part of it is lost when the sum is rounded to the format
        assert (moved * change).sum() / (change**2).sum() == pytest.approx(
            strength * (alpha / rank if alpha else 1), abs=0.05
        )

    source.files.close()
