"""Quantized layers whose numbers stay as they are: their words, codes and scales; and who made mxfp8 and
nvfp4 of silent files.
"""

import json
import logging
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.checkpoint_files import DRAFTS, MISTAKES
from checkpoints.drafts.blocks import draft_ambiguous_blocks, draft_blocks, put_block_scales, swizzle
from checkpoints.drafts.changes import draft_with_marker, drop_tensors, merge_layers
from checkpoints.drafts.draft import LAYER, CheckpointDraft, K, N
from checkpoints.drafts.floats import draft_float
from checkpoints.drafts.fp8 import draft_fp8
from checkpoints.drafts.grouped import GROUPED_DRAFTS
from checkpoints.drafts.int8 import ROW, TENSOR, draft_int8, draft_rowwise
from checkpoints.drafts.numbers import make_regular
from checkpoints.drafts.transformed import draft_rotated
from checkpoints.mistakes.markers import GROUP
from checkpoints.test_detect import get_model_shape, get_real_weight, open_draft, read_draft
from support.compare import assert_close
from torch import nn

from int8run.checkpoints.declared_format import AUTO, DeclaredFormat
from int8run.checkpoints.detect import get_logical_shapes, read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.unsupported import READERS
from int8run.config.run_spec import AutoFamily
from int8run.errors import ConfigError, FileError
from int8run.models.resolve_weights import ResolvedWeights
from int8run.pipeline.checkpoint_weights import FileWeights
from int8run.tasks import denoiser_checkpoint, inspect_checkpoint, inspect_file

NVFP4, MXFP8 = {"format": "nvfp4"}, {"format": "mxfp8"}

# -- words -----------------------------------------------------------------------------------------

DRAFTS_BY_FORMAT = {
    "int8_tensorwise": ["tensor []", "tensor [1]", "tensor [1, 1]", "one row", "lightx2v comfy mode"],
    "int8_rowwise": [
        "row [N, 1]",
        "row [N]",
        "row [N] of a square",
        "row [N, 1] of a square",
        "one column",
        "row in the header",
        "axiswise",
        "bf16 scale with a marker",
        "embedding's padding",
        "doubled braces",
        "orig_dtype",
        "quarot false",
        "convrot false",
        "smoothed",
        "lightx2v bf16",
        "lightx2v f16",
        "transposed",
    ],
    "int8_convrot": [
        "convrot 16",
        "convrot 4",
        "convrot 64",
        "convrot 256 by default",
        "convrot 1024",
        "convrot of a tensor scale",
        "convrot in params",
        "convrot in the header",
        "convrot lost in the header",
        "convrot's size lost in the header",
        "quarot, pre-native",
        "convrot, pre-native",
        "smoothed and rotated",
    ],
    "int8_blockwise": [
        "grid",
        "grid in params",
        "grid without its size",
        "grid of one column",
        "grid without a marker",
        "grid, the last blocks cut off",
        "grid, the last blocks cut off, marked",
        "grid of cut blocks that other blocks would fill",
    ],
    "int8_block3d": [
        "block3d",
        "block3d of one block",
        "block3d, the last block cut off",
        *(
            f"named {name}"
            for name in ("scale", "weight.scale", "weight.weight_scale", "scale_weight", "weight_scale_inv")
        ),
    ],
    "float8_e4m3fn": [
        "fp8",
        "fp8 in the header",
        "fp8 legacy",
        "fp8 legacy, empty marker",
        "fp8 smoothed",
    ],
    "float8_e5m2": ["fp8 e5m2", "fp8 e5m2 with the label of e4m3"],
    "float8_e4m3fn_cast": ["fp8 cast"],
    "float8_e5m2_cast": ["fp8 cast e5m2"],
    "float8_e4m3fn_rowwise": ["fp8 row", "fp8 row [N, 1]"],
    "float8_e4m3fn_blockwise": [
        "fp8 grid",
        "fp8 grid of transformers",
        "fp8 grid, the last blocks cut off",
    ],
    "float8_e4m3fn_block3d": ["fp8 block3d", "fp8 block3d by its name"],
    "nvfp4": [
        "nvfp4",
        "nvfp4 in the header",
        "nvfp4 with its shape",
        "nvfp4 without a marker",
        "nvfp4 of many tiles",
        "nvfp4 smoothed",
    ],
    "nvfp4_modelopt": ["nvfp4 by ModelOpt", "nvfp4 by ModelOpt, wide"],
    "mxfp8": [
        "mxfp8",
        "mxfp8 in the header",
        "mxfp8 in e8m0",
        "mxfp8 with all its rows",
        "mxfp8 of many tiles",
        "mxfp8 smoothed",
        "hybrid mxfp8",
    ],
    "mxfp8_rows": ["mxfp8 in rows"],
    # no word: of a matrix that ComfyUI does not know, of more than a rotation, of groups, float
    "": [
        "convrot 32 is Sylvester's",
        "quarot of 128",
        "block3d, rotated",
        "group",
        "group, the last one cut off",
        "toolkit quarot",
        "toolkit quarot, one scale",
        "toolkit quarot in half precision",
        "toolkit hadanorm",
        "toolkit sigma alone",
        "quip",
        "quip, padded",
        "quip, smoothed",
        "older quip",
        "older quip, dense",
        "bf16",
        "f16",
        "f32",
        "f64",
    ],
}
NOT_PACKABLE = {
    "group, the last one cut off",
    "grid, the last blocks cut off",
    "grid, the last blocks cut off, marked",
    "grid of cut blocks that other blocks would fill",
    "block3d, the last block cut off",
    "fp8 grid, the last blocks cut off",
    "quip",
    "quip, padded",
    "quip, smoothed",
    "older quip",
    "older quip, dense",
    "bf16",
    "f16",
    "f32",
    "f64",
}


