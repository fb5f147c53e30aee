"""Layers of checkpoints: every kind gives the weight that its formula gives, and what cannot be trusted is
refused by name.
"""

import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.checkpoint_files import DRAFTS, MISTAKES
from checkpoints.drafts.changes import draft_with_marker, merge_layers
from checkpoints.drafts.draft import LAYER, CheckpointDraft, K, N
from checkpoints.drafts.floats import draft_plain_float
from checkpoints.drafts.fp8 import draft_fp8
from checkpoints.drafts.int8 import ROW, TENSOR, draft_int8, draft_rowwise
from checkpoints.drafts.numbers import decode_fp8_byte, make_regular, rotate_groups
from checkpoints.drafts.transformed import draft_quip
from safetensors.torch import save_file
from support.compare import assert_close
from support.helpers import randn, shipped
from torch import Tensor

from int8run.backends.reference import Reference
from int8run.checkpoints.comfy_int8 import build_marker
from int8run.checkpoints.detect import is_scaled_fp8_marker, read_layers
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError, Int8RunError
from int8run.kernels.dequantize.reference import dequantize_fp8, dequantize_int8
from int8run.layers.grouped_int8_linear import make_int8_linear
from int8run.layers.int8_linear import QuantizedLayer
from int8run.outlier.base import LayerStatistics, OutlierMethod
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.weight import quantize_weight

SOME_ROWS = [slice(0, 1), slice(1, 6), slice(5, None), slice(None, 3), slice(4, 4)]
METHODS: dict[str, OutlierMethod] = shipped("outlier")


def open_draft(draft: CheckpointDraft, folder: Path) -> TensorFiles:
    return TensorFiles.open(draft.write(folder / "m.safetensors"))


def read_draft(
    draft: CheckpointDraft, folder: Path, prefix: str = ""
) -> tuple[TensorFiles, dict[str, CheckpointLayer]]:
    files = open_draft(draft, folder)
    return files, read_layers(files, prefix)


def get_real_weight(draft: CheckpointDraft, name: str = LAYER) -> Tensor:
    return torch.from_numpy(draft.real[name])


def get_model_shape(layer: CheckpointLayer, weight: Tensor) -> tuple[int, int] | None:
    return (weight.shape[0], weight.shape[1]) if layer.is_padded else None


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
def test_each_draft_is_read_as_its_weight(make: Any, tmp_path: Path) -> None:
    draft = make()
    files, layers = read_draft(draft, tmp_path)

    assert list(layers) == [LAYER]

    layer, weight = layers[LAYER], get_real_weight(draft)

    assert {name: getattr(layer, name) for name in draft.expected} == draft.expected
    assert set(layer.sibling_keys) == {key for key in draft.tensors if key.startswith(LAYER)} - {
        f"{LAYER}.weight",
        f"{LAYER}.bias",
    }

    shape = get_model_shape(layer, weight)
    whole = layer.read_weight(files, shape=shape)

    assert whole.dtype == torch.float32
    assert_close("weight", whole, weight, 1e-6)

    for rows in SOME_ROWS if len(weight) > 6 else [slice(0, 1), slice(1, 1)]:
        part = weight[rows]
        found = layer.read_weight(files, rows, shape)
        if part.numel():
            assert_close(f"rows {rows}", found, part, 1e-6)
        assert found.shape == part.shape


