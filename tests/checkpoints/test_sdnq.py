"""INT8 weights by SDNQ: with its config they are what it rounded, without it they are refused.

The files are written by SDNQ's formulas: columns of a group times a Hadamard matrix, rows divided by their
largest number over 127, and with `use_quantized_matmul` stored as [in, out].
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints.drafts.draft import CheckpointDraft
from checkpoints.drafts.int8 import draft_int8, draft_rowwise
from checkpoints.drafts.numbers import make_regular, make_sylvester, rotate_groups

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.sdnq import SdnqMethod
from int8run.errors import ConfigError, FileError

PLAIN = {"quant_method": "sdnq", "weights_dtype": "int8", "use_hadamard": False}
HADAMARD = PLAIN | {"use_hadamard": True, "hadamard_group_size": 256}


def draft_sdnq(
    rows: int = 24, columns: int = 64, group_size: int = 0, *, transposed: bool = False
) -> CheckpointDraft:
    """One layer `q`, rotated in groups of a size; 0: not."""
    draft = CheckpointDraft()
    weight = draft.generator.normal(size=(rows, columns))
    is_power_of_4 = group_size in (4, 16, 64, 256)
    matrix = (make_regular if is_power_of_4 else make_sylvester)(group_size) if group_size else None
    stored = weight if matrix is None else rotate_groups(weight, matrix)
    scale = np.abs(stored).max(1, keepdims=True) / 127
    codes = np.rint(stored / scale)
    if transposed:
        draft.put("q.weight", "I8", codes.T)
        scale = draft.put("q.scale", "F32", scale.T).T
    else:
        draft.put("q.weight", "I8", codes)
        scale = draft.put("q.scale", "F32", scale)
    real = codes * scale
    draft.real["q"] = real if matrix is None else rotate_groups(real, matrix)
    return draft


def write_config(folder: Path, config: dict[str, Any], name: str = "config.json") -> None:
    text = {"quantization_config": config} if name == "config.json" else config
    (folder / name).write_text(json.dumps(text))


def assert_is_read(draft: CheckpointDraft, folder: Path, **declared: Any) -> str:
    """The weight is what was rounded. Returns the layer's label."""
    with TensorFiles.open(draft.write(folder / "m.safetensors")) as files:
        layer = read_layers(files, declared=DeclaredFormat(**declared))["q"]
        weight = layer.read_weight(files)
    np.testing.assert_allclose(weight.numpy(), draft.real["q"], atol=1e-5)
    return layer.label


@pytest.mark.parametrize("name", ["config.json", "quantization_config.json"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("columns", "asked", "group_size"),
    # halved until it divides the columns; no power of 4 has Sylvester's matrix
    [(64, 256, 64), (512, 256, 256), (384, 256, 128), (96, 256, 32), (80, 16, 16), (48, 64, 16), (24, 8, 8)],
)
def test_a_config_says_how_weights_are_rotated(
    columns: int, asked: int, group_size: int, transposed: bool, name: str, tmp_path: Path
) -> None:
    write_config(tmp_path, HADAMARD | {"hadamard_group_size": asked}, name)
    draft = draft_sdnq(24, columns, group_size, transposed=transposed)
    method = "convrot" if group_size in (16, 64, 256) else "quarot"
    where = "transposed" if transposed else "row"

    assert assert_is_read(draft, tmp_path) == f"int8, {where}, {method} {group_size}"


@pytest.mark.parametrize("columns", [6, 30, 7])
def test_narrow_groups_are_not_rotated(columns: int, tmp_path: Path) -> None:
    """The largest power of 2 that divides the columns is under 4."""
    write_config(tmp_path, HADAMARD)
    assert_is_read(draft_sdnq(24, columns), tmp_path)
    assert SdnqMethod(256).get_group_size(columns) == 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [64, 24])
def test_a_config_without_rotation(columns: int, transposed: bool, tmp_path: Path) -> None:
    """Square weights are transposed, too, where their scale is [1, N]."""
    write_config(tmp_path, PLAIN)
    assert_is_read(draft_sdnq(24, columns, transposed=transposed), tmp_path)


def test_without_a_config_it_is_asked_for(tmp_path: Path) -> None:
    message = (
        r"1 weight has a scale in `scale`, as SDNQ writes it \(first: q\), and its config.json alone "
        r"says whether they are rotated; put that file beside it, or set model.sdnq=<config.json>, "
        r"model.sdnq=none or model.sdnq=hadamard"
    )
    for group_size in (0, 16):
        with pytest.raises(FileError, match=message):
            assert_is_read(draft_sdnq(group_size=group_size), tmp_path)