def test_every_draft_has_a_format_name() -> None:
    assert sorted(name for names in DRAFTS_BY_FORMAT.values() for name in names) == sorted(
        set(DRAFTS) - set(GROUPED_DRAFTS)
    )


@pytest.mark.parametrize(
    ("word", "name"), [(word, name) for word, names in DRAFTS_BY_FORMAT.items() for name in names]
)
def test_packed_weight_holds_the_stored_numbers(word: str, name: str, tmp_path: Path) -> None:
    draft = DRAFTS[name]()
    files, layers = read_draft(draft, tmp_path)
    layer = layers[LAYER]

    assert (layer.format_name, layer.is_packable) == (word, name not in NOT_PACKABLE)

    if not layer.is_packable:
        with pytest.raises(
            ValueError, match=rf"the numbers of {LAYER} .* cannot stay as they are; use `read_weight`"
        ):
            layer.read_packed_weight(files)
        return

    weight = get_real_weight(draft)
    shape = get_model_shape(layer, weight)
    coded, transform = layer.read_packed_weight(files, shape)

    assert coded.storage_dtype == layer.storage_dtype
    assert coded.shape == tuple(weight.shape)
    assert_close(name, transform.restore_weight(coded.dequantize()), weight, 1e-6)

    stored = draft.tensors[f"{LAYER}.weight"][2]
    codes = coded.qdata.T if layer.granularity == "transposed" else coded.qdata

    assert codes.contiguous().view(torch.uint8).numpy().tobytes() == stored
    assert coded.qdata.is_contiguous()

    scales = [x for x in (coded.scale, coded.global_scale) if x is not None]

    assert (
        coded.nbytes
        == sum(x.nbytes for x in (coded.qdata, *scales))
        <= sum(len(data) for _, _, data in draft.tensors.values())
    )
    assert transform.method == layer.outlier_method
    assert transform.group_size == layer.rotation_group_size


BLOCKWISE = {"format": "int8_blockwise", "group_size": K}
# marker, shape of the weight, shape of its scale of one number -> the word; None: the label is wrong, which
# is said
ONE_SCALE = [
    (ROW, (1, K), (1, 1), "int8_rowwise"),
    (ROW, (1, K), (), "int8_rowwise"),
    (TENSOR, (1, K), (1, 1), "int8_tensorwise"),
    ({"convrot": False, "per_row": True}, (1, K), (1,), "int8_rowwise"),
    ({"format": "int8_axiswise"}, (1, K), (1,), "int8_rowwise"),
    (BLOCKWISE, (K, K), (1, 1), "int8_blockwise"),
    (BLOCKWISE, (1, K), (1, 1, 1), "int8_block3d"),
    (ROW, (N, K), (1, 1), None),
    (BLOCKWISE, (N, K), (), None),
    ({"format": "int8_blockwise"}, (K, K), (), None),
    (
        {**BLOCKWISE, "group_size": 128},
        (K, K),
        (),
        None,
    ),  # as convert_to_quant labels files that lost their labels
    ({**BLOCKWISE, "group_size": 128}, (1, K), (), None),
]