@pytest.mark.parametrize("make", DRAFTS.values(), ids=DRAFTS)
def test_int8_layers_are_read_exactly_or_refused(make: Any, tmp_path: Path) -> None:
    draft = make()
    files, layers = read_draft(draft, tmp_path)
    layer = layers[LAYER]

    if not layer.is_usable_as_is:
        with pytest.raises(
            ValueError, match=rf"the numbers of {LAYER} .* cannot be used as they are; use `read_weight`"
        ):
            layer.read_int8_layer(files)
        return

    stored = np.frombuffer(draft.tensors[f"{LAYER}.weight"][2], "i1").reshape(
        draft.tensors[f"{LAYER}.weight"][1]
    )

    for rows in (slice(None), slice(1, 6) if len(stored) > 6 else slice(0, 1)):
        found = layer.read_int8_layer(files, rows)
        count = len(stored[rows])
        integers = found.weight.codes if isinstance(found.weight, GroupedWeight) else found.weight.qdata

        assert integers.dtype == torch.int8
        assert torch.equal(integers, torch.tensor(stored[rows]))
        assert found.weight.scale.shape == (count, 1)
        assert found.weight.scale.dtype == torch.float32
        assert found.weight.scale.is_contiguous()
        assert found.bias is None
        assert_close(
            "weight",
            found.transform.restore_weight(found.weight.dequantize()),
            get_real_weight(draft)[rows],
            1e-6,
        )


@pytest.mark.parametrize(
    "name", [name for name, make in DRAFTS.items() if make().expected["is_usable_as_is"]]
)
def test_exact_layer_computes_the_real_product(name: str, tmp_path: Path) -> None:
    # the transform's other side, on the input, must be the one that the file's maker means
    draft = DRAFTS[name]()
    files, layers = read_draft(draft, tmp_path)
    layer = layers[LAYER].read_int8_layer(files)
    x = randn(3, 5, layers[LAYER].columns, seed=3)
    y = make_int8_linear(layer, Reference(), torch.float32)(x)

    assert_close("product", y, x.double() @ get_real_weight(draft).T, 0.02)


def test_drafts_cover_every_storage_dtype_and_granularity() -> None:
    # else the tests above could have lost some
    expected = [make().expected for make in DRAFTS.values()]
    assert {(e["storage_dtype"], e["granularity"]) for e in expected} == {
        *(
            ("int8", granularity)
            for granularity in ("tensor", "row", "group", "grid", "block3d", "transposed")
        ),
        *(("fp8", granularity) for granularity in ("tensor", "row", "grid", "block3d", "")),
        ("float", ""),
        ("nvfp4", "block"),
        ("mxfp8", "block"),
        ("w4a8", "group"),
        ("w6a8", "group"),
    }
    assert {e["outlier_method"] for e in expected if e["is_usable_as_is"]} == {
        "none",
        "convrot",
        "quarot",
        "hadanorm",
        "smoothquant",
    }


@pytest.mark.parametrize(
    "name",
    [
        "tensor []",
        "row [N]",
        "grid",
        "grid of one column",
        "block3d",
        "group",
        "fp8 grid",
        "fp8 row",
        "fp8 block3d",
    ],
)
def test_read_weight_equals_the_kernels_reference(name: str, tmp_path: Path) -> None:
    files, layers = read_draft(DRAFTS[name](), tmp_path)
    layer = layers[LAYER]
    definition = dequantize_fp8 if layer.storage_dtype == "fp8" else dequantize_int8
    expected = definition(files.read(layer.key), files.read(layer.part_keys["scale"]))

    assert torch.equal(layer.read_weight(files), expected)
    assert torch.equal(layer.read_weight(files, slice(3, 7)), expected[3:7])


def test_draft_of_published_vectors() -> None:
    # formats.md section 10 and 3.2, on the generator's own matrices
    def row(*x):
        return np.array([x], dtype=np.float64)

    assert rotate_groups(row(1, 0, 0, 0), make_regular(4)).tolist() == [[0.5, 0.5, 0.5, -0.5]]
    assert rotate_groups(row(1, 2, 3, 4), make_regular(4)).tolist() == [[1, 2, 3, 4]]
    assert "".join("+" if x > 0 else "-" for x in make_regular(16)[0]) == "+++-+++-+++----+"
    assert set(np.abs(make_regular(16)[0]).tolist()) == {0.25}
    assert [decode_fp8_byte(b, 4) for b in (0x7E, 0x38, 0xB8, 0x01)] == [448, 1, -1, 2.0**-9]
    assert [decode_fp8_byte(b, 5) for b in (0x7B, 0x3C)] == [57344, 1]


