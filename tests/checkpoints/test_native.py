"""INT8 checkpoints: what is read is what was written, bit for bit, and a file that cannot be trusted is refused by name."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, assert_close, randn, shipped
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from int8run.backends.reference import Reference
from int8run.checkpoints import native
from int8run.checkpoints.header import read_header
from int8run.checkpoints.native import open_checkpoint, write_checkpoint
from int8run.errors import FileError, Int8RunError
from int8run.layers.linear import Int8Linear, QuantizedLayer
from int8run.outlier.base import LayerStatistics, OutlierMethod, OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant
from int8run.quant.weight import quantize_weight

METHODS: dict[str, OutlierMethod] = shipped("outlier")
ROWS = 6
# name -> (out_features, in_features), as the model has them
MODEL = {"plain": (ROWS, 8), "rotated": (ROWS, 16), "b.scaled": (ROWS, 128)}
WAYS = {"plain": NoOutlier(), "rotated": ConvRot(), "b.scaled": HadaNorm()}


def weight_of(width: int) -> Tensor:
    return randn(ROWS, width, seed=width)


def quantized(method: OutlierMethod, width: int) -> QuantizedLayer:
    """A layer as a run makes it; plain where the method cannot take the width."""
    weight = weight_of(width)
    sample = randn(2, 6, width, seed=1)
    seen = LayerStatistics(sample, sample.abs().amax((0, 1)), weight.abs().amax(0))
    transform = OutlierTransform() if method.refuse(width) else method.fit(weight, seen)
    return QuantizedLayer(quantize_weight(transform.transform_weight(weight)), transform, randn(ROWS, seed=2))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with three layers, each treated in another way, and a float tensor."""
    layers = {name: quantized(WAYS[name], MODEL[name][1]) for name in MODEL}
    return write_checkpoint(str(tmp_path / "m.safetensors"), layers, {"norm.weight": randn(3).bfloat16()}, {"rounding": "absmax"})


def changed(file: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The file after `change` was done to its tensors."""
    tensors = {key: t.clone() for key, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return file


def marked(file: Path, name: str, marker: object) -> Path:
    """The file with another marker of one layer; text is written as it is."""
    text = marker if isinstance(marker, str) else json.dumps(marker)
    return changed(file, lambda tensors: tensors.update({f"{name}.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)}))


def marker_of(file: Path, name: str) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(bytes(opened.get_tensor(f"{name}.comfy_quant").tolist()))


# -- there and back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 12, 64, 128, 384])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_layer_comes_back_bit_for_bit(method: OutlierMethod, width: int, tmp_path: Path) -> None:
    layer = quantized(method, width)
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"blocks.0.q": layer}, {}, {})
    read = open_checkpoint(str(path), {"blocks.0.q": (ROWS, width)}).layer("blocks.0.q", CPU)
    assert torch.equal(read.weight.qdata, layer.weight.qdata) and read.weight.qdata.dtype == torch.int8
    assert torch.equal(read.weight.scale, layer.weight.scale) and read.weight.scale.dtype == torch.float32
    made, back = layer.transform, read.transform
    assert (back.method, back.settings, back.label) == (made.method, made.settings, made.label)
    assert (back.group_size, back.sylvester, back.centered) == (made.group_size, made.sylvester, made.centered)
    assert (back.factor is None) == (made.factor is None) and (back.factor is None or torch.equal(back.factor, made.factor))
    assert back.same_input_as(made)
    x = randn(2, 5, width, seed=3)
    run = lambda found: Int8Linear(QuantizedLayer(found.weight, found.transform, layer.bias), Reference(), torch.float32)(x)  # noqa: E731
    assert torch.equal(run(read), run(layer))


def test_every_method_treats_some_layer_here() -> None:
    # else the test above would compare plain layers only
    assert {quantized(method, 128).transform.method for method in METHODS.values()} == set(METHODS)
    assert {quantized(method, 7).transform.method for method in METHODS.values()} == {"none", "smoothquant"}


@pytest.mark.parametrize(("group_size", "alpha"), [(2, 0.3), (1024, 0.1 + 0.2)])
def test_settings_come_back_as_the_same_numbers(group_size: int, alpha: float, tmp_path: Path) -> None:
    layer = quantized(HadaNorm(group_size, alpha), 1024)
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"q": layer}, {}, {})
    assert open_checkpoint(str(path), {"q": (ROWS, 1024)}).transforms()["q"].settings == {"group_size": group_size, "alpha": alpha}


def test_float_tensors_and_biases_are_written_as_they_are(tmp_path: Path) -> None:
    layer = quantized(NoOutlier(), 8)
    rest = {"norm.weight": randn(4, 6).bfloat16().T, "count": torch.tensor(3), "tied": (shared := randn(5)), "tied_to": shared}
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"q": layer}, rest, {})
    read = load_file(path)
    assert set(read) == {"q.weight", "q.weight_scale", "q.comfy_quant", "q.bias", *rest}
    assert torch.equal(read["q.bias"], layer.bias)
    for key, tensor in rest.items():
        assert torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype


def test_a_layer_without_a_bias_is_written_without_one(tmp_path: Path) -> None:
    layer = quantized(NoOutlier(), 8)
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"q": QuantizedLayer(layer.weight, layer.transform, None)}, {}, {})
    assert set(load_file(path)) == {"q.weight", "q.weight_scale", "q.comfy_quant"}


def test_layers_in_memory_of_any_layout_are_written(tmp_path: Path) -> None:
    layer = quantized(NoOutlier(), 8)
    turned = type(layer.weight)(layer.weight.qdata.T.contiguous().T, layer.weight.scale.expand(ROWS, 2)[:, :1])
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"q": QuantizedLayer(turned, layer.transform, None)}, {}, {})
    read = load_file(path)
    assert torch.equal(read["q.weight"], layer.weight.qdata) and torch.equal(read["q.weight_scale"], layer.weight.scale)


def test_the_note_tells_how_it_was_made(tmp_path: Path) -> None:
    note = {"model": "shipped:tiny", "rounding": "gptq", "kept_float": {"proj_out": "letzte Schicht ü"}, "calibration": None}
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"q": quantized(NoOutlier(), 8)}, {}, note)
    assert json.loads(read_header(path)[1]["int8run"]) == note
    checkpoint = open_checkpoint(str(path), {"q": (ROWS, 8)})
    assert checkpoint.note == note and checkpoint.rounding == "gptq"


def test_a_file_of_another_program_says_nothing_of_its_rounding(file: Path) -> None:
    assert open_checkpoint(str(changed(file, lambda tensors: None)), MODEL).rounding == "unknown"


# -- what others read ---------------------------------------------------------------------------------------------------


def hadamard(size: int) -> Tensor:
    """ComfyUI's regular Hadamard matrix, by its published rows, in float64."""
    block = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    matrix = block
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, block)
    return matrix / size**0.5