@pytest.mark.parametrize(("marker", "weight", "scale", "word"), ONE_SCALE, ids=str)
def test_marker_decides_the_granularity_of_one_int8_scale(
    marker: Any,
    weight: tuple[int, int],
    scale: tuple[int, ...],
    word: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    draft = draft_int8(scale, "tensor", marker, weight=weight)
    files, layers = read_draft(draft, tmp_path)

    assert layers[LAYER].format_name == (word or "int8_tensorwise")
    assert layers[LAYER].is_usable_as_is
    assert len(caplog.records) == (word is None)
    assert_close("weight", layers[LAYER].read_weight(files), get_real_weight(draft), 1e-6)


@pytest.mark.parametrize(
    ("word", "shape"),
    [
        ("float8_e4m3fn", (1, K)),
        ("float8_e4m3fn_rowwise", (1, K)),
        ("float8_e4m3fn_blockwise", (K, K)),
        ("float8_e4m3fn_block3d", (1, K)),
    ],
    ids=str,
)
def test_marker_decides_the_granularity_of_one_fp8_scale(
    word: str, shape: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = CheckpointDraft()
    weight = draft.put_fp8("q.weight", "F8_E4M3", *shape) * draft.put_scale("q.weight_scale", 1, 1)
    draft.put_marker("q.comfy_quant", {"format": word, "group_size": K})
    files, layers = read_draft(draft, tmp_path)

    assert layers["q"].format_name == word
    assert not caplog.records
    assert_close("weight", layers["q"].read_weight(files), torch.from_numpy(weight), 1e-6)


def test_large_rotation_groups_are_not_packable(tmp_path: Path) -> None:
    rotated = {**TENSOR, "convrot": True, "convrot_groupsize": 4096}
    _, layers = read_draft(draft_int8((1, 1), "tensor", rotated, weight=(1, 4096)), tmp_path)

    assert not layers[LAYER].is_packable


def test_only_non_empty_matrices_are_packable(tmp_path: Path) -> None:
    draft = CheckpointDraft()
    for name, shape in (("conv", (4, 3, 2, 2)), ("norm", (5,)), ("nothing", (0, 4))):
        draft.put_fp8(f"{name}.weight", "F8_E4M3", *shape, is_cast=True)
    _, layers = read_draft(draft, tmp_path)

    assert {name: layer.is_packable for name, layer in layers.items()} == {
        "conv": False,
        "norm": False,
        "nothing": False,
    }
    assert layers["norm"].format_name == "float8_e4m3fn_cast"


def test_e5m2_with_row_scales_has_no_format_name(tmp_path: Path) -> None:
    _, layers = read_draft(draft_fp8((N,), "row", dtype="F8_E5M2"), tmp_path)
    assert layers[LAYER].format_name == ""
    assert layers[LAYER].is_packable


# -- mxfp8 and nvfp4 -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4 of many tiles", "mxfp8 of many tiles"])
def test_rows_read_only_the_tiles_of_their_scales(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = DRAFTS[name]()
    files, layers = read_draft(draft, tmp_path)
    layer, weight = layers[LAYER], get_real_weight(draft)
    shape = (weight.shape[0], weight.shape[1])
    reads: dict[str, slice] = {}
    original = TensorFiles.read
    monkeypatch.setattr(
        TensorFiles,
        "read",
        lambda self, key, rows=None: reads.update({key: rows}) or original(self, key, rows),
    )

    for start, stop, first, last in (
        (0, 272, 0, 384),
        (120, 140, 0, 256),
        (128, 256, 128, 256),
        (127, 128, 0, 128),
        (256, 257, 256, 384),
        (271, 272, 256, 384),
    ):
        assert_close(
            f"{start}:{stop}", layer.read_weight(files, slice(start, stop), shape), weight[start:stop], 1e-6
        )
        assert (reads[f"{LAYER}.weight_scale"], reads[f"{LAYER}.weight"]) == (
            slice(first, last),
            slice(start, stop),
        )
    assert layer.read_weight(files, slice(272, 272), shape).shape == (0, shape[1])


def draft_one_block(
    kind: str, codes: bytes, scale: list[int], marker: object, tiles: bool, global_scale: float = 1.0
) -> CheckpointDraft:
    """One row of one block; the other rows are 0."""
    draft = CheckpointDraft()
    rows, width = (16, 8) if kind == "nvfp4" else (32, 32)
    draft.tensors[f"{LAYER}.weight"] = (
        "U8" if kind == "nvfp4" else "F8_E4M3",
        (rows, width),
        codes.ljust(rows * width, b"\0"),
    )
    put_block_scales(draft, np.resize(np.array(scale, np.uint8), (rows, 1)), tiles, "U8")
    if kind == "nvfp4":
        draft.put(f"{LAYER}.weight_scale_2", "F32", global_scale)
    if marker:
        draft.put_marker(f"{LAYER}.comfy_quant", marker)
    return draft


def test_published_vectors_of_block_formats(tmp_path: Path) -> None:
    # formats.md section 10
    for tiles, expected in ((True, [1, -6]), (False, [-6, 1])):
        files, layers = read_draft(
            draft_one_block("nvfp4", b"\x2f", [0x38], NVFP4 if tiles else None, tiles), tmp_path
        )
        assert layers[LAYER].read_weight(files)[0, :3].tolist() == [*expected, 0]

    draft = draft_one_block("mxfp8", b"\x38\xb8", [120], MXFP8, True)
    files, layers = read_draft(draft, tmp_path)

    assert layers[LAYER].read_weight(files)[0, :2].tolist() == [0.0078125, -0.0078125]

    draft.put_marker("m", NVFP4)

    assert draft.tensors["m"][1] == (19,)
    assert (draft.tensors["m"][2][0], draft.tensors["m"][2][-1]) == (
        0x7B,
        0x7D,
    )

    where = swizzle(np.arange(129 * 48, dtype=np.int64).reshape(129, 48).astype(np.uint8)).reshape(-1)

    for (r, c), at in {
        (0, 3): 3,
        (1, 0): 16,
        (32, 0): 4,
        (64, 0): 8,
        (96, 0): 12,
        (0, 4): 512,
        (128, 0): 6144,
    }.items():
        assert where[at] == (r * 48 + c) % 256


@pytest.mark.parametrize(("byte", "factor"), [(0x00, 0.0), (0x80, 0.0), (0x01, 2.0**-9), (0x7E, 448.0)])
def test_extreme_e4m3_scales_are_read(byte: int, factor: float, tmp_path: Path) -> None:
    files, layers = read_draft(draft_one_block("nvfp4", b"\x2f", [byte], NVFP4, True, 0.5), tmp_path)
    assert layers[LAYER].read_weight(files)[0, :2].tolist() == [0.5 * factor, -3 * factor]


@pytest.mark.parametrize("byte", [0, 1, 220])
def test_extreme_e8m0_scales_are_read(byte: int, tmp_path: Path) -> None:
    files, layers = read_draft(draft_one_block("mxfp8", b"\x38", [byte], MXFP8, True), tmp_path)
    assert layers[LAYER].read_weight(files)[0, 0].item() == math.ldexp(1, byte - 127)


def test_hybrid_mxfp8_logs_once_which_scales_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        read_draft(merge_layers(DRAFTS["hybrid mxfp8"](), DRAFTS["hybrid mxfp8"]()), tmp_path)
    (record,) = caplog.records

    assert (
        "2 mxfp8 layers have one more scale for the whole weight; the scales of the blocks are used"
        in record.getMessage()
    )


FITTING_SHAPES: dict[str, list[tuple[int, int]]] = {
    "nvfp4": [(12, 48), (12, 40), (12, 33)],
    "nvfp4 with its shape": [(12, 40)],
    "nvfp4 without a marker": [(16, 64), (16, 49), (1, 64)],
    "nvfp4 smoothed": [(12, 40)],
    "nvfp4 by ModelOpt": [(16, 64), (16, 50)],
    "nvfp4 by ModelOpt, wide": [(130, 48), (130, 33)],
    "mxfp8": [(12, 64), (12, 33)],
    "mxfp8 with all its rows": [(12, 64)],
    "fp8": [(12, 64)],
    "row [N, 1]": [(12, 64)],
    "quip, padded": [(12, 24), (16, 32), (9, 17)],
}
OTHER_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "nvfp4": [(16, 48), (12, 32), (12, 49), (11, 48), (12, 0)],
    "nvfp4 with its shape": [(12, 48), (16, 40), (12, 39)],
    "nvfp4 without a marker": [(16, 48), (0, 64), (17, 64)],
    "nvfp4 smoothed": [(12, 41), (12, 48)],
    "nvfp4 by ModelOpt": [(15, 64), (16, 48)],  # its bias tells N
    "nvfp4 by ModelOpt, wide": [(129, 48), (144, 48), (130, 32)],
    "mxfp8": [(12, 32), (32, 64)],
    "mxfp8 with all its rows": [(11, 64)],
    "fp8": [(11, 64), (12, 63), (12,), (12, 64, 1)],
    "row [N, 1]": [(12, 32)],
    "quip, padded": [(8, 24), (12, 16), (12,)],
}


@pytest.mark.parametrize("name", FITTING_SHAPES)
def test_weight_is_cut_to_the_models_shape_or_raises(name: str, tmp_path: Path) -> None:
    files, layers = read_draft(DRAFTS[name](), tmp_path)
    layer = layers[LAYER]

    for shape in FITTING_SHAPES[name]:
        assert layer.fits_shape(shape)
        whole = layer.read_weight(files, shape=shape)
        assert whole.shape == shape
        if layer.is_packable:
            coded, transform = layer.read_packed_weight(files, shape)
            assert torch.equal(transform.restore_weight(coded.dequantize()), whole)
            assert coded.shape == shape

    for wrong in OTHER_SHAPES[name]:
        assert not layer.fits_shape(wrong)
        if len(wrong) == 2:
            words = (
                rf"{LAYER} has the shape \[{layer.rows}, {layer.columns}\], the "
                rf"model's is \[{wrong[0]}, {wrong[1]}\]; the file is for another model"
            )
            with pytest.raises(FileError, match=words):
                layer.read_weight(files, shape=(wrong[0], wrong[1]))
            if layer.is_packable:
                with pytest.raises(FileError, match=words):
                    layer.read_packed_weight(files, (wrong[0], wrong[1]))


def test_without_a_model_the_files_shape_is_used(tmp_path: Path) -> None:
    files, layers = read_draft(DRAFTS["nvfp4"](), tmp_path)

    assert layers[LAYER].is_padded
    assert layers[LAYER].read_weight(files).shape == (12, 48)
    assert get_logical_shapes(files, layers)[f"{LAYER}.weight"] == (12, 48)
    assert files[f"{LAYER}.weight"].shape == (
        16,
        24,
    )


# -- whose it is -----------------------------------------------------------------------------------

FORMAT_NAMES = {"nvfp4": ("nvfp4", "nvfp4_modelopt"), "mxfp8": ("mxfp8", "mxfp8_rows")}


def draft_ambiguous(kind: str, tiles: bool) -> CheckpointDraft:
    """Of a shape that tells nothing."""
    return draft_blocks(kind, 128, 128, tiles=tiles, bias=False)


def assert_is_read_as(files: TensorFiles, draft: CheckpointDraft, word: str, requested: str = AUTO) -> None:
    layer = read_layers(files, declared=DeclaredFormat(requested))[LAYER]
    assert (layer.format_name, layer.label) == (word, word)
    assert_close(word, layer.read_weight(files), get_real_weight(draft), 1e-6)
    assert_close(word, layer.read_weight(files, slice(100, 110)), get_real_weight(draft)[100:110], 1e-6)
    assert_close(word, layer.read_packed_weight(files)[0].dequantize(), get_real_weight(draft), 1e-6)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("kind", FORMAT_NAMES)
def test_requested_format_decides_where_the_file_does_not(kind: str, tiles: bool, tmp_path: Path) -> None:
    draft, word = draft_ambiguous(kind, tiles), FORMAT_NAMES[kind][not tiles]
    files = open_draft(draft, tmp_path)

    assert_is_read_as(files, draft, word, word)
    for requested in (
        AUTO,
        "int8_convrot",
        *FORMAT_NAMES["mxfp8" if kind == "nvfp4" else "nvfp4"],
    ):  # a word for another kind says nothing
        with pytest.raises(
            FileError,
            match=rf"1 weight is {kind} .*clip={FORMAT_NAMES[kind][0]} or clip={FORMAT_NAMES[kind][1]}",
        ):
            read_layers(files, declared=DeclaredFormat(requested))


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("kind", FORMAT_NAMES)
def test_another_layer_overrides_the_requested_format(kind: str, tiles: bool, tmp_path: Path) -> None:
    draft = draft_ambiguous(kind, tiles)
    merge_layers(draft, draft_blocks(kind, 32, 64, tiles=tiles))
    files = open_draft(draft, tmp_path)

    for requested in (AUTO, *FORMAT_NAMES[kind]):
        assert_is_read_as(files, draft, FORMAT_NAMES[kind][not tiles], requested)


@pytest.mark.parametrize("kind", FORMAT_NAMES)
def test_marker_overrides_the_requested_format(kind: str, tmp_path: Path) -> None:
    draft = draft_ambiguous(kind, True)
    draft.put_marker(f"{LAYER}.comfy_quant", {"format": kind})
    files = open_draft(draft, tmp_path)
    (tmp_path / "config.json").write_text('{"quant_method": "modelopt"}')

    for requested in (AUTO, *FORMAT_NAMES[kind]):
        assert_is_read_as(files, draft, kind, requested)


MODELOPT_CONFIGS = {
    "config.json": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
    "quantization_config.json": {"quant_method": "modelopt"},
    "hf_quant_config.json": {
        "producer": {"name": "modelopt", "version": "0.33"},
        "quantization": {"quant_algo": "NVFP4"},
    },
}


@pytest.mark.parametrize("name", MODELOPT_CONFIGS)
def test_modelopt_config_in_the_folder_decides(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(MODELOPT_CONFIGS[name]))
    draft = draft_ambiguous("nvfp4", False)

    assert_is_read_as(open_draft(draft, tmp_path), draft, "nvfp4_modelopt")

    draft = draft_ambiguous("nvfp4", True)

    assert_is_read_as(
        open_draft(draft, tmp_path), draft, "nvfp4", "nvfp4"
    )  # who asks knows better than a note for perhaps another file


@pytest.mark.parametrize("note", [{"producer": {"name": "other"}}, {"producer": "modelopt"}, ["modelopt"]])
def test_another_programs_config_decides_nothing(note: Any, tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(note))
    with pytest.raises(FileError, match="by ComfyUI or by ModelOpt"):
        read_draft(draft_ambiguous("nvfp4", False), tmp_path)


MODELOPT_READ = {
    "fp8": lambda: draft_fp8((), "tensor"),
    "nvfp4": lambda: draft_blocks("nvfp4", 16, 64, tiles=False),
    "both and a float": lambda: merge_layers(draft_fp8((), "tensor"), draft_float("BF16", "")),
}
MODELOPT_REFUSED = {
    "int8": draft_rowwise,
    "fp8 without a scale": lambda: draft_fp8(None, ""),
    "e5m2": lambda: draft_fp8((), "tensor", dtype="F8_E5M2"),
    "fp8 without a scale beside one that has it": lambda: merge_layers(
        draft_fp8((), "tensor"), draft_fp8(None, "")
    ),
    "nvfp4 without its second scale": lambda: drop_tensors(
        draft_blocks("nvfp4", 16, 64, tiles=False), "weight_scale_2"
    ),
}


@pytest.mark.parametrize("name", MODELOPT_READ)
def test_modelopt_fp8_and_nvfp4_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELOPT_CONFIGS["config.json"]))
    draft = MODELOPT_READ[name]()
    files, layers = read_draft(draft, tmp_path)

    assert_close(name, layers[LAYER].read_weight(files), get_real_weight(draft), 1e-6)