def test_published_vectors_are_read(tmp_path: Path) -> None:
    draft = CheckpointDraft()
    draft.put("a.weight", "I8", [[64, -127, 32, 0]])
    draft.put("a.weight_scale", "F32", [[2 / 127]])
    draft.put_marker("a.comfy_quant", {"format": "int8_tensorwise"})
    # 1, 0, 0, 0 rotated
    draft.put("b.weight", "I8", [[1, 1, 1, -1]])
    draft.put("b.weight_scale", "F32", [[0.5]])
    draft.put_marker("b.comfy_quant", {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4})
    files, layers = read_draft(draft, tmp_path)

    assert_close("a", layers["a"].read_weight(files), torch.tensor([[1, -2, 0.5, 0]]), 0.01)
    assert layers["b"].read_weight(files).tolist() == [[1, 0, 0, 0]]
    assert draft.tensors["a.comfy_quant"][1] == (29,), "formats.md 1.3"


def test_published_header_is_read(tmp_path: Path) -> None:
    # formats.md section 11, smaller
    marker = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    draft = CheckpointDraft(metadata={"format": "pt"})
    draft.put_marker("blocks.0.ffn.0.comfy_quant", marker)
    draft.put_int8("blocks.0.ffn.0.weight", 8, 512)
    draft.put_scale("blocks.0.ffn.0.weight_scale", 8, 1)
    draft.put("blocks.0.ffn.0.bias", "BF16", np.ones(8))

    assert draft.tensors["blocks.0.ffn.0.comfy_quant"][1] == (72,)

    _, layers = read_draft(draft, tmp_path)

    assert layers["blocks.0.ffn.0"].label == "int8_tensorwise, row, convrot 256"
    assert layers["blocks.0.ffn.0"].is_usable_as_is


# -- whole files -----------------------------------------------------------------------------------


def draft_full_checkpoint() -> CheckpointDraft:
    """A full checkpoint with several kinds: a denoiser below a prefix, a text encoder and a VAE."""
    whole = DRAFTS["convrot 16"]().add_prefix("model.diffusion_model.")
    for name, kind in (("blocks.1.k", "fp8"), ("blocks.2.v", "bf16")):
        other = DRAFTS[kind]()
        whole.tensors |= {
            f"model.diffusion_model.{name}{key.removeprefix(LAYER)}": value
            for key, value in other.tensors.items()
        }
        whole.real[f"model.diffusion_model.{name}"] = other.real[LAYER]
    whole.put(
        "model.diffusion_model.norm.scale", "F32", np.full(4, 2.0)
    )  # a parameter, no scale of the weight
    whole.put("model.diffusion_model.norm.weight", "F32", np.ones(4))
    whole.put("model.diffusion_model.__index_timestep_zero__", "F32", np.ones(0))
    whole.put("vae.conv.weight", "F32", np.ones((2, 2, 3, 3)))
    whole.put("text_encoders.t5.tokens.weight", "F32", np.ones((4, 4)))
    whole.put_marker("text_encoders.t5.spiece_model", "tokens")
    return whole


def test_full_checkpoint_gives_the_layers_below_the_prefix(tmp_path: Path) -> None:
    draft = draft_full_checkpoint()
    draft.put_header({f"model.diffusion_model.{LAYER}": {"format": "int8_tensorwise", "group_size": 1}})
    draft.put_marker("text_encoders.t5.bad.comfy_quant", "{")  # what nobody asks for may be damaged
    draft.put("text_encoders.t5.q.SCB", "F32", 1)
    draft.put("text_encoders.t5.half.weight_scale", "F32", 1)
    draft.put("text_encoders.t5.table", "I8", np.ones(3))
    files, layers = read_draft(draft, tmp_path, "model.diffusion_model.")

    assert {name: layer.storage_dtype for name, layer in layers.items()} == {
        f"model.diffusion_model.{LAYER}": "int8",
        "model.diffusion_model.blocks.1.k": "fp8",
        "model.diffusion_model.blocks.2.v": "float",
    }
    for name, layer in layers.items():
        assert_close(name, layer.read_weight(files), get_real_weight(draft, name), 1e-6)
    with pytest.raises(FileError, match=r"is a bitsandbytes file"):
        read_layers(files)