@pytest.mark.parametrize("width", [16, 64, 256])
def test_the_markers_of_plain_and_rotated_layers_are_comfyuis_own(width: int, tmp_path: Path) -> None:
    layers = {"plain": quantized(NoOutlier(), width), "rotated": quantized(ConvRot(), width)}
    path = write_checkpoint(str(tmp_path / "m.safetensors"), layers, {}, {})
    assert marker_of(path, "plain") == {"format": "int8_tensorwise", "per_row": True}
    assert marker_of(path, "rotated") == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": width, "per_row": True}
    # readers that go by the header alone know these lengths
    header, _ = read_header(path)
    assert header["plain.comfy_quant"]["shape"] == [46]
    assert header["rotated.comfy_quant"]["shape"] == [88 if width < 100 else 89]
    assert {key: (header[f"rotated.{key}"]["dtype"], header[f"rotated.{key}"]["shape"]) for key in ("weight", "weight_scale")} == {
        "weight": ("I8", [ROWS, width]),
        "weight_scale": ("F32", [ROWS, 1]),
    }


@pytest.mark.parametrize("name", ["plain", "rotated"])
def test_comfyuis_reading_gives_the_float_weight(name: str, file: Path) -> None:
    # int8 times scale, each group of the marker's size times the matrix
    read, marker = load_file(file), marker_of(file, name)
    weight = read[f"{name}.weight"].double() * read[f"{name}.weight_scale"].double()
    if marker.get("convrot"):
        weight = (weight.unflatten(1, (-1, marker["convrot_groupsize"])) @ hadamard(marker["convrot_groupsize"])).flatten(1)
    assert_close(name, weight, weight_of(MODEL[name][1]).double(), 0.01)


@pytest.mark.parametrize("method", [QuaRot(), SmoothQuant(), HadaNorm()], ids=lambda m: m.name)
def test_what_comfyui_cannot_compute_has_a_format_name_that_it_refuses(method: OutlierMethod, tmp_path: Path) -> None:
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"q": quantized(method, 128)}, {}, {})
    marker = marker_of(path, "q")
    assert marker["format"] == "int8run_transformed" and not {"convrot", "convrot_groupsize"} & set(marker)
    assert ("q.pre_quant_scale" in load_file(path)) == (method.name != "quarot")