@pytest.mark.parametrize("name", MODELOPT_REFUSED)
def test_other_modelopt_formats_raise(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELOPT_CONFIGS["config.json"]))
    with pytest.raises(
        FileError,
        match=r"is a modelopt file \(the config beside it says quant_method modelopt\), which diffusers with",
    ):
        read_draft(MODELOPT_REFUSED[name](), tmp_path)


# -- rows that may be rotated ----------------------------------------------------------------------


@pytest.mark.parametrize(("width", "group"), [(512, 256), (128, 64), (64, 64), (48, 16), (40, 0)])
def test_unmarked_rows_are_rotated_if_requested(width: int, group: int, tmp_path: Path) -> None:
    plain = draft_int8((N, 1), "row", weight=(N, width), label="int8")
    files = open_draft(plain, tmp_path)

    for requested in (AUTO, "int8_rowwise", "nvfp4"):
        layer = read_layers(files, declared=DeclaredFormat(requested))[LAYER]
        assert (layer.format_name, layer.rotation_group_size) == ("int8_rowwise", 0)
        assert_close("plain", layer.read_weight(files), get_real_weight(plain), 1e-6)

    layer = read_layers(files, declared=DeclaredFormat("int8_convrot"))[LAYER]

    assert (layer.rotation_group_size, layer.is_sylvester, layer.format_name) == (
        group,
        False,
        "int8_convrot" if group else "int8_rowwise",
    )
    assert layer.outlier_method == ("convrot" if group else "none")

    if group:
        draft_rotated(plain, make_regular(group), "convrot")
        assert (layer.outlier_settings, layer.label) == ({"group_size": group}, f"int8, row, convrot {group}")

    assert_close("rotated", layer.read_weight(files), get_real_weight(plain), 1e-6)

    coded, transform = layer.read_packed_weight(files)

    assert_close("coded", transform.restore_weight(coded.dequantize()), get_real_weight(plain), 1e-6)


