"""fp8 weights without a scale: casts of real weights are read, numbers that lost their scale are refused.

The right answers come from what was done to make each weight: a cast, or a division as writers divide.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from int8run.checkpoints import plain_casts
from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LIMITS = {E4M3: 448.0, E5M2: 57344.0}


def draw_weight(rows: int = 48, columns: int = 64, size: float = 0.05, tail: float = 1.0) -> Tensor:
    """Numbers as layers have them; with a tail, one column in 32 is that many times larger."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * size
    weight[:, ::32] *= tail
    return weight


def open_files(folder: Path, tensors: dict[str, Tensor]) -> TensorFiles:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "m.safetensors")
    return TensorFiles.open(folder / "m.safetensors")


def divide_by_tensor(weight: Tensor, limit: float) -> Tensor:
    return weight / (weight.abs().max() / limit)


def divide_by_rows(weight: Tensor, limit: float) -> Tensor:
    return weight / (weight.abs().amax(1, keepdim=True) / limit)


def divide_by_blocks(weight: Tensor, limit: float) -> Tensor:
    blocks = weight.view(len(weight), -1, 32)
    return (blocks / (blocks.abs().amax(2, keepdim=True) / limit)).view_as(weight)


def divide_by_powers_of_2(weight: Tensor, limit: float) -> Tensor:
    """As mxfp8 does: numbers up to between half of the limit and the limit."""
    blocks = weight.view(len(weight), -1, 32)
    exponents = torch.ceil(torch.log2(blocks.abs().amax(2, keepdim=True) / limit))
    return (blocks / 2**exponents).view_as(weight)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("tail", [1.0, 60.0])
@pytest.mark.parametrize(
    "divide", [divide_by_tensor, divide_by_rows, divide_by_blocks, divide_by_powers_of_2]
)
def test_numbers_that_lost_their_scale_are_refused(
    divide: Callable[[Tensor, float], Tensor], tail: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored = divide(draw_weight(tail=tail), LIMITS[dtype]).to(dtype)
    with open_files(tmp_path, {"a.weight": stored}) as files, pytest.raises(FileError, match="were lost"):
        read_layers(files)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [0.002, 0.05, 1.5])
def test_casts_are_read_and_their_largest_number_is_known(
    size: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored = draw_weight(size=size, tail=20).to(dtype)
    with open_files(tmp_path, {"a.weight": stored}) as files:
        (layer,) = read_layers(files).values()
        weight = layer.read_weight(files)

    assert torch.equal(weight, stored.float())
    assert layer.largest == stored.float().abs().max()


def test_one_lost_scale_is_found_among_casts_and_scaled_layers(tmp_path: Path) -> None:
    scaled = divide_by_tensor(draw_weight(), 448.0).to(E4M3)
    tensors = {
        "good.weight": scaled,
        "good.weight_scale": torch.tensor(0.001),
        "cast.weight": draw_weight().to(E4M3),
        "lost.weight": scaled.clone(),
    }
    message = (
        r"1 fp8 weight has no scale and numbers that no plain cast has; 1 other weight may be one "
        r"\(first: lost.weight"
    )
    with open_files(tmp_path, tensors) as files, pytest.raises(FileError, match=message):
        read_layers(files)


def test_a_weight_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw_weight(rows=50)
    weight[49, 63] = 448
    monkeypatch.setattr(plain_casts, "PIECE_BYTES", 7 * 64)  # 7 rows, and one row at the end
    read, sizes = TensorFiles.read_into, []

    def read_and_count(files: TensorFiles, key: str, rows: slice | None, buffer: Tensor) -> Tensor:
        sizes.append(buffer.numel())
        return read(files, key, rows, buffer)

    monkeypatch.setattr(TensorFiles, "read_into", read_and_count)
    files = open_files(tmp_path, {"a.weight": weight.to(E4M3)})
    with files, pytest.raises(FileError, match="which reaches 448"):
        read_layers(files)

    assert sizes == [7 * 64] * 8


def test_convolutions_are_looked_at_and_norms_are_not(tmp_path: Path) -> None:
    norm = {"norm.weight": torch.full((8,), 300.0).to(E4M3)}
    with open_files(tmp_path, norm) as files:
        assert read_layers(files)["norm"].largest is None
    convolution = divide_by_tensor(draw_weight(), 448.0).to(E4M3).view(48, 4, 4, 4)
    files = open_files(tmp_path, norm | {"conv.weight": convolution})
    with files, pytest.raises(FileError, match=r"first: conv.weight"):
        read_layers(files)


def test_tables_of_words_may_hold_large_numbers_in_a_file_of_casts(tmp_path: Path) -> None:
    table = draw_weight(size=90).clamp(-448, 448).to(E4M3)
    assert table.float().abs().max() > plain_casts.LARGEST_CAST
    tensors = {"shared.weight": table, "block.0.q.weight": draw_weight().to(E4M3)}
    with open_files(tmp_path, tensors) as files:
        assert {layer.label for layer in read_layers(files).values()} == {"float8_e4m3fn cast"}

    tensors["block.0.q.weight_scale"] = torch.tensor(0.01)
    with open_files(tmp_path, tensors) as files, pytest.raises(FileError, match=r"first: shared.weight"):
        read_layers(files)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["float8_e4m3fn_cast", "float8_e5m2_cast"])
