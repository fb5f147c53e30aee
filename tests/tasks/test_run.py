"""One run from settings to files, on a random FluxPipeline of diffusers' real classes."""

import csv
import hashlib
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.cli_process import Command
from support.helpers import CONF, without_vnni
from support.run_job import make_spec, run_job, save_lora
from support.tiers import slow_except
from support.tiny_pipeline import random_pipeline, save_random_pipeline

from int8run.backends.autotune_cache import read_entries
from int8run.checkpoints.header import read_header
from int8run.errors import BackendError, ConfigError, FileError, LoraError
from int8run.generate.generate import Generation
from int8run.generate.prompts import build_samples
from int8run.layers.int8_linear import Int8Linear
from int8run.models.resolve_weights import list_denoisers
from int8run.pipeline import process_cache
from int8run.pipeline.build import build_model
from int8run.report.console import Progress
from int8run.report.step_times import has_scattered_times
from int8run.tasks.run import check_latents

pytestmark = pytest.mark.usefixtures("one_thread")

CONTRACT = {
    "speed/step_ms_p50",
    "speed/step_ms_p90",
    "speed/images_per_s",
    "speed/ratio_vs_float",
    "build/load_s",
    "build/quantize_s",
    "memory/denoiser_bytes",
    "memory/denoiser_ratio",
    "memory/text_encoder_bytes",
    "memory/peak_bytes",
    "quality/psnr_db",
    "quality/ssim",
    "quality/latent_rel_err",
    "quant/layers_int8",
    "quant/layers_float",
    "quant/weight_sqnr_db_mean",
    "quant/weight_sqnr_db_min",
    "quant/output_sqnr_db_mean",
    "quant/output_sqnr_db_min",
    "quant/fallback_layers",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`model.location=…` of a random pipeline, with small settings that every test shares."""
    return str(save_random_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def small(model: str) -> list[str]:
    process_cache.clear()
    return [
        f"model.location={model}",
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=3",
        "prompts.prompts=[a,b]",
        "tracker=none",
        # `auto` chooses by measured times, which differ from run to run
        "backend=reference",
    ]


def read_layers(out: Path) -> list[dict[str, str]]:
    """The rows of the Linears."""
    with (out / "layers.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "linear"]


def image_bytes(out: Path) -> dict[str, bytes]:
    return {p.name: Image.open(p).tobytes() for p in sorted((out / "images").iterdir())}


def test_a_run_leaves_everything(small: list[str], tmp_path: Path) -> None:
    metrics = run_job(small, tmp_path).metrics

    assert set(metrics) >= CONTRACT
    assert {p.name for p in tmp_path.iterdir()} == {
        "environment.json",
        "grid.png",
        "images",
        "layers.csv",
        "metrics.json",
    }
    assert len(list((tmp_path / "images").iterdir())) == 4  # two prompts, float and INT8

    saved = json.loads((tmp_path / "metrics.json").read_text())

    assert saved["metrics"]["quality/psnr_db"] == metrics["quality/psnr_db"]
    assert len(saved["images"]) == 2
    # of two drawings the times of three steps but the first, their medians, and the error after each step
    assert [len(values) for values in saved["series"].values()] == [4, 4, 2, 2, 3]
    assert [(i["key"], i["file"], i["float"]) for i in saved["images"]] == [
        (f"00{n}_{word}_s0", f"images/00{n}_{word}_s0.png", f"images/00{n}_{word}_s0_float.png")
        for n, word in enumerate("ab")
    ]
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"]


def test_layers_csv_names_every_linear_once(small: list[str], tmp_path: Path) -> None:
    run_job(small, tmp_path)
    rows = read_layers(tmp_path)
    linears = [n for n, m in random_pipeline().transformer.named_modules() if type(m).__name__ == "Linear"]

    assert sorted(r["name"] for r in rows) == sorted(linears)

    for row in rows:
        quantized = row["quantized"] == "true"
        assert bool(row["why_not"]) != quantized
        assert (float(row["output_sqnr_db"]) > 20) if quantized else row["backend_used"] == ""


def test_the_second_identical_run_gives_the_same_bits(small: list[str], tmp_path: Path) -> None:
    run_job(small, tmp_path / "a")
    process_cache.clear()
    run_job(small, tmp_path / "b")

    assert image_bytes(tmp_path / "a") == image_bytes(tmp_path / "b")


@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
def test_two_backends_in_one_process_do_not_see_each_other(small: list[str]) -> None:
    first, second = (
        build_model(
            make_spec([*small, f"backend={name}"]), build_samples(["a"], 1, 0), [], Progress(enabled=False)
        )
        for name in ("reference", "torch_int_mm")
    )
    for built, name in ((first, "reference"), (second, "torch_int_mm")):
        used = {m.backend.name for m in built.denoisers["int8"].modules() if isinstance(m, Int8Linear)}
        assert used == {name}


@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
def test_runs_with_different_backends_are_built_anew(small: list[str], tmp_path: Path) -> None:
    run_job([*small, "backend=reference"], tmp_path / "a")
    second = run_job([*small, "backend=onednn"], tmp_path / "b")

    assert second.metrics["build/load_s"] > 0

    used = {r["backend_used"] for r in read_layers(tmp_path / "b")} - {""}

    assert used == {"onednn"}


def test_a_run_with_the_same_build_reuses_the_model(small: list[str], tmp_path: Path) -> None:
    run_job(small, tmp_path / "a")
    again = run_job([*small, "seed=7"], tmp_path / "b")

    assert again.metrics["build/load_s"] == 0
    assert image_bytes(tmp_path / "a").values() != image_bytes(tmp_path / "b").values()


def test_int8_disabled_is_the_float_model(small: list[str], tmp_path: Path) -> None:
    metrics = run_job([*small, "int8.enable=false"], tmp_path).metrics

    assert metrics["quality/psnr_db"] == float("inf")
    assert metrics["memory/denoiser_ratio"] == 1
    assert "quant/layers_int8" not in metrics
    assert '"quality/psnr_db": "inf"' in (tmp_path / "metrics.json").read_text()


def test_without_a_baseline_only_int8_runs(small: list[str], tmp_path: Path) -> None:
    metrics = run_job([*small, "metrics.baseline=none"], tmp_path).metrics

    assert "quality/psnr_db" not in metrics
    assert "speed/ratio_vs_float" not in metrics
    assert metrics["speed/step_ms_p50"] > 0
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_a_batch_does_not_change_whose_noise_an_image_gets(small: list[str], tmp_path: Path) -> None:
    run_job([*small, "int8.enable=false"], tmp_path / "a")
    process_cache.clear()
    run_job([*small, "int8.enable=false", "sampler.batch=2"], tmp_path / "b")
    pairs = zip(image_bytes(tmp_path / "a").values(), image_bytes(tmp_path / "b").values(), strict=True)

    # a larger batch may round differently by one step of 255
    assert all(max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1 for a, b in pairs)


def test_model_type_none_quantizes_everything(small: list[str], tmp_path: Path) -> None:
    run_job([*small, "model_type=none"], tmp_path)

    assert {r["quantized"] for r in read_layers(tmp_path)} == {"true"}


def test_nothing_converted_is_an_error(small: list[str], tmp_path: Path) -> None:
    keep = "model_type.ignore=[{pattern: '*', reason: asked}]"

    with pytest.raises(
        ConfigError, match=r"no layer became INT8 \(48 × asked\).*model_type=.*int8.enable=false"
    ):
        run_job([*small, "model_type=flux", keep], tmp_path)


class TestLora:
    """A stack of one LoRA on the random model; the real ones are in test_tiny_model.py."""

    @pytest.fixture
    def lora(self, small: list[str], tmp_path: Path) -> list[str]:
        file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer)
        adapter = f"{{_target_: int8run.lora.config.Adapter, name: style, path: {file}, strength: 1.0}}"
        return [*small, f"lora.adapters=[{adapter}]"]

    def test_strength_moves_without_a_rebuild_and_back(self, lora: list[str], tmp_path: Path) -> None:
        plain = run_job(lora[:-1], tmp_path / "plain")
        on = run_job(lora, tmp_path / "on")
        off = run_job([*lora, "lora.strength=0"], tmp_path / "off")
        again = run_job(lora, tmp_path / "again")

        assert on.metrics["build/load_s"] > 0
        assert off.metrics["build/load_s"] == 0
        assert again.metrics["build/load_s"] == 0
        assert image_bytes(tmp_path / "off") == image_bytes(tmp_path / "plain")
        assert (
            image_bytes(tmp_path / "again") == image_bytes(tmp_path / "on") != image_bytes(tmp_path / "off")
        )
        assert on.metrics["lora/modules_matched"] > 0
        assert "lora/modules_matched" not in plain.metrics
        assert on.metrics["lora/overhead_ratio"] > 0

    def test_bake_and_dynamic_agree(self, lora: list[str], tmp_path: Path) -> None:
        dynamic = run_job([*lora, "lora.mode=dynamic"], tmp_path / "dynamic")
        bake = run_job([*lora, "lora.mode=bake"], tmp_path / "bake")
        # the same float model is the baseline of both
        floats = [
            {n: b for n, b in image_bytes(tmp_path / m).items() if "float" in n} for m in ("dynamic", "bake")
        ]

        assert floats[0] == floats[1]
        assert dynamic.metrics["quality/latent_rel_err"] < 0.02
        assert bake.metrics["quality/latent_rel_err"] < 0.02

    def test_a_lora_on_a_layer_that_stayed_float_works(self, small: list[str], tmp_path: Path) -> None:
        file = save_lora(
            tmp_path / "float_only.safetensors", random_pipeline().transformer, only="norm1.linear"
        )
        adapter = f"{{_target_: int8run.lora.config.Adapter, name: style, path: {file}, strength: 3.0}}"
        run_job(small, tmp_path / "plain")
        result = run_job([*small, f"lora.adapters=[{adapter}]"], tmp_path / "on")

        assert result.metrics["lora/modules_matched"] == 2
        assert result.metrics["quality/latent_rel_err"] < 0.02
        assert image_bytes(tmp_path / "on") != image_bytes(tmp_path / "plain")

    def test_zero_matches_are_an_error(self, small: list[str], tmp_path: Path) -> None:
        file = save_lora(
            tmp_path / "other.safetensors", random_pipeline().transformer, prefix="transformer.elsewhere."
        )
        adapter = f"{{_target_: int8run.lora.config.Adapter, name: other, path: {file}}}"

        with pytest.raises(
            LoraError, match=r"none of its .* modules and keys is in the model.*another architecture"
        ):
            run_job([*small, f"lora.adapters=[{adapter}]"], tmp_path)


def test_a_pipeline_without_a_denoiser_is_named() -> None:
    index = {
        "_class_name": "FluxPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["x", "Y"],
        "transformer": [None, None],
    }
    message = (
        r"FluxPipeline in /m has no denoiser: its components are tokenizer, "
        r"transformer, vae; .*transformer or transformer_2 or .* or unet.*$"
    )

    with pytest.raises(ConfigError, match=message):
        list_denoisers(index, "/m")


def test_backend_that_cannot_run_here_says_why(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"cpu_name": "old"})

    with pytest.raises(BackendError, match="backend 'onednn' cannot run here: needs a CPU with avx512_vnni"):
        run_job([*small, "backend=onednn"], tmp_path)


def test_a_baseline_that_comes_from_the_checked_file_is_said(
    model: str, small: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fp8 with scales: the float model has the same numbers, right or wrong."""
    tensors = {}
    for key, weight in load_file(f"{model}/transformer/diffusion_pytorch_model.safetensors").items():
        tensors[key] = weight
        if weight.dim() == 2:
            scale = weight.abs().max() / 448
            tensors |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
    file = tmp_path / "fp8.safetensors"
    save_file(tensors, file)
    words = [word for word in small if not word.startswith("model.location")]
    words += [f"model.location={file}", f"++model.base={model}"]

    found = run_job([*words, "metrics.baseline=run"], tmp_path / "a").metrics

    num_matrices = sum(key.endswith("weight_scale") for key in tensors)
    assert found["quality/float_layers_from_same_file"] == num_matrices
    assert "quality/psnr_db" in found
    assert f"The float model has the quantized numbers of {file} in {num_matrices} layers" in caplog.text
    caplog.clear()
    alone = run_job([*words, "metrics.baseline=none"], tmp_path / "b").metrics
    assert "quality/float_layers_from_same_file" not in alone
    assert "quantized numbers of" not in caplog.text


def test_unknown_attention_backend(small: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention=nope cannot be used here"):
        run_job([*small, "attention=nope"], tmp_path)


def test_unknown_sampler_argument(small: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler.extra.frames is not an argument of FluxPipeline"):
        run_job([*small, "+sampler.extra.frames=3"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", ["cpu", "onednn", "torch_int_mm"])
def test_compiled_blocks_give_the_same_images(small: list[str], tmp_path: Path, backend: str) -> None:
    result = run_job([*small, "compile=blocks", f"backend={backend}"], tmp_path)

    assert result.metrics["quality/latent_rel_err"] < 0.02


# -- outlier methods and roundings ---------------------------------------------------------------------------

OUTLIERS, ROUNDINGS = (
    sorted(file.stem for file in (CONF / group).glob("*.yaml")) for group in ("outlier", "rounding")
)


@pytest.fixture
def least(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One image of one step by the INT8 model alone; what is measured is remembered in the test's own
    folder.
    """
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return [
        *small,
        "sampler.steps=1",
        "prompts.prompts=[a]",
        "calibration.prompts=[b]",
        "calibration.num_timesteps=1",
        "metrics.baseline=none",
        "backend=reference",
        "progress=false",
    ]


def int8_rows(out: Path) -> list[dict[str, str]]:
    return [row for row in read_layers(out) if row["quantized"] == "true"]


# each method and each rounding at least once
DAILY_PAIRS = [(outlier, ROUNDINGS[i % len(ROUNDINGS)]) for i, outlier in enumerate(OUTLIERS)]


@pytest.mark.parametrize(
    ("outlier", "rounding"), slow_except(DAILY_PAIRS, itertools.product(OUTLIERS, ROUNDINGS))
)
def test_every_outlier_method_runs_with_every_rounding(
    least: list[str], tmp_path: Path, outlier: str, rounding: str
) -> None:
    run_job([*least, f"outlier={outlier}", f"rounding={rounding}", "metrics.baseline=run"], tmp_path)
    rows = int8_rows(tmp_path)

    assert len(rows) == 34

    for row in rows:
        assert row["rounding"] == rounding
        assert float(row["output_sqnr_db"]) > 20
        if outlier != "auto":
            assert row["outlier"].split()[0] == ("none" if row["outlier_why_not"] else outlier)

    assert any(row["outlier"].split()[0] == outlier for row in rows) or outlier == "auto"


TOO_NARROW = {width: ("none", f"in_features={width} is not a multiple of 128") for width in (8, 16, 32, 160)}
TREATED = {
    "none": dict.fromkeys((8, 16, 32, 128, 160, 256), ("none", "")),
    "convrot": {
        n: (f"convrot group_size={group}", "")
        for n, group in {8: 4, 16: 16, 32: 16, 128: 64, 160: 16, 256: 256}.items()
    },
    "quarot": TOO_NARROW | dict.fromkeys((128, 256), ("quarot group_size=128", "")),
    "hadanorm": TOO_NARROW | dict.fromkeys((128, 256), ("hadanorm group_size=128 alpha=0.5", "")),
    "smoothquant": dict.fromkeys((8, 16, 32, 128, 160, 256), ("smoothquant alpha=0.5", "")),
}


@pytest.mark.parametrize("outlier", TREATED)
def test_layers_csv_says_how_each_layer_is_treated_and_why_not(
    least: list[str], tmp_path: Path, outlier: str
) -> None:
    run_job([*least, "model_type=none", f"outlier={outlier}"], tmp_path)
    found = {
        (int(row["in_features"]), (row["outlier"], row["outlier_why_not"])) for row in read_layers(tmp_path)
    }

    assert found == set(TREATED[outlier].items())


def test_the_treatment_of_every_shipped_method_is_tested() -> None:
    assert set(TREATED) == set(OUTLIERS) - {"auto"}


def test_layers_that_stay_float_are_treated_in_no_way(least: list[str], tmp_path: Path) -> None:
    run_job([*least, "outlier=quarot"], tmp_path)
    for row in read_layers(tmp_path):
        if row["quantized"] == "false":
            assert row["why_not"]
            assert {
                row[c] for c in ("outlier", "outlier_why_not", "rounding", "backend_used", "weight_sqnr_db")
            } == {""}


@pytest.mark.parametrize("outlier", ["quarot", "hadanorm"])
def test_layers_that_a_method_cannot_take_are_counted_once(
    least: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, outlier: str
) -> None:
    run_job([*least, f"outlier={outlier}"], tmp_path)
    (said,) = (r for r in caplog.records if "cannot take" in r.getMessage())

    assert said.levelname == "WARNING"
    assert said.getMessage() == (
        f"outlier={outlier} cannot take 30 of 34 layers (28 × in_features=32 "
        f"is not a multiple of 128; 2 × in_features=160 is not a "
        "multiple of 128); these are plain INT8"
    )


def test_a_method_that_can_take_no_layer_is_one_line_and_code_2(least: list[str], command: Command) -> None:
    outcome = command(*least, "outlier=quarot", "outlier.group_size=256")

    assert (outcome.code, outcome.message) == (
        2,
        "outlier=quarot can take none of the 34 layers (28 × in_features=32 "
        "is not a multiple of 256; 4 × in_features=128 is not a "
        "multiple of 256; 2 × in_features=160 is not a multiple of 256); choose another outlier=",
    )


def test_costs_of_automatic_methods_are_kept_in_the_backends_table(least: list[str], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    # without the backend that would compile itself into this test's home
    run_job(
        [*least, "outlier=auto", "backend=auto", "~backend.candidates.cpu", f"backend.table={table}"],
        tmp_path,
    )
    known = read_entries(table)
    costs = [key for key in known if " | cost of " in key]

    assert any("cost of factor |" in key for key in costs)
    assert any("cost of regular rotation of 16 |" in key for key in costs)
    assert all(float(known[key]) > 0 for key in costs)
    assert not (tmp_path / "home").exists()


# -- save and int8.checkpoint --------------------------------------------------------------------------------


def pixels_in(out: Path) -> dict[str, bytes]:
    """The images without their text, which names the settings that were asked for."""
    return {p.name: Image.open(p).convert("RGB").tobytes() for p in sorted((out / "images").iterdir())}


SAVED_PAIRS = [*((name, "mse") for name in OUTLIERS), ("smoothquant", "gptq")]


@pytest.mark.parametrize(
    ("outlier", "rounding"), slow_except([("convrot", "mse"), ("smoothquant", "gptq")], SAVED_PAIRS)
)
def test_a_saved_model_generates_the_same_images(
    least: list[str], tmp_path: Path, outlier: str, rounding: str
) -> None:
    # fused layers cannot hold parts with factors of their own
    saved = tmp_path / ("m" if outlier in ("auto", "smoothquant", "hadanorm") else "m.safetensors")
    run_job([*least, f"outlier={outlier}", f"rounding={rounding}", f"save={saved}"], tmp_path / "a")
    run_job([*least, f"outlier={outlier}", f"int8.checkpoint={saved}"], tmp_path / "b")

    assert pixels_in(tmp_path / "a") == pixels_in(tmp_path / "b")

    one, two = (
        [row | {"output_sqnr_db": ""} for row in read_layers(tmp_path / out)] for out in "ab"
    )  # b has no float model

    assert one == two


@pytest.fixture(scope="module")
def rotated(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with outlier=convrot, as a file."""
    folder = tmp_path_factory.mktemp("rotated")
    process_cache.clear()
    small = [
        f"model.location={model}",
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=1",
        "prompts.prompts=[a]",
        "tracker=none",
    ]
    run_job(
        [
            *small,
            "outlier=convrot",
            "backend=reference",
            "metrics.baseline=none",
            f"save={folder / 'm.safetensors'}",
        ],
        folder,
    )
    return folder / "m.safetensors"


def test_a_saved_file_holds_the_whole_denoiser_and_how_it_was_made(rotated: Path, model: str) -> None:
    expected, tensors = random_pipeline().transformer.state_dict(), load_file(rotated)
    int8 = {key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")}

    # 34 Linears of diffusers; their authors have 3 of each of the 4 attentions in one, and 4 of each of the 2
    # single blocks
    assert len(int8) == 34 - 4 * 2 - 2 * 3
    assert all(tensors[f"{name}.weight"].dtype == torch.int8 for name in int8)

    beside = sum(t.numel() for key, t in tensors.items() if key.endswith(("weight_scale", "comfy_quant")))

    assert sum(t.numel() for t in tensors.values()) - beside == sum(t.numel() for t in expected.values())
    for own, key in (
        ("x_embedder.weight", "img_in.weight"),
        ("transformer_blocks.0.attn.to_out.0.bias", "double_blocks.0.img_attn.proj.bias"),
    ):
        assert torch.equal(tensors[key], expected[own])
        assert tensors[key].dtype == expected[own].dtype

    note = json.loads(read_header(rotated)[1]["int8run"])

    assert (note["model"], note["family"], note["outlier"], note["rounding"]) == (
        model,
        "flux",
        "convrot",
        "absmax",
    )
    assert (note["loras"], note["calibration"], note["quality_db"], len(note["kept_float"])) == (
        [],
        None,
        None,
        14,
    )
    assert note["kept_float"]["x_embedder"] == "input embedder"

    weights = Path(model) / "transformer" / "diffusion_pytorch_model.safetensors"

    assert note["source_sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}


def test_a_model_in_half_precision_is_saved_in_it(least: list[str], tmp_path: Path) -> None:
    saved, half = tmp_path / "saved", [*least, "model.dtype=bfloat16", "outlier=hadanorm"]
    run_job([*half, f"save={saved}"], tmp_path / "a")
    run_job([*half, f"int8.checkpoint={saved}"], tmp_path / "b")

    assert pixels_in(tmp_path / "a") == pixels_in(tmp_path / "b")

    found = {
        key.rpartition(".")[2]: set() for key in load_file(saved / "diffusion_pytorch_model.safetensors")
    }
    for key, tensor in load_file(saved / "diffusion_pytorch_model.safetensors").items():
        found[key.rpartition(".")[2]].add(tensor.dtype)

    assert found["bias"] == {torch.bfloat16}
    assert found["weight"] == {torch.int8, torch.bfloat16}
    assert found["weight_scale"] == found["pre_quant_scale"] == {torch.float32}, (
        "what the integers need is never rounded to half"
    )


def test_a_checkpoint_can_be_saved_again(least: list[str], rotated: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    run_job([*least, "outlier=auto", f"int8.checkpoint={rotated}", f"save={again}"], tmp_path)
    one, two = load_file(rotated), load_file(again)

    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)

    note = json.loads(read_header(again)[1]["int8run"])

    assert (note["rounding"], note["checkpoint"], note["settings"]) == ("absmax", str(rotated), {})


def test_a_model_may_be_saved_in_place_of_its_own_checkpoint(
    least: list[str], rotated: Path, tmp_path: Path
) -> None:
    place = tmp_path / "m.safetensors"
    place.write_bytes(rotated.read_bytes())
    run_job([*least, "outlier=auto", f"int8.checkpoint={place}", f"save={place}"], tmp_path)
    one, two = load_file(rotated), load_file(place)

    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_checkpoint_treated_otherwise_than_asked_is_one_line_and_code_3(
    least: list[str], rotated: Path, command: Command
) -> None:
    outcome = command(*least, "outlier=smoothquant", f"int8.checkpoint={rotated}")

    assert outcome.code == 3
    assert outcome.message.startswith(
        f"{rotated} contradicts outlier=smoothquant in 34 of 34 layers (transformer_blocks"
    )
    assert outcome.message.endswith("; set outlier=auto to use what the file has, or quantize again")


def test_a_checkpoint_that_is_not_there_is_one_line_and_code_3(least: list[str], command: Command) -> None:
    outcome = command(*least, "int8.checkpoint=absent.safetensors")

    assert outcome.code == 3
    assert outcome.message.startswith("int8.checkpoint=absent.safetensors: no such file (looked for /")


def test_a_place_that_cannot_be_written_is_one_line_and_code_3(least: list[str], command: Command) -> None:
    (command.folder / "m.safetensors").mkdir()
    outcome = command(*least, "save=m.safetensors")

    assert outcome.code == 3
    assert "m.safetensors cannot be written: " in outcome.message
    assert "folder" in outcome.message


def test_a_checkpoint_of_another_models_weights_is_refused(
    least: list[str], rotated: Path, tmp_path: Path
) -> None:
    other = save_random_pipeline(tmp_path / "other", seed=1)

    with pytest.raises(FileError, match=r"does not hold this model's weight \(SQNR -\d.* dB"):
        run_job(
            [*least, f"model.location={other}", "outlier=convrot", f"int8.checkpoint={rotated}"], tmp_path
        )


def test_the_layers_of_a_checkpoint_are_int8_whatever_the_family_says(
    least: list[str], rotated: Path, tmp_path: Path
) -> None:
    run_job([*least, "model_type=none", "outlier=convrot", f"int8.checkpoint={rotated}"], tmp_path)

    assert len(int8_rows(tmp_path)) == 34

    note = json.loads(read_header(rotated)[1]["int8run"])

    assert {row["name"]: row["why_not"] for row in read_layers(tmp_path) if row["why_not"]} == note[
        "kept_float"
    ]


class TestBudget:
    """model_type.mixed_precision=auto, on calibration images that are also those of the run."""

    @pytest.fixture
    def budget(self, least: list[str]) -> list[str]:
        return [
            *least,
            "model_type.mixed_precision=auto",
            "int8.attention=float",  # else auto with a quality alone; test_run_attention has it
            "sampler.steps=2",
            "prompts.prompts=[b]",
            "seed=1000",
            "metrics.baseline=run",
        ]

    def test_layers_stay_float_until_the_images_are_as_close_as_asked(
        self, budget: list[str], tmp_path: Path
    ) -> None:
        free = run_job([*budget, "quality_db=1"], tmp_path / "free").metrics

        assert (free["budget/layers_kept"], free["quant/layers_int8"]) == (0, 34)
        assert (
            free["budget/reached_db"] == free["budget/without_db"] == pytest.approx(decibels(free), abs=1e-3)
        )

        asked = free["budget/without_db"] + 3
        saved = tmp_path / "saved"
        met = run_job([*budget, f"quality_db={asked}", f"save={saved}"], tmp_path / "met").metrics

        assert met["budget/without_db"] == free["budget/without_db"]
        assert met["budget/asked_db"] == asked
        # the run draws the calibration's own images, so that it must measure what the budget promised
        assert asked <= met["budget/reached_db"] == pytest.approx(decibels(met), abs=1e-3)

        kept = [
            row
            for row in read_layers(tmp_path / "met")
            if row["why_not"].startswith("quality budget: alone it makes ")
        ]

        assert len(kept) == met["budget/layers_kept"] > 0
        assert met["quant/layers_int8"] == 34 - len(kept)
        assert all(
            row["why_not"].endswith("% of all layers' error") and row["backend_used"] == row["outlier"] == ""
            for row in kept
        )
        assert met["budget/memory_ratio"] > 1

        # in the file these layers are float, too
        run_job([*budget, "model_type.mixed_precision=none", f"int8.checkpoint={saved}"], tmp_path / "read")

        assert pixels_in(tmp_path / "met") == pixels_in(tmp_path / "read")
        assert {row["name"] for row in int8_rows(tmp_path / "read")} == {
            row["name"] for row in int8_rows(tmp_path / "met")
        }

    @pytest.mark.slow
    def test_a_checkpoint_can_be_brought_within_a_budget(
        self, budget: list[str], rotated: Path, tmp_path: Path
    ) -> None:
        metrics = run_job(
            [*budget, "outlier=auto", f"int8.checkpoint={rotated}", "quality_db=70"], tmp_path
        ).metrics

        assert metrics["budget/reached_db"] >= 70
        assert metrics["budget/layers_kept"] > 0
        assert {row["outlier"].split()[0] for row in int8_rows(tmp_path)} == {"convrot"}

    def test_what_the_budget_paid_is_said(self, budget: list[str], command: Command) -> None:
        outcome = command(*budget, "quality_db=1")

        assert outcome.code == 0
        assert "\nquality budget 1 dB: met at " in outcome.out

    def test_a_budget_beyond_reach_is_one_line_and_code_2(self, budget: list[str], command: Command) -> None:
        outcome = command(*budget, "quality_db=200")

        assert outcome.code == 2
        assert outcome.message.startswith("quality_db=200 is met by the float model alone: ")


def decibels(metrics: dict[str, float]) -> float:
    return -20 * math.log10(metrics["quality/latent_rel_err"])


@pytest.mark.slow
def test_a_checkpoint_takes_dynamic_loras_and_no_other_baked_ones(
    least: list[str], rotated: Path, tmp_path: Path
) -> None:
    file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer)
    adapter = f"_target_: int8run.lora.config.Adapter, name: style, path: {file}, strength: 0.01"
    lora = f"lora.adapters=[{{{adapter}}}]"
    run_job([*least, "outlier=convrot", lora, "lora.mode=dynamic"], tmp_path / "made")
    run_job(
        [*least, "outlier=convrot", lora, "lora.mode=dynamic", f"int8.checkpoint={rotated}"],
        tmp_path / "read",
    )

    assert pixels_in(tmp_path / "made") == pixels_in(tmp_path / "read")
    # so weak a LoRA could not be told from rounding by the weights
    with pytest.raises(
        FileError,
        match=r"was made with no LoRA baked in, this run bakes style "
        r"0\.01; for LoRAs on top of it set lora\.mode=dynamic",
    ):
        run_job(
            [*least, "outlier=convrot", lora, "lora.mode=bake", f"int8.checkpoint={rotated}"],
            tmp_path / "bake",
        )

    baked = tmp_path / "baked.safetensors"
    run_job([*least, "outlier=convrot", lora, "lora.mode=bake", f"save={baked}"], tmp_path / "bake")
    run_job(
        [*least, "outlier=convrot", lora, "lora.mode=bake", f"int8.checkpoint={baked}"], tmp_path / "again"
    )

    assert pixels_in(tmp_path / "bake") == pixels_in(tmp_path / "again")


def test_a_busy_machine_is_named():
    steady = {
        "speed/step_ms_p50": 5.0,
        "speed/step_ms_p90": 9.0,
        "float/step_ms_p50": 10.0,
        "float/step_ms_p90": 12.0,
    }

    assert not has_scattered_times(steady)
    assert not has_scattered_times({})
    assert has_scattered_times(steady | {"speed/step_ms_p90": 11.0})
    assert has_scattered_times(steady | {"float/step_ms_p90": 21.0})


def test_images_that_are_no_numbers_are_refused() -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    check_latents(Generation(trajectories=[good]), "INT8")

    with pytest.raises(
        FileError,
        match=r"^the latents of 1 of 2 samples of the INT8 model "
        r"are NaN or infinite; its weights are damaged",
    ):
        check_latents(Generation(trajectories=[good, bad]), "INT8")


def test_the_model_is_looked_for_before_its_loras(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise FileError("the model is gated")

    monkeypatch.setattr("int8run.models.model_folders.check_repository", refuse)

    with pytest.raises(FileError, match=r"^the model is gated$"):
        run_job(["model=flux", "lora=stack_a", "tracker=none"], tmp_path / "out")
