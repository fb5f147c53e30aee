"""What int8run writes beside INT8 weights: markers, the note, and a place that is tried before the work."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.helpers import randn, shipped

from int8run.checkpoints.comfy_int8 import build_marker
from int8run.checkpoints.output_path import prepare_output_path
from int8run.checkpoints.provenance import read_provenance
from int8run.errors import FileError
from int8run.outlier.base import LayerStatistics, OutlierMethod, OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant

METHODS: dict[str, OutlierMethod] = {name: m for name, m in shipped("outlier").items() if name != "auto"}


def fit_transform(method: OutlierMethod, width: int) -> OutlierTransform:
    """The transform of a layer."""
    weight, sample = randn(6, width, seed=width), randn(2, 6, width, seed=1)
    return method.fit(weight, LayerStatistics(sample, sample.abs().amax((0, 1)), weight.abs().amax(0)))


# -- markers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 64, 256])
def test_plain_and_rotated_layers_have_comfyuis_own_markers(width: int) -> None:
    plain, rotated = build_marker(OutlierTransform()), build_marker(fit_transform(ConvRot(), width))

    assert plain == {"format": "int8_tensorwise", "per_row": True}
    assert rotated == {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": width,
        "per_row": True,
    }
    # readers that go by the header alone know these lengths
    assert (len(json.dumps(plain)), len(json.dumps(rotated))) == (46, 88 if width < 100 else 89)


@pytest.mark.parametrize("method", [QuaRot(), SmoothQuant(), HadaNorm()], ids=lambda m: m.name)
def test_transforms_unknown_to_comfyui_have_another_format_name(method: OutlierMethod) -> None:
    found = build_marker(fit_transform(method, 128))

    assert found["format"] == "int8run_transformed"
    assert not {"convrot", "convrot_groupsize"} & set(found)
    assert found["factor"] == (method.name != "quarot")
    assert found["outlier"] == method.name
    assert found["settings"] == method.get_settings(128)
    assert found["centered"] == (method.name == "hadanorm")
    assert ("rotation" in found) == (method.name != "smoothquant")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_markers_survive_json(method: OutlierMethod) -> None:
    found = build_marker(fit_transform(method, 128))
    assert json.loads(json.dumps(found)) == found


# -- the note --------------------------------------------------------------------------------------


def test_provenance_is_read_and_empty_where_missing() -> None:
    note = {"model": "shipped:tiny", "kept_float": {"proj_out": "letzte Schicht ü"}, "calibration": None}
    assert read_provenance(Path("m"), {"format": "pt", "int8run": json.dumps(note)}) == note
    assert read_provenance(Path("m"), {"format": "pt"}) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", r"not JSON \(.*\)"),
        ("[" * 100_000, "nested in more than 64 levels"),
        ("", r"not JSON \(.*\)"),
        ("[1]", "not a JSON object"),
        ("3", "not a JSON object"),
    ],
)
def test_provenance_that_is_not_an_object_raises(text: str, reason: str) -> None:
    with pytest.raises(
        FileError,
        match=rf"^m\.safetensors: the provenance in the header is {reason}: {re.escape(repr(text[:80]))}$",
    ):
        read_provenance(Path("m.safetensors"), {"int8run": text})


# -- the place -------------------------------------------------------------------------------------


def test_missing_folder_is_created_and_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    assert prepare_output_path("new/folder/m.safetensors") == tmp_path / "new" / "folder" / "m.safetensors"
    assert prepare_output_path("~/m.safetensors") == tmp_path / "home" / "m.safetensors"
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    assert (tmp_path / "home").is_dir()


def make_path_below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "m.safetensors"


def make_folder_of_that_name(folder: Path) -> Path:
    (folder / "m.safetensors").mkdir()
    return folder / "m.safetensors"


def make_pipe_of_that_name(folder: Path) -> Path:
    os.mkfifo(folder / "m.safetensors")
    return folder / "m.safetensors"


UNWRITABLE_PATHS = {
    "a folder of that name": (make_folder_of_that_name, "it is a folder|Is a directory"),
    "a pipe of that name": (make_pipe_of_that_name, "it is a pipe, which a file would replace"),
    "a file in the way": (make_path_below_a_file, r"(File exists|Not a directory)"),
    "a folder that nobody may write to": (lambda folder: Path("/proc/m.safetensors"), r".+"),
    "a name that is too long": (lambda folder: folder / ("x" * 300) / "m.safetensors", "File name too long"),
}


@pytest.mark.parametrize(("place", "reason"), UNWRITABLE_PATHS.values(), ids=UNWRITABLE_PATHS)
def test_path_that_cannot_be_written_raises(
    place: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(
        FileError,
        match=rf"^save=.*safetensors cannot be written: ({reason}); choose a folder that you may write to$",
    ):
        prepare_output_path(str(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_path_without_suffix_is_a_folder(tmp_path: Path) -> None:
    assert prepare_output_path(str(tmp_path / "new" / "model")) == tmp_path / "new" / "model"
    assert (tmp_path / "new" / "model").is_dir()

    (tmp_path / "file").write_text("")

    with pytest.raises(
        FileError, match=r"^save=.*file cannot be written: (File exists|Not a directory); choose"
    ):
        prepare_output_path(str(tmp_path / "file"))


def test_every_method_has_another_marker() -> None:
    assert len({json.dumps(build_marker(fit_transform(method, 128))) for method in METHODS.values()}) == len(
        METHODS
    )