def test_fp8_weights_of_any_shape_are_scaled(tmp_path: Path) -> None:
    draft = CheckpointDraft()
    expected = {
        "conv": draft.put_fp8("conv.weight", "F8_E4M3", 4, 3, 2, 2) * draft.put_scale("conv.scale_weight"),
        "rows": draft.put_fp8("rows.weight", "F8_E4M3", 4, 3, 2)
        * draft.put_scale("rows.weight_scale", 4, 1, 1),
        "norm": draft.put_fp8("norm.weight", "F8_E5M2", 5),
        "scaled": draft.put_fp8("scaled.weight", "F8_E5M2", 5) * draft.put_scale("scaled.weight_scale", 5),
    }
    draft.put_fp8("norm.bias", "F8_E5M2", 5)
    files, layers = read_draft(draft, tmp_path)

    assert set(layers) == set(expected)
    for name, weight in expected.items():
        assert_close(name, layers[name].read_weight(files), torch.from_numpy(weight), 1e-6)
        assert_close(name, layers[name].read_weight(files, slice(1, 3)), torch.from_numpy(weight[1:3]), 1e-6)
    assert (layers["conv"].rows, layers["conv"].columns, layers["norm"].columns) == (4, 12, 1)


def test_scale_of_1_beside_a_float_is_allowed(tmp_path: Path) -> None:
    # ComfyUI's conversion of legacy files leaves such
    draft = DRAFTS["bf16"]()
    draft.put(f"{LAYER}.weight_scale", "F32", 1)
    draft.put(f"{LAYER}.input_scale", "F32", 1)
    _, layers = read_draft(draft, tmp_path)

    assert layers[LAYER].storage_dtype == "float"
    assert layers[LAYER].sibling_keys == (
        f"{LAYER}.weight_scale",
        f"{LAYER}.input_scale",
    )


def test_fp8_without_scale_among_scaled_ones_is_a_cast(tmp_path: Path) -> None:
    draft = merge_layers(DRAFTS["fp8 legacy"](), DRAFTS["fp8 cast"]())
    _, layers = read_draft(draft, tmp_path)

    assert [layer.label for layer in layers.values()] == [
        "float8_e4m3fn scaled, tensor",
        "float8_e4m3fn cast",
    ]


def test_scaled_fp8_markers_are_recognized() -> None:
    assert all(is_scaled_fp8_marker(key) for key in ("scaled_fp8", "model.diffusion_model.scaled_fp8"))
    assert not is_scaled_fp8_marker("blocks.scaled_fp8.weight")
    assert not is_scaled_fp8_marker("unscaled_fp8")