def test_a_word_stands_for_the_config(tmp_path: Path) -> None:
    side_file = tmp_path / "elsewhere.json"
    side_file.write_text(json.dumps({"quantization_config": HADAMARD}))
    for word in ("hadamard", "hadamard_256", "hadamard_64", str(side_file), HADAMARD):
        assert_is_read(draft_sdnq(group_size=64), tmp_path, sdnq=word)
    assert_is_read(draft_sdnq(group_size=16), tmp_path, sdnq="hadamard_16")
    assert_is_read(draft_sdnq(), tmp_path, sdnq="none")
    # those of text encoders
    assert_is_read(draft_sdnq(group_size=64), tmp_path, quant_format="int8_convrot")
    for format_name in ("int8_rowwise", "int8_tensorwise"):
        assert_is_read(draft_sdnq(), tmp_path, quant_format=format_name)


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("rotated", ConfigError, "model.sdnq=rotated is none of none, hadamard"),
        ("hadamard_2", ConfigError, "model.sdnq names groups of 2 columns; SDNQ rotates 4 to 4096"),
        ("missing.json", FileError, "model.sdnq=missing.json cannot be read: No such file or directory"),
        ({"use_hadamard": True, "hadamard_group_size": "x"}, ConfigError, "names groups of 'x' columns"),
        (
            {"use_hadamard": True, "modules_quant_config": {"q": {"hadamard_group_size": 16}}},
            ConfigError,
            "model.sdnq rotates q in its own way",
        ),
    ],
)
def test_words_that_say_nothing(word: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        assert_is_read(draft_sdnq(), tmp_path, sdnq=word)


def test_a_word_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, HADAMARD)
    assert_is_read(draft_sdnq(group_size=64), tmp_path, sdnq="hadamard")
    # of a text encoder the config counts, and the format is compared with what was found
    assert_is_read(draft_sdnq(group_size=64), tmp_path, quant_format="int8_rowwise")
    for word in ("none", "hadamard_64"):
        message = (
            rf"model.sdnq={word}, and the config beside .* says hadamard_256; they contradict each other"
        )
        with pytest.raises(FileError, match=message):
            assert_is_read(draft_sdnq(group_size=64), tmp_path, sdnq=word)


def test_a_word_for_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.sdnq=none, and .* has no weight whose scale is in `scale`"):
        assert_is_read(draft_rowwise(), tmp_path, sdnq="none")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"quant_method": "fp8"}', "{"])
def test_a_config_of_another_program_is_no_word(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(FileError, match=r"c.json (is no config of SDNQ|cannot be read)"):
        assert_is_read(draft_sdnq(), tmp_path, sdnq=str(tmp_path / "c.json"))


def test_other_weights_of_sdnq_are_refused_by_name(tmp_path: Path) -> None:
    grouped = CheckpointDraft()
    grouped.put("q.weight", "I8", np.ones((8, 4, 16)))
    grouped.put("q.scale", "F32", np.ones((8, 4, 1)))
    with pytest.raises(FileError, match=r"is a SDNQ file \(q.weight is I8 \[8, 4, 16\]\)"):
        assert_is_read(grouped, tmp_path, sdnq="none")
    fp8 = CheckpointDraft()
    fp8.put_fp8("q.weight", "F8_E4M3", 8, 16)
    fp8.put_scale("q.scale", 8, 1)
    with pytest.raises(FileError, match=r"is a SDNQ file \(q.weight is F8_E4M3 \[8, 16\]\)"):
        assert_is_read(fp8, tmp_path, sdnq="hadamard")
    write_config(tmp_path, PLAIN)
    with pytest.raises(FileError, match=r"is a SDNQ file \(the config beside it says quant_method sdnq\)"):
        assert_is_read(draft_rowwise(), tmp_path)


def test_scales_of_that_name_by_wan_int8_are_no_sign_of_sdnq(tmp_path: Path) -> None:
    draft = draft_int8((12, 4, 1), "block3d", name="scale", block=(1, 16), label="int8")
    with TensorFiles.open(draft.write(tmp_path / "m.safetensors")) as files:
        assert read_layers(files)["blocks.0.q"].granularity == "block3d"