# what says how it is: a marker anywhere among the INT8 layers, one scale for all, other transforms
SELF_DESCRIBING = [
    "row [N, 1]",
    "row in the header",
    "quarot false",
    "convrot 16",
    "lightx2v comfy mode",
    "grid without a marker",
    "group",
    "transposed",
    "toolkit quarot",
    "toolkit sigma alone",
    "older quip",
    "fp8 row [N, 1]",
]


@pytest.mark.parametrize("name", SELF_DESCRIBING)
def test_requested_rotation_changes_no_self_describing_layer(name: str, tmp_path: Path) -> None:
    draft = DRAFTS[name]()
    files = open_draft(draft, tmp_path)
    plain, rotated = (
        read_layers(files)[LAYER],
        read_layers(files, declared=DeclaredFormat("int8_convrot"))[LAYER],
    )

    assert plain == rotated
    assert_close(name, rotated.read_weight(files), get_real_weight(draft), 1e-6)


def test_markers_of_fp8_layers_do_not_describe_int8_layers(tmp_path: Path) -> None:
    files = open_draft(merge_layers(DRAFTS["lightx2v bf16"](), DRAFTS["fp8"]()), tmp_path)
    assert read_layers(files, declared=DeclaredFormat("int8_convrot"))[LAYER].format_name == "int8_convrot"


