"""Weights in every format as tensors of a file: what ComfyUI expects, and what our reader makes of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints.drafts.numbers import make_regular
from support.helpers import randn

from int8run.checkpoints.comfy_formats import build_marker, collect_tensors, plan_packed_entries
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import StreamWriter, TensorEntry, view_as_bytes
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.outlier.base import OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.outlier.quarot import QuaRot
from int8run.quant.formats import FORMATS, WeightFormat
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.packed_weight import PackedWeight

WRITABLE_FORMATS = [form for form in FORMATS.values() if not form.is_read_only]
KEY = "text.layer.weight"
PLAIN = OutlierTransform()


def make_factor_transform(columns: int) -> OutlierTransform:
    return OutlierTransform("smoothquant", {"alpha": 0.5}, randn(columns, seed=9).abs() + 0.5)


def make_transforms(form: WeightFormat, columns: int) -> dict[str, OutlierTransform]:
    """What may have been done to a weight before."""
    found = {"plain": PLAIN, "factor": make_factor_transform(columns)}
    if form.name == "int8_rowwise":
        rotation = Rotation(sylvester_hadamard(32), sylvester=True)
        found["quarot"] = OutlierTransform("quarot", {"group_size": 32}, rotation=rotation)
        found["hadanorm"] = OutlierTransform(
            "hadanorm", {}, make_factor_transform(columns).factor, rotation, centered=True
        )
    if form.is_rotated:
        found = {"convrot": ConvRot(form.get_rotation_group_size(columns)).fit(torch.empty(1, columns))}
    return found


CASES = [
    pytest.param(form, shape, name, id=f"{form.name} {list(shape)} {name}")
    for form in WRITABLE_FORMATS
    for shape in ((128, 256), (40, 96), (1, 32), (64, 64))
    if form.unsupported_reason(*shape) is None
    for name in make_transforms(form, shape[1])
]


def write_file(path: Path, form: WeightFormat, weight: PackedWeight, transform: OutlierTransform) -> Path:
    """A file as a stream of pieces, laid out before the numbers are known."""
    entries = plan_packed_entries(KEY, form, weight.shape, transform)
    with StreamWriter(
        path, [*entries, TensorEntry("text.layer.bias", "F32", (weight.shape[0],))], {}
    ) as writer:
        writer.write("text.layer.bias", torch.zeros(weight.shape[0]))
        for key, data in collect_tensors(KEY, weight, form, transform).items():
            writer.write(key, data)
        return writer.finish()


def get_stored_numbers(weight: PackedWeight | GroupedWeight) -> torch.Tensor:
    """The tensor `L.weight`."""
    return weight.codes if isinstance(weight, GroupedWeight) else weight.qdata


@pytest.mark.parametrize(("form", "shape", "name"), CASES)
def test_planned_entries_describe_the_tensors(form: WeightFormat, shape: tuple[int, int], name: str) -> None:
    transform = make_transforms(form, shape[1])[name]
    entries = plan_packed_entries(KEY, form, shape, transform)
    tensors = collect_tensors(KEY, form.quantize(randn(*shape)), form, transform)

    assert [key for key, _, _ in entries] == list(tensors)

    for key, word, size in entries:
        data = tensors[key]
        if isinstance(data, bytes):
            assert (key, word, size) == ("text.layer.comfy_quant", "U8", (len(data),))
        else:
            assert DTYPES[word][1] == str(data.dtype).removeprefix("torch.")
            assert tuple(data.shape) == size
            assert len(view_as_bytes(data)) == data.nbytes


@pytest.mark.parametrize(("form", "shape", "name"), CASES)
def test_written_weight_is_read_back(
    form: WeightFormat, shape: tuple[int, int], name: str, tmp_path: Path, caplog
) -> None:
    transform = make_transforms(form, shape[1])[name]
    weight = form.quantize(transform.transform_weight(randn(*shape)))

    with TensorFiles.open(write_file(tmp_path / "m.safetensors", form, weight, transform)) as files:
        layer = read_layers(files)["text.layer"]
        read, back = layer.read_packed_weight(files)
        assert torch.equal(
            layer.read_weight(files, shape=shape), transform.restore_weight(weight.dequantize())
        )

    assert torch.equal(read.dequantize(), weight.dequantize())
    assert read.shape == shape
    read_numbers, numbers = get_stored_numbers(read), get_stored_numbers(weight)
    assert read_numbers.dtype == numbers.dtype
    assert torch.equal(read_numbers.view(torch.uint8), numbers.view(torch.uint8))
    assert back.has_same_input_transform(transform)
    if transform.factor is None or form.name == "int8_rowwise":
        assert back.method == transform.method
    if name in ("quarot", "hadanorm"):
        assert layer.format_name == ""  # no word of `clip=` says it
    elif weight.scale is None or weight.scale.numel() > 1:
        assert layer.format_name == form.name
        assert not caplog.records, "a label contradicts its scale"


# -- by ComfyUI's names ----------------------------------------------------------------------------

SHAPE = (256, 512)
NAMES = {
    "int8_tensorwise": ("I8", [256, 512], "F32", [], {"format": "int8_tensorwise"}),
    "int8_rowwise": ("I8", [256, 512], "F32", [256, 1], {"format": "int8_tensorwise", "per_row": True}),
    "int8_convrot": (
        "I8",
        [256, 512],
        "F32",
        [256, 1],
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256, "per_row": True},
    ),
    "int8_blockwise": ("I8", [256, 512], "F32", [2, 4], {"format": "int8_blockwise", "group_size": 128}),
    "int8_block3d": ("I8", [256, 512], "F32", [256, 4, 1], {"format": "int8_blockwise", "group_size": 128}),
    "float8_e4m3fn": ("F8_E4M3", [256, 512], "F32", [], {"format": "float8_e4m3fn"}),
    "float8_e5m2": ("F8_E5M2", [256, 512], "F32", [], {"format": "float8_e5m2"}),
    "float8_e4m3fn_cast": ("F8_E4M3", [256, 512], None, None, None),
    "float8_e5m2_cast": ("F8_E5M2", [256, 512], None, None, None),
    "float8_e4m3fn_rowwise": ("F8_E4M3", [256, 512], "F32", [256], {"format": "float8_e4m3fn_rowwise"}),
    "float8_e4m3fn_blockwise": (
        "F8_E4M3",
        [256, 512],
        "F32",
        [4, 8],
        {"format": "float8_e4m3fn_blockwise", "group_size": 64},
    ),
    "float8_e4m3fn_block3d": (
        "F8_E4M3",
        [256, 512],
        "F32",
        [256, 8, 1],
        {"format": "float8_e4m3fn_block3d", "group_size": 64},
    ),
    "mxfp8": ("F8_E4M3", [256, 512], "U8", [256, 16], {"format": "mxfp8"}),
    "nvfp4": ("U8", [256, 256], "F8_E4M3", [256, 32], {"format": "nvfp4"}),
}


@pytest.mark.parametrize(("name", "row_bytes"), [("w4a8", 256), ("w6a8", 384)])
def test_entries_of_codes(name: str, row_bytes: int) -> None:
    form = FORMATS[name]
    transform = ConvRot(64).fit(torch.empty(1, 512))
    marker = {"format": "asym_w4a8_int8", "group_size": 16, "convrot": True, "convrot_groupsize": 64}
    expected = {
        "text.layer.weight": ("I8", (256, row_bytes)),
        "text.layer.weight_s_rel": ("F8_E4M3", (256, 32)),
        "text.layer.weight_s_channel": ("F32", (256,)),
        "text.layer.comfy_quant": ("U8", (len(json.dumps(marker)),)),
    }
    if name == "w4a8":
        expected["text.layer.weight_codebook"] = ("F32", (16,))

    entries = plan_packed_entries(KEY, form, SHAPE, transform)

    assert {key: (word, size) for key, word, size in entries} == expected
    assert build_marker(form, SHAPE, transform) == marker


@pytest.mark.parametrize(
    "transform",
    [PLAIN, QuaRot(64).fit(torch.empty(1, 512)), make_factor_transform(512)],
    ids=["none", "quarot", "smoothquant"],
)
def test_codes_are_written_under_convrot_alone(transform: OutlierTransform) -> None:
    with pytest.raises(ValueError, match="is always rotated by outlier=convrot, not"):
        plan_packed_entries(KEY, FORMATS["w4a8"], SHAPE, transform)


@pytest.mark.parametrize(
    "form", [form for form in WRITABLE_FORMATS if not form.is_grouped], ids=lambda form: form.name
)
def test_entries_of_each_format(form: WeightFormat) -> None:
    word, codes, scale_word, scale, said = NAMES[form.name]
    transform = next(iter(make_transforms(form, 512).values()))
    expected = {"text.layer.weight": (word, codes)}
    if scale is not None:
        expected["text.layer.weight_scale"] = (scale_word, scale)
        expected["text.layer.comfy_quant"] = ("U8", [len(json.dumps(said))])
    if form.name == "nvfp4":
        expected["text.layer.weight_scale_2"] = ("F32", [])

    assert {
        key: (word, list(size)) for key, word, size in plan_packed_entries(KEY, form, SHAPE, transform)
    } == expected
    assert build_marker(form, SHAPE, transform) == (said or {})


def test_nvfp4_marker_byte_for_byte() -> None:
    form = FORMATS["nvfp4"]
    found = collect_tensors(KEY, form.quantize(randn(16, 16)), form, PLAIN)["text.layer.comfy_quant"]

    assert isinstance(found, bytes)
    assert len(found) == 19
    assert (found[0], found[-1]) == (0x7B, 0x7D)
    assert found == b'{"format": "nvfp4"}'


# readers that go by the header alone know these lengths
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("int8_tensorwise", 29),
        ("int8_rowwise", 46),
        ("int8_blockwise", 47),
        ("mxfp8", 19),
        ("float8_e4m3fn", 27),
        ("float8_e5m2", 25),
        ("float8_e4m3fn_rowwise", 35),
    ],
)
def test_marker_lengths(name: str, length: int) -> None:
    assert len(json.dumps(build_marker(FORMATS[name], SHAPE, PLAIN))) == length


@pytest.mark.parametrize(
    ("name", "shape", "padded"),
    [
        ("mxfp8", (32, 64), False),
        ("mxfp8", (33, 64), True),
        ("mxfp8", (32, 48), True),
        ("nvfp4", (16, 48), False),
        ("nvfp4", (17, 48), True),
    ],
    ids=str,
)
def test_marker_holds_the_original_shape_where_it_is_padded(
    name: str, shape: tuple[int, int], padded: bool
) -> None:
    assert build_marker(FORMATS[name], shape, PLAIN) == {"format": name} | (
        {"orig_shape": list(shape)} if padded else {}
    )


def test_convrot_is_read_back_with_the_regular_matrix(tmp_path: Path) -> None:
    form, w = FORMATS["int8_convrot"], randn(8, 48)
    transform = ConvRot(form.get_rotation_group_size(48)).fit(w)
    weight = form.quantize(transform.transform_weight(w))
    rotated = w.double().numpy().reshape(8, 3, 16) @ make_regular(16).T

    assert abs(weight.dequantize().double().numpy() - rotated.reshape(8, 48)).max() < 0.02
    assert build_marker(form, (8, 48), transform)["convrot_groupsize"] == 16


def test_factor_is_written_beside_the_weight() -> None:
    form, transform = FORMATS["nvfp4"], make_factor_transform(48)

    assert ("text.layer.pre_quant_scale", "F32", (48,)) in plan_packed_entries(KEY, form, (16, 48), transform)

    found = collect_tensors(KEY, form.quantize(randn(16, 48)), form, transform)

    assert torch.equal(found["text.layer.pre_quant_scale"], transform.factor)


# -- what cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["int8_tensorwise", "int8_blockwise", "float8_e4m3fn", "float8_e5m2_cast", "nvfp4"]
)
@pytest.mark.parametrize(
    "transform",
    [
        OutlierTransform("convrot", {"group_size": 16}, rotation=Rotation(regular_hadamard(16))),
        OutlierTransform("hadanorm", centered=True),
    ],
    ids=lambda t: t.method,
)
def test_rotation_that_no_marker_describes_raises(name: str, transform: OutlierTransform) -> None:
    message = (
        f"the marker of {name} cannot describe {transform.label}; int8 with a scale for each row can have it"
    )
    for call in (build_marker, lambda *given: plan_packed_entries(KEY, *given)):
        with pytest.raises(ValueError, match=message):
            call(FORMATS[name], (256, 256), transform)


@pytest.mark.parametrize("name", ["nvfp4_modelopt", "mxfp8_rows"])
def test_read_only_formats_cannot_be_written(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is read and never written"):
        plan_packed_entries(KEY, FORMATS[name], (256, 256), PLAIN)


def quantize_random(name: str) -> PackedWeight:
    return FORMATS[name].quantize(randn(128, 128))


WRONG: dict[str, tuple[str, Callable[[], PackedWeight]]] = {
    "other codes": ("float8_e5m2", lambda: quantize_random("float8_e4m3fn")),
    "one exponent": (
        "float8_e4m3fn",
        lambda: PackedWeight(
            torch.ones(1, 32).to(torch.float8_e4m3fn), torch.ones(1, 1).byte(), (1, 32), is_swizzled=False
        ),
    ),
    "other kind": ("float8_e4m3fn", lambda: quantize_random("mxfp8")),
    "a scale for each row": ("int8_tensorwise", lambda: quantize_random("int8_rowwise")),
    "one scale": ("int8_rowwise", lambda: quantize_random("int8_tensorwise")),
    "no scale": ("float8_e4m3fn", lambda: quantize_random("float8_e4m3fn_cast")),
    "a scale for a cast": ("float8_e4m3fn_cast", lambda: quantize_random("float8_e4m3fn")),
    "scales in rows": ("mxfp8", lambda: replace(quantize_random("mxfp8"), is_swizzled=False)),
    "the other half first": ("nvfp4", lambda: replace(quantize_random("nvfp4"), high_nibble_first=False)),
    "no global scale": ("nvfp4", lambda: replace(quantize_random("nvfp4"), global_scale=None)),
    "another shape": ("nvfp4", lambda: replace(quantize_random("nvfp4"), shape=(100, 128))),
}


@pytest.mark.parametrize(("name", "make"), WRONG.values(), ids=WRONG)
def test_weight_in_another_format_raises(name: str, make: Callable[[], PackedWeight]) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^text.layer.weight cannot be written as {name}: its qdata, .*, is in another format$",
    ):
        collect_tensors(KEY, make(), FORMATS[name], PLAIN)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("int8_rowwise", lambda scale: scale[:, 0].bfloat16()),
        ("int8_tensorwise", lambda scale: scale.reshape(1, 1).half()),
        ("float8_e4m3fn_rowwise", lambda scale: scale[:, None]),
        ("mxfp8", lambda scale: scale.view(torch.float8_e8m0fnu)),
        ("nvfp4", lambda scale: scale.view(torch.uint8)),
        ("nvfp4", lambda scale: scale.flatten()),
    ],
)
def test_scales_get_the_dtype_and_shape_of_the_format(name: str, change) -> None:
    form, weight = FORMATS[name], quantize_random(name)
    weight = replace(weight, scale=change(weight.scale))
    key, word, shape = next(
        entry
        for entry in plan_packed_entries(KEY, form, weight.shape, PLAIN)
        if entry[0].endswith(".weight_scale")
    )
    found = collect_tensors(KEY, weight, form, PLAIN)[key]

    assert found.shape == shape
    assert str(found.dtype) == f"torch.{DTYPES[word][1]}"

    numbers = weight.scale.float() if word == "F32" else weight.scale.view(found.dtype)

    assert torch.equal(found.float().flatten(), numbers.float().flatten())
