"""Numbers of GGUF files: what blocks stand for, told by the library, by ggml's formulas and by the reader."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.gguf_files import (
    FORMULAS,
    K_TYPES,
    DraftTensor,
    GgufDraft,
    draw_blocks,
    stand_for,
    write_blocks,
    write_gguf,
)

from int8run.checkpoints.detect import get_logical_shapes, read_layers
from int8run.checkpoints.gguf_blocks import CHUNK_NUMBERS, StoredForm, dequantize_blocks
from int8run.checkpoints.gguf_types import BLOCK_TYPES
from int8run.checkpoints.kept_dtype import find_kept_dtype
from int8run.checkpoints.layer import GGUF
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

BLOCKS = {block.name: block for block in BLOCK_TYPES.values()}
ROWS, COLUMNS = 5, 512


def test_every_type_has_a_formula() -> None:
    assert FORMULAS.keys() == BLOCKS.keys()


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_numbers_of_ggml_and_of_the_library(kind: str, tmp_path: Path) -> None:
    data = draw_blocks(kind, ROWS, COLUMNS)
    write_blocks(tmp_path / "x.gguf", {"a.weight": (kind, data)})

    with TensorFiles.open(tmp_path / "x.gguf") as files:
        found = files.read("a.weight")

    assert found.dtype == torch.float32 and found.shape == (ROWS, COLUMNS)
    library = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found.numpy(), library)
    by_formula = torch.from_numpy(stand_for(kind, data))
    # the library subtracts in float32
    assert torch.allclose(found.double(), by_formula, rtol=1e-5, atol=1e-6)
    if kind in ("Q4_0", "Q5_0", "Q8_0"):
        assert torch.equal(found.double(), by_formula), "scale times integer is exact"


@pytest.mark.parametrize("kind", [*BLOCKS, "F32", "F16", "BF16"])
def test_rows_are_read_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if kind in BLOCKS:
        write_blocks(path, {"a.weight": (kind, draw_blocks(kind, ROWS, COLUMNS))})
    else:
        write_gguf(
            path, {"a.weight": np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype("f4")}, kind
        )
    with TensorFiles.open(path) as files:
        whole = files.read("a.weight")
        buffer = torch.empty(files["a.weight"].nbytes, dtype=torch.uint8)
        for start, stop in ((0, 1), (1, 4), (4, 5), (2, 2), (0, ROWS)):
            rows = slice(start, stop)
            assert torch.equal(files.read("a.weight", rows), whole[rows])
            assert torch.equal(files.read_into("a.weight", rows, buffer), whole[rows])
        _, count = files.get_byte_range("a.weight", slice(1, 3))

    assert count == 2 * buffer.numel() // ROWS, "no more is read than these rows"


@pytest.mark.parametrize("kind", K_TYPES)
def test_rows_of_a_reshaped_tensor_may_begin_inside_of_a_block(kind: str, tmp_path: Path) -> None:
    """ComfyUI-GGUF's converter writes [32, 16, 3, 3] as 18 rows of 256."""
    shape = (32, 16, 3, 3)
    data = draw_blocks(kind, 18, 256)
    metadata = {"comfy.gguf.orig_shape.a.weight": shape}
    write_blocks(tmp_path / "x.gguf", {"a.weight": (kind, data)}, metadata)

    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(shape)

    with TensorFiles.open(tmp_path / "x.gguf") as files:
        assert files["a.weight"].shape == shape
        assert np.array_equal(files.read("a.weight").numpy(), expected)
        for start, stop in ((0, 1), (1, 2), (3, 9), (31, 32), (7, 7)):
            assert np.array_equal(files.read("a.weight", slice(start, stop)).numpy(), expected[start:stop])


def test_more_numbers_than_are_dequantized_at_a_time() -> None:
    block = BLOCKS["Q8_0"]
    data = torch.from_numpy(draw_blocks("Q8_0", 1, CHUNK_NUMBERS + 96)).flatten()

    found = dequantize_blocks(data, block)

    expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(found.numpy(), expected)


def test_a_damaged_scale_stays_visible() -> None:
    data = torch.from_numpy(draw_blocks("Q8_0", 1, 64)).flatten()
    data[:2] = torch.from_numpy(np.array([np.nan], np.float16).view(np.uint8))

    found = dequantize_blocks(data, BLOCKS["Q8_0"])

    assert found[:32].isnan().all() and found[32:].isfinite().all()