# -- markers that are no JSON ----------------------------------------------------------------------

DRAFTS_BY_QUANTOPS_BYTE = {
    0: lambda: draft_fp8((), "tensor"),
    1: lambda: draft_fp8((N,), "row"),
    2: lambda: draft_fp8((3, 16), "grid", block=(4, 4)),
    3: lambda: draft_fp8((N, 4, 1), "block3d", block=(1, 16)),
    10: lambda: draft_int8((3, 16), "grid", block=(4, 4), label="int8_blockwise"),
}


@pytest.mark.parametrize("code", DRAFTS_BY_QUANTOPS_BYTE)
@pytest.mark.parametrize("rest", [b"", b"\0\0"])
def test_quantops_markers_of_one_byte_are_read(
    code: int, rest: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = DRAFTS_BY_QUANTOPS_BYTE[code]()
    data = bytes([code]) + rest
    draft.tensors[f"{LAYER}.comfy_quant"] = "U8", (len(data),), data
    files, layers = read_draft(draft, tmp_path)

    assert layers[LAYER].label == draft.expected["label"]
    assert not caplog.records
    assert_close("weight", layers[LAYER].read_weight(files), get_real_weight(draft), 1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\x04", "is not JSON"),
        ("\x0b", "is not JSON"),
        ("\x00", r"names the format 'float8_e4m3fn', and blocks.0.q.weight is I8"),
    ],
)
def test_other_single_bytes_raise(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=words):
        read_draft(draft_with_marker(text), tmp_path)


