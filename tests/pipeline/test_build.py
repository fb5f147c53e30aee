"""The steps of a build: what each takes from the settings of a run, and what it leaves out."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.run_job import make_spec

from int8run.errors import FileError
from int8run.layers.plan import LayerPlan
from int8run.layers.plan_summary import warn_without_convolutions
from int8run.lora.match import Matches
from int8run.pipeline import build as module
from int8run.pipeline.build import find_layer_sources, prepare_save, select_float_denoisers
from int8run.pipeline.step_settings import select_load_settings, select_quantization_settings

ROOT = Path(__file__).parents[2] / "int8run"


def find_sources(*overrides: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """The sources of one layer, and the requests for layers that exist."""
    requests: list[Any] = []
    plan = LayerPlan("a", 4, 4, None)
    loaded: Any = SimpleNamespace(plan_layers=lambda convolutions: [plan])
    monkeypatch.setattr(module, "build_cache_key", lambda *args, **settings: "key")
    monkeypatch.setattr(
        module, "find_prequantized", lambda loaded, plans, request, changed_layers: requests.append(request)
    )
    return find_layer_sources(make_spec([*overrides]), loaded, [], Matches({}, ())), requests


def test_the_float_model_looks_for_no_int8_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, requests = find_sources("int8.enable=false", monkeypatch=monkeypatch)

    assert requests == [] and sources.prequantized is None and sources.cache_key is None


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("cache.limit_gb=1", "key"),
        ("cache.limit_gb=1 int8.bits=4", "key"),
        ("cache.limit_gb=0", None),
        ("int8.checkpoint=m.safetensors", None),
    ],
)
def test_layers_are_cached_unless_they_come_from_a_file(
    overrides: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, (request,) = find_sources(*overrides.split(), monkeypatch=monkeypatch)

    assert sources.cache_key == request.cache_key == key


@pytest.mark.parametrize(
    ("choice", "kinds", "is_warned"),
    [
        ("int8", {"linear": None}, True),
        ("auto", {"linear": None, "conv": "first convolution"}, True),
        ("int8", {"linear": None, "conv": None}, False),
        ("float", {"linear": None}, False),
    ],
)
def test_convolutions_that_are_asked_for_in_vain_are_warned_of(
    choice: str, kinds: dict[str, str | None], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plans = [LayerPlan(kind, 4, 4, reason, kind=kind) for kind, reason in kinds.items()]

    warn_without_convolutions(plans, choice)

    message = (
        f"int8.convolutions={choice}: the denoiser has no convolutions that can be INT8; int8.vae=int8 is "
        "for the VAE's"
    )
    assert caplog.messages == [message] * is_warned


def test_a_build_warns_of_convolutions_that_are_asked_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_sources("int8.convolutions=int8", monkeypatch=monkeypatch)

    assert len(caplog.messages) == 1 and "the denoiser has no convolutions" in caplog.messages[0]


def test_the_backend_is_checked_only_for_int8_layers() -> None:
    assert select_load_settings(make_spec(["backend=reference"])).backend is not None
    assert select_load_settings(make_spec(["int8.enable=false"])).backend is None


@pytest.mark.parametrize(("save", "is_fused"), [("null", False), ("folder", False), ("m.safetensors", True)])
def test_only_a_file_has_fused_layers(save: str, is_fused: bool) -> None:
    assert select_quantization_settings(make_spec([f"save={save}"])).has_fused_layers == is_fused


def test_the_folder_of_an_int8_vae_is_checked_before_the_work(tmp_path: Path) -> None:
    saved = f"save={tmp_path / 'a.safetensors'}"
    (tmp_path / "a_vae").write_text("in the way")

    prepare_save(make_spec([saved]))
    with pytest.raises(FileError, match="a_vae"):
        prepare_save(make_spec([saved, "int8.vae=int8"]))


def test_float_denoisers_by_what_generates_with_them() -> None:
    denoiser = torch.nn.Identity()

    assert select_float_denoisers(make_spec([]), denoiser) == {"float": denoiser}
    assert select_float_denoisers(make_spec(["metrics.baseline=none"]), denoiser) == {}
    assert select_float_denoisers(make_spec(["clip=nvfp4", "int8.enable=false"]), denoiser) == {
        "float": denoiser,
        "clip": denoiser,
    }


def test_the_whole_settings_are_seen_by_few() -> None:
    """Below these, functions take the settings that they use."""
    allowed = {"cli.py", "api.py", "pipeline/build.py", "pipeline/add_int8.py", "pipeline/step_settings.py"}

    seen = set()
    for file in ROOT.rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "int8run.config.run_spec":
                seen.add(name)

    assert seen and {name for name in seen if not name.startswith(("config/", "jobs/", "tasks/"))} <= allowed