def test_weights_in_blocks_are_layers_that_are_read_as_floats(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    tensors = {
        "a.weight": chance.normal(size=(8, 64)).astype("f4"),
        "a.bias": chance.normal(size=8).astype("f4"),
        "c.weight": chance.normal(size=(8, 4, 1, 32)).astype("f4"),
    }
    meant = write_gguf(tmp_path / "x.gguf", tensors, "Q4_0")
    with TensorFiles.open(tmp_path / "x.gguf") as files:
        layers = read_layers(files)

        assert layers.keys() == {"a", "c"}
        layer = layers["a"]
        assert (layer.storage_dtype, layer.label, layer.rows, layer.columns) == (GGUF, "Q4_0", 8, 64)
        assert not layer.is_usable_as_is and not layer.is_packable and layer.is_dequantized
        assert np.array_equal(layer.read_weight(files, slice(2, 5)).numpy(), meant["a.weight"][2:5])
        assert np.array_equal(layers["c"].read_weight(files).numpy(), meant["c.weight"])
        assert get_logical_shapes(files, layers)["c.weight"] == (8, 4, 1, 32)
        with pytest.raises(ValueError, match="cannot stay as they are"):
            layer.read_packed_weight(files)


@pytest.mark.parametrize(
    ("beside", "name", "reason"),
    [("F32", "BF16", "as most denoisers are published"), ("F16", "F16", "as 1 of the 1 float tensors")],
)
def test_small_tensors_in_float32_do_not_decide_how_blocks_are_written(
    beside: str, name: str, reason: str, tmp_path: Path
) -> None:
    tensors = {"a.weight": np.ones((4, 32), np.float32), "b.weight": np.ones((4, 3), np.float32)}
    write_gguf(tmp_path / "x.gguf", tensors, lambda key, tensor: "Q8_0" if key.startswith("a") else beside)

    with TensorFiles.open(tmp_path / "x.gguf") as files:
        found = find_kept_dtype(files, read_layers(files), "")

    assert found.name == name and found.reason.startswith(reason)


def test_pairs_are_separated_in_whole_heads() -> None:
    """Rows (0, 1), (2, 3) of a head of four are pairs; the model has 0, 2, 1, 3."""
    form = StoredForm(None, "F32", paired_heads=2)
    data = torch.arange(16, dtype=torch.float32).view(torch.uint8)
    shape = (8, 2)

    whole = form.decode(data, shape, (0, 8))

    assert whole[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    for rows in ((0, 3), (3, 5), (5, 8)):
        start, count = form.find_bytes(shape, rows)
        assert torch.equal(form.decode(data[start : start + count], shape, rows), whole[rows[0] : rows[1]])


def test_without_the_library_the_command_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "blocks.gguf", {"a.weight": np.ones((4, 32), np.float32)}, "Q8_0")
    write_gguf(tmp_path / "plain.gguf", {"a.weight": np.ones((4, 32), np.float32)}, "BF16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(FileError, match=r"not installed: pip install 'gguf>=0\.19,<1' \(int8run's extra"):
        TensorFiles.open(tmp_path / "blocks.gguf")
    with TensorFiles.open(tmp_path / "plain.gguf") as files:
        assert files.read("a.weight").dtype == torch.bfloat16, "plain numbers need none"


def test_a_file_is_known_by_how_it_begins_and_by_its_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "weights", {"a.weight": np.ones((4, 32), np.float32)})
    with TensorFiles.open(tmp_path / "weights") as files:
        assert files["a.weight"].dtype == "F32"
    (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FileError, match=r"x\.gguf is not a GGUF file"):
        TensorFiles.open(tmp_path / "x.gguf")


def test_a_folder_with_a_gguf_file_alone_says_to_name_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"a.weight": np.ones((4, 32), np.float32)})
    with pytest.raises(FileError, match=r"name its GGUF file, .*x\.gguf"):
        TensorFiles.open(tmp_path)


def test_a_file_that_is_cut_off_after_it_was_opened_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a.weight": np.ones((64, 256), np.float32)}, "Q8_0")
    with TensorFiles.open(path) as files:
        path.write_bytes(path.read_bytes()[:-4096])
        with pytest.raises(FileError, match="was cut off or replaced while it was read"):
            files.read("a.weight")


def test_integers_beside_the_weights_are_read(tmp_path: Path) -> None:
    data = np.arange(6, dtype="<i4").tobytes()
    GgufDraft(tensors=[DraftTensor("ids", (3, 2), 26, data)]).write(tmp_path / "x.gguf")
    with TensorFiles.open(tmp_path / "x.gguf") as files:
        assert files.read("ids").tolist() == [[0, 1, 2], [3, 4, 5]]
