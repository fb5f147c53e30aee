"""The tests' own reader and writer: by numbers that were worked out by hand, and each by the other."""

from pathlib import Path

import numpy as np
import pytest
from text_encoders import oracle
from text_encoders.files import (
    ENCODERS,
    FORMATS,
    File,
    Stored,
    allowed_error,
    find_nearest,
    in_tiles,
    make_encoder_file,
    make_regular_hadamard,
    to_fp8,
)
from text_encoders.oracle_file import TABLES, Tensor, Unreadable, numbers
from text_encoders.oracle_numbers import hadamard, untile_scales


def read_oracle(file: File, tmp_path: Path) -> np.ndarray:
    return oracle.read(file.write(tmp_path / "x.safetensors"))["a"].weight


def test_oracle_decodes_fp8_bytes() -> None:
    e4m3, e5m2 = TABLES["F8_E4M3"], TABLES["F8_E5M2"]

    assert [e4m3[b] for b in (0, 1, 8, 0x38, 0x39, 0x7E, 0xFE)] == [0, 2.0**-9, 2.0**-6, 1, 1.125, 448, -448]
    assert np.isnan(e4m3[[127, 255]]).all()
    assert [e5m2[b] for b in (1, 4, 0x3C, 0x7B, 0xFC)] == [
        2.0**-16,
        2.0**-14,
        1,
        57344,
        -np.inf,
    ]
    assert np.isnan(e5m2[0x7D])
    assert TABLES["F8_E8M0"][[120, 127, 0, 254]].tolist() == [0.0078125, 1, 2.0**-127, 2.0**127]
    assert np.isnan(TABLES["F8_E8M0"][255])
    assert numbers(Tensor("BF16", (2,), b"\x80\x3f\x00\xc0")).tolist() == [1, -2]
    assert numbers(Tensor("I8", (2,), b"\x80\x7f")).tolist() == [-128, 127]
    assert to_fp8(np.array([1.0625, 1.1875, 500, -0.001]), "F8_E4M3")[1].tolist() == [
        1,
        1.25,
        448,
        -(2.0**-9),
    ]
    assert find_nearest(np.array([0.25, 2.5, 5, 7]), np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])).tolist() == [
        0,
        4,
        6,
        7,
    ]


def test_oracle_hadamard_matrices_are_orthogonal() -> None:
    for matrix in (make_regular_hadamard, lambda size: hadamard(size, False)):
        assert (np.array([1, 0, 0, 0]) @ matrix(4)).tolist() == [0.5, 0.5, 0.5, -0.5]
        assert (np.array([1, 2, 3, 4]) @ matrix(4)).tolist() == [1, 2, 3, 4]
        assert "".join("-+"[int(x > 0)] for x in matrix(16)[0]) == "+++-+++-+++----+"
    assert np.allclose(make_regular_hadamard(256), hadamard(256, False))
    assert np.allclose(hadamard(64, False) @ hadamard(64, False), np.eye(64))
    assert (2**0.5 * hadamard(2, True)).round(9).tolist() == [[1, 1], [1, -1]]
    with pytest.raises(Unreadable):
        hadamard(8, False)


def test_oracle_unswizzles_cublas_tiles() -> None:
    offsets = {
        (0, 0): 0,
        (0, 3): 3,
        (1, 0): 16,
        (32, 0): 4,
        (64, 0): 8,
        (96, 0): 12,
        (0, 4): 512,
        (128, 0): 6144,
    }

    for (row, column), offset in offsets.items():
        flat = np.zeros(256 * 48, "u1")
        flat[offset] = 7
        found = untile_scales(flat, 256, 48)
        assert np.argwhere(found == 7).tolist() == [[row, column]]
        assert in_tiles(found.astype(np.int64)).flatten().tolist() == flat.tolist()
    assert in_tiles(np.ones((129, 5), dtype=np.int64)).shape == (256, 8)


def test_oracle_reads_the_documented_int8_row(tmp_path: Path) -> None:
    file = File()
    FORMATS["int8_rowwise"](file, "a", np.array([[1, -2, 0.5, 0], [0, 0, 0, 0]]))

    assert np.frombuffer(file.tensors["a.weight"].data, "i1")[:4].tolist() == [64, -127, 32, 0]
    assert np.frombuffer(file.tensors["a.weight_scale"].data, "<f4")[0] == np.float32(2 / 127)
    assert np.allclose(read_oracle(file, tmp_path)[0], [128 / 127, -2, 64 / 127, 0], rtol=1e-7)


@pytest.mark.parametrize(("tiles", "first"), [(True, [1, -6]), (False, [-6, 1])])
def test_oracle_reads_nibbles_in_both_orders(tiles: bool, first: list[float], tmp_path: Path) -> None:
    file = File()
    file.tensors["a.weight"] = Stored("U8", (2, 8), b"\x2f" + bytes(15))
    file.put("a.weight_scale_2", "F32", 0.5)
    file.put(
        "a.weight_scale", "F8_E4M3", in_tiles(np.full((2, 1), 0x40)) if tiles else np.full((2, 1), 0x40)
    )  # 2

    assert read_oracle(file, tmp_path)[0, :3].tolist() == [*first, 0]


def test_oracle_decodes_e8m0_exponents(tmp_path: Path) -> None:
    file = File()
    file.tensors["a.weight"] = Stored("F8_E4M3", (1, 64), bytes([0x38]) * 64)
    file.put("a.weight_scale", "U8", in_tiles(np.array([[120, 128]])))

    assert read_oracle(file, tmp_path)[0, [0, 31, 32, 63]].tolist() == [0.0078125, 0.0078125, 2, 2]


def test_oracle_reads_a_marker_of_19_bytes() -> None:
    stored = make_encoder_file("clip_l", "nvfp4").tensors["text_model.encoder.layers.0.mlp.fc1.comfy_quant"]

    assert stored.shape == (19,)
    assert (stored.data[0], stored.data[-1]) == (0x7B, 0x7D)


@pytest.mark.parametrize("word", FORMATS)
def test_oracle_reads_every_format_of_every_encoder(word: str, tmp_path: Path) -> None:
    for name in ENCODERS:
        file, floats = make_encoder_file(name, word), make_encoder_file(name, dtype="F64")
        found = oracle.read(file.write(tmp_path / "x.safetensors"))
        assert set(found) == set(file.real)
        assert {layer: found[layer].word for layer in file.words} == file.words
        for layer, real in file.real.items():
            assert np.allclose(found[layer].weight, real, rtol=1e-12, atol=1e-12)
        layer = next(iter(file.words))
        # a mistake in both, in the order of nibbles or scales for example, would leave nothing of the weight
        assert np.linalg.norm(make_real_weights(floats, layer) - file.real[layer]) < allowed_error(
            word
        ) * np.linalg.norm(make_real_weights(floats, layer))


def make_real_weights(file: File, layer: str) -> np.ndarray:
    """The weight before it was rounded."""
    weight = file.real[layer].copy()
    weight[::7, 3] *= 8
    return weight


@pytest.mark.parametrize("word", ["mxfp8", "nvfp4"])
def test_oracle_cuts_padding(word: str, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", word, inner=100)
    found = oracle.read(file.write(tmp_path / "x.safetensors"))["text_model.encoder.layers.0.mlp.fc1"].weight

    assert found.shape == ({"mxfp8": 128, "nvfp4": 112}[word], 64)
    assert not found[100:].any()
    assert found[99].any()