def test_a_word_says_that_large_numbers_are_casts(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    word = request.node.callspec.id
    stored = draw_weight(size=100).clamp(-400, 400).to(dtype)
    with open_files(tmp_path, {"a.weight": stored}) as files, caplog.at_level(logging.WARNING):
        (layer,) = read_layers(files, declared=DeclaredFormat(word)).values()
        assert torch.equal(layer.read_weight(files), stored.float())
        with pytest.raises(FileError, match=f"model.quant_format={word} says so"):
            read_layers(files, declared=DeclaredFormat("float8_e4m3fn"))

    assert "1 fp8 weight has no scale and numbers up to" in caplog.text


def test_zeros_and_nan_are_no_large_numbers(tmp_path: Path) -> None:
    """NaN is found where the weight is read."""
    weight = draw_weight()
    weight[0, 0] = torch.nan
    with open_files(tmp_path, {"a.weight": weight.to(E4M3), "b.weight": torch.zeros(4, 4).to(E5M2)}) as files:
        layers = read_layers(files)

    assert layers["a"].largest == draw_weight().flatten()[1:].to(E4M3).float().abs().max()
    assert layers["b"].largest == 0


@pytest.mark.parametrize(
    ("config", "metadata", "label"),
    [
        ('{"quantization_config": {"quant_method": "fp8"}}', {}, r"\(quant_method fp8\)"),
        ('{"quant_method": "fbgemm_fp8"}', {}, r"\(quant_method fbgemm_fp8\)"),
        ("{}", {"scale_granularity": "tensor"}, "scale_granularity in the header"),
    ],
)
def test_labels_of_a_whole_file_promise_scales(
    config: str, metadata: dict[str, str], label: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config)
    tensors = {"a.weight": draw_weight().to(E4M3), "b.weight": draw_weight(16).to(E4M3)}
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    message = f"{label} says that fp8 weights have scales, and none has one"
    with TensorFiles.open(tmp_path / "m.safetensors") as files, pytest.raises(FileError, match=message):
        read_layers(files)

    tensors["a.weight_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    with TensorFiles.open(tmp_path / "m.safetensors") as files:
        assert read_layers(files)["b"].label == "float8_e4m3fn cast"


def test_a_config_names_the_size_of_blocks(tmp_path: Path) -> None:
    """192 numbers in 2 blocks may be 96 and 96; transformers' config says 128 and 64."""
    weight, scale = draw_weight(192, 192).to(E4M3), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    files = open_files(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    with files, pytest.raises(FileError, match="does not fit a weight"):
        read_layers(files)

    config = '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}'
    (tmp_path / "config.json").write_text(config)
    with TensorFiles.open(tmp_path / "m.safetensors") as files:
        read = read_layers(files)["a"].read_weight(files)
    expected = weight.float()
    for rows, columns, factor in ((slice(128), slice(128, None), 2.0), (slice(128, None), slice(128), 3.0)):
        expected[rows, columns] *= factor
    expected[128:, 128:] *= 4
    assert torch.equal(read, expected)


@pytest.mark.parametrize(("dtype", "top_code"), [(E4M3, 0x7E), (E5M2, 0x7B)], ids=["e4m3", "e5m2"])
def test_the_largest_code_is_that_of_the_largest_number(dtype: torch.dtype, top_code: int) -> None:
    """Pairs of all codes, of both signs, NaN and infinity among them."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(dtype).float().abs()
    numbers = numbers.where(torch.isfinite(numbers), 0)
    for other in (0x00, 0x38, 0x7E, 0x7F, 0x80, 0xB8, 0xFB, 0xFF):
        largest = torch.maximum(numbers, numbers[other])
        pairs = torch.stack([codes, torch.full_like(codes, other)], dim=1)
        found = torch.tensor([plain_casts.find_largest_code(pair, top_code) for pair in pairs])
        assert torch.equal(found.to(torch.uint8).view(dtype).float(), largest)