def test_layers_in_several_files_are_read(tmp_path: Path) -> None:
    first, second = DRAFTS["row in the header"](), DRAFTS["convrot in the header"]()
    second.tensors = {key.replace("blocks.0", "blocks.1"): value for key, value in second.tensors.items()}
    second.metadata = {key: value.replace("blocks.0", "blocks.1") for key, value in second.metadata.items()}
    scale = second.tensors.pop("blocks.1.q.weight_scale")
    first.tensors["blocks.1.q.weight_scale"] = scale
    drafts = {"m-00001-of-00002.safetensors": first, "m-00002-of-00002.safetensors": second}
    for name, draft in drafts.items():
        draft.write(tmp_path / name)
    (tmp_path / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": {key: name for name, draft in drafts.items() for key in draft.tensors}})
    )
    files = TensorFiles.open(tmp_path)
    layers = read_layers(files)

    assert [layer.outlier_method for layer in layers.values()] == ["none", "convrot"]
    assert_close("second", layers["blocks.1.q"].read_weight(files), get_real_weight(second), 1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("width", [7, 64, 256])
def test_layers_that_int8run_writes_are_read_back(method: OutlierMethod, width: int, tmp_path: Path) -> None:
    weight, sample = randn(6, width, seed=width), randn(2, 6, width, seed=1)
    plain = METHODS["none"]
    method = plain if method.unsupported_reason(width) else method
    transform = method.fit(weight, LayerStatistics(sample, sample.abs().amax((0, 1)), weight.abs().amax(0)))
    layer = QuantizedLayer(quantize_weight(transform.transform_weight(weight)), transform, randn(6))
    tensors = {
        "q.weight": layer.weight.qdata,
        "q.weight_scale": layer.weight.scale,
        "q.bias": layer.bias,
        "norm.weight": randn(3),
    }
    tensors["q.comfy_quant"] = torch.tensor(
        list(json.dumps(build_marker(transform)).encode()), dtype=torch.uint8
    )
    if transform.factor is not None:
        tensors["q.pre_quant_scale"] = transform.factor
    save_file(tensors, tmp_path / "m.safetensors")
    files = TensorFiles.open(tmp_path / "m.safetensors")
    stored = read_layers(files)["q"]

    assert stored.is_usable_as_is
    assert (stored.outlier_method, stored.outlier_settings) == (
        method.name,
        method.get_settings(width),
    )

    back = stored.read_int8_layer(files)

    assert torch.equal(back.weight.qdata, layer.weight.qdata)
    assert torch.equal(back.weight.scale, layer.weight.scale)
    assert back.transform.has_same_input_transform(transform)
    assert back.transform.label == transform.label
    assert torch.equal(stored.read_weight(files), transform.restore_weight(layer.weight.dequantize()))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_raises_by_name(
    make: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = open_draft(make(), tmp_path)
    weights = [key for key in files if key.endswith(".weight")]
    reads = []
    original = TensorFiles.read
    monkeypatch.setattr(
        TensorFiles, "read", lambda self, key, rows=None: reads.append(key) or original(self, key, rows)
    )

    with pytest.raises(FileError, match=words) as raised:
        read_layers(files)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert not set(reads) & set(weights), "no weight is read before everything is known to be right"


def test_read_layers_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, reads = open_draft(draft_full_checkpoint(), tmp_path), []
    original = TensorFiles.read
    monkeypatch.setattr(
        TensorFiles, "read", lambda self, key, rows=None: reads.append(key) or original(self, key, rows)
    )
    read_layers(files)

    assert reads
    assert not [key for key in reads if key.endswith(".weight")]


def test_padded_weight_needs_the_models_shape(tmp_path: Path) -> None:
    files, layers = read_draft(draft_quip(12, 24), tmp_path)
    with pytest.raises(
        FileError,
        match=rf"{LAYER} is padded to \[16, 32\] and does not say to what shape it is cut; the model",
    ):
        layers[LAYER].read_weight(files)
    for wrong in ((8, 24), (12, 16), (17, 24), (12, 0)):
        with pytest.raises(
            FileError,
            match=(
                rf"{LAYER} has the shape \[16, 32\], the model's is "
                rf"\[{wrong[0]}, {wrong[1]}\]; the file is for another model"
            ),
        ):
            layers[LAYER].read_weight(files, shape=wrong)


def test_weight_of_another_shape_raises(tmp_path: Path) -> None:
    files, layers = read_draft(draft_rowwise(), tmp_path)

    with pytest.raises(
        FileError,
        match=rf"{LAYER} has the shape \[12, 64\], the model's is \[12, 32\]; the file is for another model",
    ):
        layers[LAYER].read_weight(files, shape=(12, 32))
    assert layers[LAYER].read_weight(files, shape=(N, K)).shape == (N, K)
    for rows in (slice(0, N + 1), slice(-1, None), slice(0, N, 2)):
        for way in (layers[LAYER].read_weight, layers[LAYER].read_int8_layer):
            with pytest.raises(ValueError, match=r"cannot be read"):
                way(files, rows)


def test_large_rotation_groups_are_read_as_floats(tmp_path: Path) -> None:
    rotated = {**TENSOR, "convrot": True, "convrot_groupsize": 4096}
    files, layers = read_draft(draft_int8((1, 1), "tensor", rotated, weight=(1, 4096)), tmp_path)

    assert not layers[LAYER].is_usable_as_is
    assert layers[LAYER].read_weight(files).shape == (1, 4096)


CONFIGS = {
    "sdnq": {"quantization_config": {"quant_method": "sdnq"}},
    "alone": {"quant_method": "bitsandbytes"},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["config.json", "quantization_config.json"])
def test_config_beside_the_file_names_its_program(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(config))
    method = (config.get("quantization_config") or config)["quant_method"]

    with pytest.raises(
        FileError,
        match=rf"is a (SDNQ|bitsandbytes|torchao) file \(the config beside it says quant_method {method}\)",
    ):
        read_draft(draft_rowwise(), tmp_path)

    read_draft(draft_plain_float(), tmp_path)  # a float file is another


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"quantization_config": 5}',
        '{"quantization_config": {"quant_method": "fp8"}}',
        '{"quant_method": 5}',
    ],
)
def test_config_of_another_kind_is_ignored(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    read_draft(draft_rowwise(), tmp_path)


# -- what is said ----------------------------------------------------------------------------------

BLOCKWISE, FP8_BLOCKWISE = "int8_blockwise", "float8_e4m3fn_blockwise"
WARNED = {
    "blocks, but rows": (
        lambda: draft_with_marker({"format": BLOCKWISE, "group_size": 1}),
        "1 layer is labeled int8_blockwise, with scales by row",
    ),
    "one scale, but blocks": (
        lambda: draft_int8((3, 16), "grid", TENSOR, block=(4, 4), label="int8_tensorwise"),
        "1 layer is labeled int8_tensorwise, with scales by grid",
    ),
    "per_row, but one": (
        lambda: draft_int8((), "tensor", ROW),
        "1 layer is labeled per_row=True, with scales by tensor",
    ),
    "not per_row, but rows": (
        lambda: draft_with_marker({**TENSOR, "per_row": False}),
        "labeled per_row=False, with scales by row",
    ),
    "fp8 blocks, but rows": (
        lambda: draft_fp8((N,), "row", marker={"format": FP8_BLOCKWISE, "group_size": 64}),
        "labeled float8_e4m3fn_blockwise, with scales by row",
    ),
    "rotation lost": (
        DRAFTS["convrot lost in the header"],
        rf"does not mention the rotation of 1 layer \(first: {LAYER}\), the markers of the layers do",
    ),
}


@pytest.mark.parametrize(("make", "words"), WARNED.values(), ids=WARNED)
def test_wrong_label_warns_and_the_shape_counts(
    make: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = make()
    files, layers = read_draft(draft, tmp_path)

    assert_close("weight", layers[LAYER].read_weight(files), get_real_weight(draft), 1e-6)

    (record,) = caplog.records

    assert record.levelno == logging.WARNING
    assert re.search(words, record.getMessage()), record.getMessage()


@pytest.mark.parametrize(
    "name", [name for name in DRAFTS if not name.startswith("convrot") or "lost" not in name]
)
def test_valid_files_log_nothing(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_draft(DRAFTS[name](), tmp_path)
    assert not caplog.records


# -- chance ----------------------------------------------------------------------------------------


def move_tensor(draft: CheckpointDraft, key: str, chance: random.Random) -> None:
    suffixes = [
        "weight",
        "weight_scale",
        "scale",
        "comfy_quant",
        "pre_quant_scale",
        "quip_s_u",
        "hadanorm_sigma",
        "bias",
    ]
    suffix = chance.choice(suffixes)
    draft.tensors[f"{LAYER}.{suffix}"] = draft.tensors.pop(key)


def flip_bit(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def damage(draft: CheckpointDraft, chance: random.Random) -> None:
    """One tensor is lost, has another name, shape, content or dtype."""
    key = chance.choice(list(draft.tensors))
    dtype, shape, data = draft.tensors[key]
    way = chance.choice(["lose", "move", "reshape", "flip", "retype"])
    if way == "lose":
        del draft.tensors[key]
    elif way == "move":
        move_tensor(draft, key, chance)
    elif way == "reshape":
        draft.tensors[key] = dtype, tuple(chance.sample(shape, len(shape))), data
    elif way == "flip" and data:
        draft.tensors[key] = dtype, shape, flip_bit(data, chance)
    else:
        other_dtype = chance.choice(["I8", "U8", "F8_E4M3", "F8_E5M2", "BOOL"])
        draft.tensors[key] = other_dtype, (len(data),), data


def read_all(draft: CheckpointDraft, folder: Path) -> None:
    """Everything that a run reads of the file."""
    files, layers = read_draft(draft, folder)
    real = torch.from_numpy(draft.real[LAYER])
    for layer in layers.values():
        found = layer.read_weight(files, shape=get_model_shape(layer, real))

        assert found.shape[0] in (layer.rows, real.shape[0])

        if layer.is_usable_as_is:
            layer.read_int8_layer(files)


@pytest.mark.parametrize("seed", range(4))
def test_any_change_of_a_file_is_read_or_raises(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    names = list(DRAFTS)
    count = 0
    for _ in range(100):
        draft = DRAFTS[chance.choice(names)]()
        damage(draft, chance)
        try:
            read_all(draft, tmp_path)
        except Int8RunError as error:
            assert "\n" not in str(error)
        else:
            count += 1

    assert 0 < count < 90, "changes that all fail, or none, try nothing"


# -- another reader --------------------------------------------------------------------------------

# what ComfyUI itself computes with: its library takes the tensors and the fields of the marker as they are in
# the file
COMFY = [
    "tensor []",
    "row [N, 1]",
    "row [N, 1] of a square",
    "bf16 scale with a marker",
    "convrot 4",
    "convrot 16",
    "convrot 64",
    "convrot 1024",
]


@pytest.mark.parametrize("name", COMFY)
def test_int8_weight_equals_comfy_kitchens(name: str, tmp_path: Path) -> None:
    layout = pytest.importorskip("comfy_kitchen.tensor").TensorWiseINT8Layout
    files, layers = read_draft(DRAFTS[name](), tmp_path)
    layer = layers[LAYER]
    codes, scale = files.read(layer.key), files.read(layer.part_keys["scale"]).float()
    said = json.loads(bytes(files.read(layer.part_keys["marker"]).tolist()))
    rotation = {key: said[key] for key in ("convrot", "convrot_groupsize") if key in said}
    params = layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(codes.shape), **rotation)

    assert_close(name, layer.read_weight(files), layout.dequantize(codes, params), 1e-6)


@pytest.mark.parametrize("name", ["fp8", "fp8 e5m2", "fp8 legacy"])
def test_fp8_weight_equals_comfy_kitchens(name: str, tmp_path: Path) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    files, layers = read_draft(DRAFTS[name](), tmp_path)
    layer = layers[LAYER]
    theirs = kitchen.dequantize_per_tensor_fp8(
        files.read(layer.key), files.read(layer.part_keys["scale"]), torch.float32
    )

    assert_close(name, layer.read_weight(files), theirs, 1e-6)


@pytest.mark.parametrize("group", [16, 64])
def test_headers_of_two_shards_say_the_same_of_a_layer(tmp_path: Path, group: int) -> None:
    weight = torch.ones(4, 64, dtype=torch.int8)
    shards = {"a.safetensors": {"a.weight": weight}, "b.safetensors": {"a.weight_scale": torch.ones(4, 1)}}
    for (name, tensors), said in zip(shards.items(), (16, group), strict=True):
        fields = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": said}
        about = {"_quantization_metadata": json.dumps({"layers": {"a": fields}})}
        save_file(tensors, tmp_path / name, about)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    index.write_text(json.dumps({"weight_map": weight_map}))

    with TensorFiles.open(index) as files:
        if group == 16:
            assert read_layers(files)["a"].label == "int8_tensorwise, row, convrot 16"
            return
        with pytest.raises(
            FileError, match=r"layer a, says otherwise than the header of another shard; the "
        ):
            read_layers(files)
