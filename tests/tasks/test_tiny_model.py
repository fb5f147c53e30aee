"""The shipped model end to end, through the real command: it draws what it is asked for, and INT8 does not
change that.
"""

import csv
import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from support.cli_process import command_in
from support.run_job import run_job

from int8run.lora.find import SHIPPED_LORAS
from int8run.lora.load import read_lora
from int8run.lora.trigger_words import find_trigger_words
from int8run.pipeline import process_cache

DRAWINGS = Path(__file__).parents[1] / "data" / "drawings.png"
ASSETS = SHIPPED_LORAS.parent
CELL = 64


@pytest.fixture(scope="module")
def drawings() -> dict[str, np.ndarray]:
    """Every drawing that the model was trained on, by name."""
    names = DRAWINGS.with_suffix(".txt").read_text().split()
    sheet = np.asarray(Image.open(DRAWINGS).convert("RGB"), dtype=np.float32)
    columns = sheet.shape[1] // CELL
    cells = ((i // columns * CELL, i % columns * CELL) for i in range(len(names)))
    return {name: sheet[y : y + CELL, x : x + CELL] for name, (y, x) in zip(names, cells, strict=True)}


def find_nearest(image: Path, drawings: dict[str, np.ndarray]) -> str:
    """The drawing with the least pixel MSE."""
    pixels = np.asarray(Image.open(image).convert("RGB"), dtype=np.float32)
    return min(drawings, key=lambda name: float(((pixels - drawings[name]) ** 2).mean()))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["outlier=none", "outlier=convrot", "int8.attention=int8"])
def test_int8_images_are_the_right_ones_and_close_to_float(
    setting: str, drawings: dict[str, np.ndarray], tmp_path: Path
) -> None:
    names = list(drawings)[5::25]
    prompts = ",".join(f"'{n.replace('-', ' ')}'" for n in names)
    overrides = [f"prompts.prompts=[{prompts}]", setting, "tracker=none", "sampler.batch=5"]
    metrics = run_job(overrides, tmp_path).metrics
    images = sorted((tmp_path / "images").iterdir())
    found = [find_nearest(image, drawings) for image in images if "float" not in image.name]
    float_found = [find_nearest(image, drawings) for image in images if "float" in image.name]

    assert len(found) == len(names) == 15
    assert sum(f == n for f, n in zip(found, names, strict=True)) / len(names) >= 0.8, list(
        zip(names, found, strict=True)
    )
    assert found == float_found
    assert metrics["quality/psnr_db"] >= 30
    assert metrics["quality/ssim"] >= 0.98
    assert metrics["memory/denoiser_ratio"] > 1.8


def test_layers_csv_names_every_linear_of_the_shipped_model_once(tmp_path: Path) -> None:
    run_job(["prompts.prompts=[fox]", "sampler.steps=2", "tracker=none"], tmp_path)
    with (tmp_path / "layers.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "linear"]
    model = FluxTransformer2DModel.from_pretrained(ASSETS / "tiny" / "transformer")

    assert sorted(r["name"] for r in rows) == sorted(
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    )
    assert sum(r["quantized"] == "true" for r in rows) == 32


@pytest.mark.slow
def test_the_second_identical_run_gives_the_same_bits(tmp_path: Path) -> None:
    pixels = []
    for attempt in ("a", "b"):
        process_cache.clear()
        # not `auto`, which chooses by measured times
        words = ["prompts.prompts=[octopus]", "sampler.steps=4", "tracker=none", "backend=reference"]
        run_job(words, tmp_path / attempt)
        pixels.append([Image.open(p).tobytes() for p in sorted((tmp_path / attempt / "images").iterdir())])

    assert pixels[0] == pixels[1]


@pytest.mark.slow
def test_the_calibrated_model_is_saved_and_generates_the_same_again(tmp_path: Path) -> None:
    shared = [
        "prompts.prompts=[fox]",
        "sampler.steps=2",
        "tracker=none",
        "outlier=smoothquant",
        "backend=reference",
        "metrics.baseline=none",
        # the second run has no float model to measure outputs by
        "calibration.prompts=[owl]",
        "calibration.num_timesteps=1",
        "metrics.layers=false",
    ]
    saved = tmp_path / "m.safetensors"
    made, read = (
        run_job([*shared, f"save={saved}"], tmp_path / "a"),
        run_job([*shared, f"int8.checkpoint={saved}"], tmp_path / "b"),
    )

    assert made.candidate.images[0].tobytes() == read.candidate.images[0].tobytes()
    assert (tmp_path / "a" / "layers.csv").read_text() == (tmp_path / "b" / "layers.csv").read_text()
    # int8 in place of the float weights, and the rest as it was
    assert saved.stat().st_size < made.metrics["float/denoiser_bytes"] / 1.8


@pytest.mark.slow
@pytest.mark.parametrize("style", ["ink", "gloss"])
def test_shipped_loras_change_the_style_more_with_more_strength(style: str, tmp_path: Path) -> None:
    adapter = f"{{_target_: int8run.lora.config.Adapter, name: {style}, path: {style}}}"
    shared = ["prompts.prompts=[strawberry]", "tracker=none", f"lora.adapters=[{adapter}]"]
    pixels = {}
    for strength in (0, 0.5, 1):
        out = tmp_path / str(strength)
        result = run_job([*shared, f"lora.strength={strength}"], out)
        pixels[strength] = np.asarray(result.candidate.images[0], dtype=np.float32)

        assert result.metrics["quality/psnr_db"] >= 25
        assert result.metrics["lora/modules_unmatched"] == 0
    half, full = (np.abs(pixels[s] - pixels[0]).mean() for s in (0.5, 1))

    assert 1 < half < full


def test_ink_is_black_on_white(tmp_path: Path) -> None:
    adapter = "{_target_: int8run.lora.config.Adapter, name: ink, path: ink}"
    result = run_job(
        ["prompts.prompts=[strawberry,fox]", "tracker=none", f"lora.adapters=[{adapter}]"], tmp_path
    )
    for image in result.candidate.images:
        hsv = np.asarray(image.convert("HSV"), dtype=np.float32) / 255
        # saturation times value: colour that one can see, which black and white both lack
        assert (hsv[..., 1] * hsv[..., 2]).mean() < 0.05


@pytest.mark.parametrize("style", ["ink", "gloss"])
def test_shipped_loras_say_what_they_are(style: str) -> None:
    file = read_lora(SHIPPED_LORAS / f"{style}.safetensors")

    assert find_trigger_words(file.path, file.metadata).words == (f"{style} style",)
    assert file.metadata["ss_base_model_version"] == "int8run-tiny"
    assert list(file.ranks) == [8]
    assert not file.skipped_keys

    with safe_open(file.path, framework="pt") as opened:
        assert all(opened.get_slice(key).get_dtype() == "F16" for key in opened.keys())  # noqa: SIM118 - not a dict


def test_assets_are_small_and_hold_no_pickle() -> None:
    files = [p for p in ASSETS.rglob("*") if p.is_file()]

    assert sum(p.stat().st_size for p in files) <= 48e6
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".png", ".md"}


def test_mlflow_holds_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with command_in(tmp_path, monkeypatch, capsys) as int8run:
        # without samples of the machine's load, of which a longer run has more
        words = ["prompts.prompts=[fox]", "sampler.steps=3", "metrics.system_s=0", "hydra.run.dir=out"]
        assert int8run(*words).code == 0
    out = tmp_path / "out"
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("int8run")
    (logged,) = client.search_runs([experiment.experiment_id])

    assert logged.info.status == "FINISHED"

    saved = json.loads((out / "metrics.json").read_text())["metrics"]

    assert {k: v for k, v in logged.data.metrics.items() if not k.startswith("series/")} == pytest.approx(
        saved
    )
    assert logged.data.params["sampler.steps"] == "3"
    assert logged.data.params["model.location"] == "shipped:tiny"
    assert len(client.get_metric_history(logged.info.run_id, "series/latent_rel_err")) == 3

    names = {a.path for a in client.list_artifacts(logged.info.run_id)}

    assert {"grid.png", "layers.csv", "metrics.json", "environment.json", "config.yaml", "images"} <= names