def test_marker_may_begin_with_a_line_break(tmp_path: Path) -> None:
    # whose byte is a code as well
    _, layers = read_draft(draft_with_marker("\n" + json.dumps({**GROUP, "convrot_groupsize": 16})), tmp_path)
    assert layers[LAYER].rotation_group_size == 16


# -- embeddings, and others' files -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["row [N, 1]", "tensor []", "fp8 cast", "fp8", "convrot 16"])
def test_rows_of_embeddings_are_selected(name: str, tmp_path: Path) -> None:
    draft = DRAFTS[name]()
    draft.tensors = {key.replace(LAYER, "model.embed_tokens"): value for key, value in draft.tensors.items()}
    files, layers = read_draft(draft, tmp_path)
    layer = layers["model.embed_tokens"]
    coded, transform = layer.read_packed_weight(files)
    some = torch.tensor([3, 0, 3, 11])

    assert_close(
        name,
        transform.restore_weight(coded.select_rows(some).dequantize()),
        get_real_weight(draft)[some],
        1e-6,
    )


@pytest.mark.parametrize(
    "words",
    ["bitsandbytes", "SDNQ", "torchao", "nunchaku", "compressed-tensors", "lightx2v nvfp4", "modelopt"],
)
def test_every_refused_format_names_a_reader(words: str) -> None:
    # that each is raised: checkpoint_files.MISTAKES
    assert any(f"is a {words} file" in text for _, text in MISTAKES.values())
    assert READERS[words]


# -- who uses it -----------------------------------------------------------------------------------


class SmallModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(40, N)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "nvfp4 with its shape", "mxfp8 smoothed"])
def test_parameter_is_the_weight_without_padding(name: str, tmp_path: Path) -> None:
    draft = DRAFTS[name]()
    draft.tensors = {key.removeprefix("blocks.0."): value for key, value in draft.tensors.items()}
    file = FileWeights(draft.write(tmp_path / "m.safetensors"), SmallModel(), is_partial=True)

    assert_close("weight", file.read_tensor("q.weight"), get_real_weight(draft), 1e-6)
    assert file.find_int8_layers() == {}
    assert file.find_inexact_layers() == {"q"}
    with pytest.raises(FileError, match=r"q\.weight of the file has the shape \[12, "):
        FileWeights(tmp_path / "m.safetensors", nn.ModuleDict({"q": nn.Linear(20, N)}))


class WideModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(128, 128)


@pytest.mark.parametrize(("kind", "other"), [("nvfp4", "nvfp4_modelopt"), ("mxfp8", "mxfp8_rows")])
def test_a_setting_names_the_layout_of_an_unmarked_denoiser(kind: str, other: str, tmp_path: Path) -> None:
    """Shapes fit both layouts; the draft is ComfyUI's, so read as the other its weight is another."""
    draft = draft_ambiguous_blocks(kind)
    draft.tensors = {key.removeprefix("blocks.0."): value for key, value in draft.tensors.items()}
    path = draft.write(tmp_path / "m.safetensors")

    with pytest.raises(FileError, match=f"set model.quant_format={kind} or model.quant_format={other}"):
        FileWeights(path, WideModel(), is_partial=True)
    as_comfyui = FileWeights(path, WideModel(), is_partial=True, declared=DeclaredFormat(kind))
    as_modelopt = FileWeights(path, WideModel(), is_partial=True, declared=DeclaredFormat(other))

    assert_close("weight", as_comfyui.read_tensor("q.weight"), get_real_weight(draft), 1e-6)
    assert not torch.allclose(as_modelopt.read_tensor("q.weight").double(), get_real_weight(draft))