@pytest.mark.parametrize("marker", [{"format": "int8_tensorwise"}, {"format": "int8_tensorwise", "convrot": False, "orig_dtype": "x"}])
def test_comfyuis_other_ways_to_write_a_plain_marker_are_read(marker: dict[str, object], file: Path) -> None:
    assert open_checkpoint(str(marked(file, "plain", marker)), MODEL).transforms()["plain"].method == "none"


def test_a_rotation_without_a_size_is_comfyuis_default(tmp_path: Path) -> None:
    path = write_checkpoint(str(tmp_path / "m.safetensors"), {"q": quantized(ConvRot(), 512)}, {}, {})
    marked(path, "q", {"format": "int8_tensorwise", "convrot": True})
    found = open_checkpoint(str(path), {"q": (ROWS, 512)}).transforms()["q"]
    assert (found.label, found.group_size) == ("convrot group_size=256", 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flat_scales_and_scales_of_another_float_dtype_are_read(file: Path, dtype: torch.dtype) -> None:
    scale = load_file(file)["plain.weight_scale"].to(dtype)
    changed(file, lambda tensors: tensors.update({"plain.weight_scale": scale.flatten()}))
    read = open_checkpoint(str(file), MODEL).layer("plain", CPU).weight.scale
    assert torch.equal(read, scale.float()) and read.dtype == torch.float32


# -- writing ------------------------------------------------------------------------------------------------------------


def write(path: Path) -> Path:
    return write_checkpoint(str(path), {"q": quantized(NoOutlier(), 8)}, {}, {})


def test_a_missing_folder_is_made_and_a_file_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new" / "folder").mkdir(parents=True)
    (tmp_path / "new" / "folder" / "m.safetensors").write_text("old")
    for location in ("new/folder/m.safetensors", "other/m.safetensors"):
        path = write_checkpoint(location, {"q": quantized(NoOutlier(), 8)}, {}, {})
        assert path == tmp_path / location and "q.weight" in load_file(path)
        assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_the_home_folder_may_stand_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write(Path("~/m.safetensors")) == tmp_path / "m.safetensors"
    assert open_checkpoint("~/m.safetensors", {"q": (ROWS, 8)}).path == tmp_path / "m.safetensors"


@pytest.mark.parametrize("old", [None, "old"], ids=["new", "replaced"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")], ids=lambda e: type(e).__name__
)
def test_an_interrupted_write_leaves_what_was_there(
    error: BaseException, old: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    if old:
        path.write_text(old)

    def half(tensors: object, to: Path, metadata: object) -> None:
        Path(to).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(native, "save_file", half)
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        write(path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({"m.safetensors": old} if old else {})


def in_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "m.safetensors"


def a_folder(folder: Path) -> Path:
    (folder / "m.safetensors").mkdir()
    return folder / "m.safetensors"


UNWRITABLE = {
    "a file in the way": (in_a_file, r"(File exists|Not a directory)"),
    "a folder of that name": (a_folder, "Is a directory"),
    "a folder that nobody may write to": (lambda folder: Path("/proc/m.safetensors"), r".+"),
    "a name that is too long": (lambda folder: folder / f"{'x' * 250}.safetensors", "File name too long"),
}


@pytest.mark.parametrize(("place", "reason"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_place_that_cannot_be_written_is_named(place: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileError, match=rf"^save=.*safetensors cannot be written: {reason}; choose a folder that you may write to$"):
        write(path)
    assert sorted(tmp_path.rglob("*")) == before


# -- refusals -----------------------------------------------------------------------------------------------------------


def drop(*keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in keys]


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: tensor})


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def codes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def one(value: float, columns: int = 0) -> Tensor:
    """Scales or factors, all good but one."""
    tensor = torch.ones(columns or ROWS)
    tensor[2] = value
    return tensor


BYTES, WHOLE = torch.uint8, torch.int32
REFUSED = {
    "no int8 layer": (drop("plain.weight", "rotated.weight", "b.scaled.weight"), r"no INT8 layer \(.*F32.*\); int8.checkpoint"),
    "another model": (put("other.weight", codes(2, 2)), r"1 of 4 INT8 layers are not in this model \(first: other\); it is for another"),
    "other width": (put("plain.weight", codes(ROWS, 9)), r"plain.weight has the shape \[6, 9\], this model wants \[6, 8\]"),
    "transposed": (put("plain.weight", codes(8, ROWS)), r"plain.weight has the shape \[8, 6\], this model wants \[6, 8\]"),
    # scales
    "no scale": (drop("plain.weight_scale"), "plain is INT8 and has no weight_scale; the file is incomplete"),
    "one for all": (put("plain.weight_scale", torch.tensor(1.0)), r"plain.weight_scale has the shape \[\], this model wants \[6, 1\]"),
    "one per block": (put("plain.weight_scale", torch.ones(ROWS, 2)), r"plain.weight_scale has the shape \[6, 2\], this model wants"),
    "one too few": (put("plain.weight_scale", torch.ones(5, 1)), r"plain.weight_scale has the shape \[5, 1\]"),
    "whole scales": (put("plain.weight_scale", torch.ones(ROWS, 1, dtype=WHOLE)), "plain.weight_scale is I32; it takes F32, F16, BF16"),
    "scale nan": (put("plain.weight_scale", one(float("nan"))), "1 of 6 numbers of plain.weight_scale are not finite and above 0"),
    "scale infinite": (put("plain.weight_scale", one(float("inf"))), "1 of 6 numbers of plain.weight_scale are not finite"),
    "scale zero": (put("plain.weight_scale", one(0.0)), "1 of 6 numbers of plain.weight_scale are not finite and above 0"),
    "scale negative": (put("plain.weight_scale", one(-0.1)), "1 of 6 numbers of plain.weight_scale are not finite and above 0"),
    "scale alone": (put("norm.weight_scale", torch.ones(3, 1)), "norm.weight_scale belongs to no INT8 weight; the file is damaged"),
    # factors
    "factor of other width": (put("b.scaled.pre_quant_scale", torch.ones(127)), r"has the shape \[127\], this model wants \[128\]"),
    "factor of two axes": (put("b.scaled.pre_quant_scale", torch.ones(1, 128)), r"has the shape \[1, 128\], this model wants \[128\]"),
    "factor nan": (put("b.scaled.pre_quant_scale", one(float("nan"), 128)), "1 of 128 numbers of b.scaled.pre_quant_scale are not finite"),
    "factor zero": (put("b.scaled.pre_quant_scale", one(0.0, 128)), "1 of 128 numbers of b.scaled.pre_quant_scale are not finite"),
    "whole factors": (put("b.scaled.pre_quant_scale", torch.ones(128, dtype=WHOLE)), "b.scaled.pre_quant_scale is I32; it takes F32"),
    "factor lost": (drop("b.scaled.pre_quant_scale"), "the marker of b.scaled and its pre_quant_scale contradict each other; the file is"),
    "factor too many": (put("plain.pre_quant_scale", torch.ones(8)), "the marker of plain and its pre_quant_scale contradict each other"),
    "factor alone": (put("norm.pre_quant_scale", torch.ones(3)), "norm.pre_quant_scale belongs to no INT8 weight"),
    # markers
    "no marker": (drop("rotated.comfy_quant"), "rotated is INT8 and has no comfy_quant marker, so nobody knows whether it is rotated"),
    "marker alone": (put("norm.comfy_quant", text("{}")), "norm.comfy_quant belongs to no INT8 weight"),
    "marker of floats": (put("plain.comfy_quant", torch.ones(4)), r"plain.comfy_quant is F32 \[4\]; a marker is a row of bytes, U8"),
    "marker of codes": (put("plain.comfy_quant", codes(4)), r"plain.comfy_quant is I8 \[4\]; a marker is a row of bytes"),
    "marker of one number": (put("plain.comfy_quant", torch.tensor(200, dtype=BYTES)), r"plain.comfy_quant is U8 \[\]; a marker is"),
    "marker of two axes": (put("plain.comfy_quant", text("{}")[None]), r"plain.comfy_quant is U8 \[1, 2\]; a marker is a row of bytes"),
    "empty marker": (put("plain.comfy_quant", text("")), "the marker of plain is no JSON: b''"),
    "no json": (put("plain.comfy_quant", text("{{}}")), r"the marker of plain is no JSON: b'\{\{\}\}'"),
    "no text": (put("plain.comfy_quant", torch.full((5,), 255, dtype=BYTES)), "the marker of plain is no JSON"),
    "brackets without an end": (put("plain.comfy_quant", text("[" * 100_000)), "the marker of plain is no JSON"),
    "a list": (put("plain.comfy_quant", text("[1]")), r"the marker of plain is no JSON object: b'\[1\]'"),
    "no format": (put("plain.comfy_quant", text("{}")), r"plain has the marker \{\}; this version reads int8_tensorwise and int8run_tran"),
    "format of others": (put("plain.comfy_quant", text('{"format": "nvfp4"}')), r"plain has the marker .*nvfp4.*; this version reads"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(change: Callable[[dict[str, Tensor]], object], message: str, file: Path) -> None:
    changed(file, change)
    with pytest.raises(FileError, match=message) as raised:
        open_checkpoint(str(file), MODEL)
    assert str(raised.value).startswith(f"{file}") and "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, 1, -4, 3, "x", None, True, 4.0, [4], 4**7, 10**9])
@pytest.mark.parametrize("name", ["rotated", "b.scaled"])
def test_a_bad_group_size_is_refused(name: str, size: object, file: Path) -> None:
    key = "convrot_groupsize" if name == "rotated" else "group_size"
    marked(file, name, marker_of(file, name) | {key: size})
    reason = ": .* needs a power of [24], not 3$" if size == 3 else ", which is no group size$"
    with pytest.raises(FileError, match=f"{name} is rotated in groups of {re.escape(repr(size))}{reason}"):
        open_checkpoint(str(file), MODEL)


def test_groups_that_do_not_divide_are_refused(file: Path) -> None:
    marked(file, "rotated", marker_of(file, "rotated") | {"convrot_groupsize": 64})
    with pytest.raises(FileError, match="rotated is rotated in groups of 64, which do not divide its 16 inputs"):
        open_checkpoint(str(file), MODEL)


OURS = {
    "no settings": {"settings": None},
    "settings in a list": {"settings": [1]},
    "a setting that is no number": {"settings": {"alpha": "x"}},
    "a setting that is true": {"settings": {"alpha": True}},
    "a setting that is not finite": {"settings": {"alpha": float("inf")}},
    "a setting in a setting": {"settings": {"alpha": {}}},
    "no method": {"outlier": None},
    "a method in a list": {"outlier": ["hadanorm"]},
    "an unknown rotation": {"rotation": "random"},
    "a rotation in a list": {"rotation": []},
    "centering that is no switch": {"centered": "no"},
    "a factor that is no switch": {"factor": "yes"},
}


@pytest.mark.parametrize("change", OURS.values(), ids=OURS)
def test_a_marker_of_ours_that_makes_no_sense_is_refused(change: dict[str, object], file: Path) -> None:
    marked(file, "b.scaled", marker_of(file, "b.scaled") | change)
    with pytest.raises(FileError, match=r"b.scaled has the marker \{.*\}; this version reads int8_tensorwise and int8run_transformed"):
        open_checkpoint(str(file), MODEL)


def header_and_data(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(file: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def unknown_dtype(header: dict[str, Any]) -> None:
    header["norm.weight"]["dtype"] = "Q3"


def shape_of_other_size(header: dict[str, Any]) -> None:
    header["norm.weight"]["shape"] = [4]


def fractional_shape(header: dict[str, Any]) -> None:
    header["plain.weight"]["shape"] = [6.0, 8]


def overlap(header: dict[str, Any]) -> None:
    header["plain.weight"]["data_offsets"] = header["b.scaled.comfy_quant"]["data_offsets"]


def note_of_a_list(header: dict[str, Any]) -> None:
    header["__metadata__"]["int8run"] = "[1]"


HEADERS = {
    "unknown dtype": (unknown_dtype, "is damaged: "),
    "shape and size disagree": (shape_of_other_size, "is damaged: "),
    "fractional shape": (fractional_shape, "is damaged: "),
    "tensors in the same place": (overlap, "is damaged: "),
    "a note that is a list": (note_of_a_list, "the note in the header is no JSON object"),
}


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS)
def test_a_damaged_header_is_one_line(change: Callable[[dict[str, Any]], None], message: str, file: Path) -> None:
    header, data = header_and_data(file)
    change(header)
    with_header(file, header, data)
    with pytest.raises(FileError, match=message) as raised:
        open_checkpoint(str(file), MODEL)
    assert "\n" not in str(raised.value)


FILES = {
    "cut off": (lambda raw: raw[:-1], "is damaged: the header describes"),
    "cut in the header": (lambda raw: raw[:40], "is not a safetensors file, or it is cut off"),
    "empty": (lambda raw: b"", "is not a safetensors file, or it is cut off"),
    "another kind": (lambda raw: b"GGUF" + raw, "is not a safetensors file"),
    "a number without an end": (lambda raw: (9000).to_bytes(8, "little") + b"1" * 9000, "is not a safetensors file: its header is no JSON"),
    "brackets without an end": (
        lambda raw: (10**5).to_bytes(8, "little") + b"[" * 10**5,
        "is not a safetensors file: its header is no JSON",
    ),
}


@pytest.mark.parametrize(("change", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_none_is_refused(change: Callable[[bytes], bytes], message: str, file: Path) -> None:
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(FileError, match=message):
        open_checkpoint(str(file), MODEL)


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.safetensors", "no such file"), (".", "no such file"), ("m.ckpt", "is a pickled file"), (5, "no such file")],
)
def test_a_location_without_a_checkpoint_is_refused(name: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=message):
        open_checkpoint(name, MODEL)


def test_a_file_that_may_not_be_read_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FileError, match=r"m\.safetensors cannot be read: Permission denied"):
        open_checkpoint(str(file), MODEL)


# -- chance -------------------------------------------------------------------------------------------------------------

JUNK = [None, True, -1, 0, 3, 4, 1.5, 1e300, float("nan"), 10**9, 10**30, "", "x", "convrot", "I8", "F32", [], [1], [6, 8], {}, {"a": 1}]


def mutated(value: Any, chance: random.Random) -> Any:
    """A tree of JSON with one thing in it replaced, dropped, doubled or renamed."""
    value = json.loads(json.dumps(value))
    at, parents = value, []
    while isinstance(at, dict | list) and at and (not parents or chance.random() < 0.8):
        key = chance.choice(list(at) if isinstance(at, dict) else range(len(at)))
        parents.append((at, key))
        at = at[key]
    if not parents:
        return chance.choice(JUNK)
    parent, key = parents[-1]
    way = chance.randrange(4)
    if way == 0:
        parent.pop(key)
    elif way == 1 and isinstance(parent, dict):
        parent[f"{key}{chance.choice(['', '.weight', 'x'])}"] = parent.pop(key)
        parent[chance.choice(["plain.weight", "norm.weight", "format", "shape"])] = at
    else:
        parent[key] = chance.choice(JUNK)
    return value


def scrambled(text: bytes, chance: random.Random) -> bytes:
    """Bytes with some of them changed, or cut."""
    changed = bytearray(text)
    for _ in range(chance.randrange(1, 4)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed[: chance.randrange(len(changed)) + 1] if chance.random() < 0.2 else changed)


def read_or_refuse(file: Path) -> bool:
    """Whether it was read; a refusal must be one of ours, and what is read must be able to compute."""
    try:
        checkpoint = open_checkpoint(str(file), MODEL)
        layers = {name: checkpoint.layer(name, CPU) for name in checkpoint.markers}
    except Int8RunError as error:
        assert "\n" not in str(error)
        return False
    for name, layer in layers.items():
        assert tuple(layer.weight.qdata.shape) == MODEL[name] and layer.transform.label
        y = Int8Linear(layer, Reference(), torch.float32)(randn(2, 3, MODEL[name][1]))
        assert torch.isfinite(y).all() and y.shape == (2, 3, ROWS)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_any_header_is_read_or_refused(seed: int, file: Path) -> None:
    chance = random.Random(seed)
    header, data = header_and_data(file)
    read = 0
    for _ in range(80):
        text = json.dumps(mutated(header, chance)).encode() if chance.random() < 0.7 else scrambled(json.dumps(header).encode(), chance)
        read += read_or_refuse(with_header(file, text, data))
    assert 0 < read < 60, "mutations that all fail, or none, try nothing"


@pytest.mark.parametrize("seed", range(4))
def test_any_marker_is_read_or_refused(seed: int, file: Path) -> None:
    chance = random.Random(seed)
    whole = load_file(file)
    read = 0
    for _ in range(80):
        name = chance.choice(list(MODEL))
        marker = json.dumps(mutated(marker_of(file, name), chance)).encode()
        marker = scrambled(marker, chance) if chance.random() < 0.3 else marker
        other = file.with_name("other.safetensors")
        save_file(whole | {f"{name}.comfy_quant": torch.tensor(list(marker), dtype=torch.uint8)}, other)
        read += read_or_refuse(other)
    assert 0 < read < 60, "mutations that all fail, or none, try nothing"


def test_a_file_that_is_replaced_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "m.safetensors")
    assert not caplog.records
    write(tmp_path / "m.safetensors")
    assert [r.getMessage() for r in caplog.records] == [f"save={tmp_path / 'm.safetensors'} replaces a file that is there"]