def test_a_setting_that_no_layer_has_is_an_error(tmp_path: Path) -> None:
    draft = draft_rowwise()
    draft.tensors = {key.removeprefix("blocks.0."): value for key, value in draft.tensors.items()}
    path = draft.write(tmp_path / "m.safetensors")
    model = nn.ModuleDict({"q": nn.Linear(K, N)})

    for accepted in ("int8_rowwise", "int8_tensorwise"):
        FileWeights(path, model, declared=DeclaredFormat(accepted))
    message = r"model.quant_format=nvfp4, and .* has no such layer: it holds 1 × int8_rowwise; model"
    with pytest.raises(ConfigError, match=message):
        FileWeights(path, model, declared=DeclaredFormat("nvfp4"))


def draft_flux(tmp_path: Path) -> tuple[CheckpointDraft, TensorFiles]:
    """Names of a small Flux, one of its weights with two numbers a byte."""
    draft = draft_blocks("nvfp4", 96, 32, marker=NVFP4)
    draft.tensors = {
        key.replace(LAYER, "double_blocks.0.img_attn.qkv"): value for key, value in draft.tensors.items()
    }
    draft.put("double_blocks.0.img_attn.norm.key_norm.scale", "F32", np.ones(16))
    draft.put("img_in.weight", "F32", np.ones((32, 64)))
    return draft, open_draft(draft, tmp_path)


def record_shapes(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, ...]]:
    """The shapes by which a module will look for a family."""
    seen: dict[str, tuple[int, ...]] = {}

    def look(keys: Any, families: Any, shapes: Any = None) -> Any:
        seen.update(shapes or {})
        return original(keys, families, shapes)

    original = module.detect_denoiser
    monkeypatch.setattr(module, "detect_denoiser", look)
    return seen


def test_family_is_detected_by_logical_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files = draft_flux(tmp_path)
    seen = record_shapes(denoiser_checkpoint, monkeypatch)
    denoiser_checkpoint.recognize_checkpoint(
        files,
        read_layers(files),
        prefix="",
        source=ResolvedWeights(tmp_path / "m.safetensors"),
        model_type=AutoFamily(),
    )

    assert seen["double_blocks.0.img_attn.qkv.weight"] == (96, 32)


def test_inspect_shows_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, _ = draft_flux(tmp_path)
    seen = record_shapes(inspect_checkpoint, monkeypatch)
    table = inspect_file.inspect_file(str(draft.write(tmp_path / "m.safetensors"))).to_table()

    assert "1 × nvfp4" in list(table.columns[1].cells)
    assert seen["double_blocks.0.img_attn.qkv.weight"] == (
        96,
        32,
    )

    del draft.tensors["double_blocks.0.img_attn.qkv.comfy_quant"]
    table = inspect_file.inspect_file(str(draft.write(tmp_path / "m.safetensors"))).to_table()

    assert next(iter(table.columns[1].cells)) == "quantized checkpoint (U8 with scales)"


# -- another reader --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 of many tiles", "nvfp4 without a marker"])
def test_nvfp4_weight_equals_comfy_kitchens(name: str, tmp_path: Path) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    draft = DRAFTS[name]()
    files, layers = read_draft(draft, tmp_path)
    coded, _ = layers[LAYER].read_packed_weight(files)

    assert coded.scale is not None
    assert coded.global_scale is not None

    scale = coded.scale.view(torch.float8_e4m3fn)
    theirs = kitchen.dequantize_nvfp4(coded.qdata, coded.global_scale, scale, output_type=torch.float32)

    assert_close(name, coded.dequantize(), theirs[: coded.shape[0], : coded.shape[1]], 1e-6)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8 of many tiles", "hybrid mxfp8"])
def test_mxfp8_weight_equals_comfy_kitchens(name: str, tmp_path: Path) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    files, layers = read_draft(DRAFTS[name](), tmp_path)
    coded, _ = layers[LAYER].read_packed_weight(files)

    assert coded.scale is not None

    theirs = kitchen.dequantize_mxfp8(
        coded.qdata, coded.scale.view(torch.float8_e8m0fnu), output_type=torch.float32
    )

    assert_close(name, coded.dequantize(), theirs[: coded.shape[0], : coded.shape[1]], 1e-6)
