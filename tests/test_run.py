"""One run from settings to files, on a random FluxPipeline of diffusers' real classes."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import without_vnni
from jobs import make_spec, run_job, save_lora
from PIL import Image
from tiny_pipeline import random_pipeline, save_random_pipeline

from int8run import memo
from int8run.build import build
from int8run.errors import BackendError, ConfigError, LoraError
from int8run.generate.prompts import samples
from int8run.layers.linear import Int8Linear
from int8run.models.loader import find_denoiser
from int8run.report.terminal import Progress
from int8run.run import scattered

CONTRACT = {
    "speed/step_ms_p50", "speed/step_ms_p90", "speed/images_per_s", "speed/ratio_vs_float", "build/load_s", "build/quantize_s",
    "memory/denoiser_bytes", "memory/denoiser_ratio", "memory/text_encoder_bytes", "memory/peak_bytes", "quality/psnr_db",
    "quality/ssim", "quality/latent_rel_err", "quant/layers_int8", "quant/layers_float", "quant/weight_sqnr_db_mean",
    "quant/weight_sqnr_db_min", "quant/output_sqnr_db_mean", "quant/output_sqnr_db_min", "quant/fallback_layers",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`model.location=…` of a random pipeline, with small settings that every test shares."""
    return str(save_random_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def small(model: str) -> list[str]:
    memo.forget()
    return [f"model.location={model}", "sampler.height=16", "sampler.width=16", "sampler.steps=3", "prompts.prompts=[a,b]", "tracker=none"]


def read_layers(out: Path) -> list[dict[str, str]]:
    with (out / "layers.csv").open() as file:
        return list(csv.DictReader(file))


def image_bytes(out: Path) -> dict[str, bytes]:
    return {p.name: Image.open(p).tobytes() for p in sorted((out / "images").iterdir())}


def test_a_run_leaves_everything(small: list[str], tmp_path: Path) -> None:
    metrics = run_job(small, tmp_path).metrics
    assert set(metrics) >= CONTRACT
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "environment.json", "grid.png", "images", "layers.csv", "metrics.json"}
    assert len(list((tmp_path / "images").iterdir())) == 4  # two prompts, float and INT8
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["metrics"]["quality/psnr_db"] == metrics["quality/psnr_db"] and len(saved["images"]) == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["location"] == small[0].removeprefix("model.location=")
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
    memo.forget()
    run_job(small, tmp_path / "b")
    assert image_bytes(tmp_path / "a") == image_bytes(tmp_path / "b")


@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
def test_two_backends_in_one_process_do_not_see_each_other(small: list[str]) -> None:
    first, second = (
        build(make_spec([*small, f"backend={name}"]), samples(["a"], 1, 0), Progress(False)) for name in ("reference", "torch_int_mm")
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
    assert metrics["quality/psnr_db"] == float("inf") and metrics["memory/denoiser_ratio"] == 1
    assert "quant/layers_int8" not in metrics
    assert '"quality/psnr_db": "inf"' in (tmp_path / "metrics.json").read_text()


def test_without_a_baseline_only_int8_runs(small: list[str], tmp_path: Path) -> None:
    metrics = run_job([*small, "metrics.baseline=none"], tmp_path).metrics
    assert "quality/psnr_db" not in metrics and "speed/ratio_vs_float" not in metrics and metrics["speed/step_ms_p50"] > 0
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_a_batch_does_not_change_whose_noise_a_picture_gets(small: list[str], tmp_path: Path) -> None:
    run_job([*small, "int8.enable=false"], tmp_path / "a")
    memo.forget()
    run_job([*small, "int8.enable=false", "sampler.batch=2"], tmp_path / "b")
    pairs = zip(image_bytes(tmp_path / "a").values(), image_bytes(tmp_path / "b").values(), strict=True)
    # a larger batch may round differently by one step of 255
    assert all(max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1 for a, b in pairs)


def test_model_type_none_quantizes_everything(small: list[str], tmp_path: Path) -> None:
    run_job([*small, "model_type=none"], tmp_path)
    assert {r["quantized"] for r in read_layers(tmp_path)} == {"true"}


def test_nothing_converted_is_an_error(small: list[str], tmp_path: Path) -> None:
    keep = "model_type.keep_float=[{_target_: int8run.models.family.KeepRule, pattern: '*', why: asked}]"
    with pytest.raises(ConfigError, match=r"no layer became INT8 \(48 × asked\).*model_type=.*int8.enable=false"):
        run_job([*small, "model_type=flux", keep], tmp_path)


class TestLora:
    """A stack of one LoRA on the random model; the real ones are in test_tiny_model.py."""

    @pytest.fixture
    def lora(self, small: list[str], tmp_path: Path) -> list[str]:
        file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer)
        adapter = f"{{_target_: int8run.lora.stack.Adapter, name: style, path: {file}, strength: 1.0}}"
        return [*small, f"lora.adapters=[{adapter}]"]

    def test_strength_moves_without_a_rebuild_and_back(self, lora: list[str], tmp_path: Path) -> None:
        plain = run_job(lora[:-1], tmp_path / "plain")
        on = run_job(lora, tmp_path / "on")
        off = run_job([*lora, "lora.strength=0"], tmp_path / "off")
        again = run_job(lora, tmp_path / "again")
        assert on.metrics["build/load_s"] > 0 and off.metrics["build/load_s"] == 0 and again.metrics["build/load_s"] == 0
        assert image_bytes(tmp_path / "off") == image_bytes(tmp_path / "plain")
        assert image_bytes(tmp_path / "again") == image_bytes(tmp_path / "on") != image_bytes(tmp_path / "off")
        assert on.metrics["lora/modules_matched"] > 0 and "lora/modules_matched" not in plain.metrics
        assert on.metrics["lora/overhead_ratio"] > 0

    def test_bake_and_dynamic_agree(self, lora: list[str], tmp_path: Path) -> None:
        dynamic = run_job([*lora, "lora.mode=dynamic"], tmp_path / "dynamic")
        bake = run_job([*lora, "lora.mode=bake"], tmp_path / "bake")
        # the same float model is the baseline of both
        floats = [{n: b for n, b in image_bytes(tmp_path / m).items() if "float" in n} for m in ("dynamic", "bake")]
        assert floats[0] == floats[1]
        assert dynamic.metrics["quality/latent_rel_err"] < 0.02 and bake.metrics["quality/latent_rel_err"] < 0.02

    def test_a_lora_on_a_layer_that_stayed_float_works(self, small: list[str], tmp_path: Path) -> None:
        file = save_lora(tmp_path / "float_only.safetensors", random_pipeline().transformer, only="norm1.linear")
        adapter = f"{{_target_: int8run.lora.stack.Adapter, name: style, path: {file}, strength: 3.0}}"
        run_job(small, tmp_path / "plain")
        result = run_job([*small, f"lora.adapters=[{adapter}]"], tmp_path / "on")
        assert result.metrics["lora/modules_matched"] == 2 and result.metrics["quality/latent_rel_err"] < 0.02
        assert image_bytes(tmp_path / "on") != image_bytes(tmp_path / "plain")

    def test_zero_matches_are_an_error(self, small: list[str], tmp_path: Path) -> None:
        file = save_lora(tmp_path / "other.safetensors", random_pipeline().transformer, prefix="transformer.elsewhere.")
        adapter = f"{{_target_: int8run.lora.stack.Adapter, name: other, path: {file}}}"
        with pytest.raises(LoraError, match=r"none of its .* modules is in the model.*another architecture"):
            run_job([*small, f"lora.adapters=[{adapter}]"], tmp_path)


def test_a_pipeline_without_a_denoiser_is_named() -> None:
    pipe = random_pipeline()
    pipe.register_modules(transformer=None)
    with pytest.raises(ConfigError, match=r"FluxPipeline has no denoiser: its components are .*tokenizer.*transformer or unet"):
        find_denoiser(pipe)


def test_backend_that_cannot_run_here_says_why(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"cpu_name": "old"})
    with pytest.raises(BackendError, match="backend 'onednn' cannot run here: needs a CPU with avx512_vnni"):
        run_job([*small, "backend=onednn"], tmp_path)


def test_unknown_attention_backend(small: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention=nope cannot be used with FluxTransformer2DModel"):
        run_job([*small, "attention=nope"], tmp_path)


def test_unknown_sampler_argument(small: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler.extra.frames is no argument of FluxPipeline"):
        run_job([*small, "+sampler.extra.frames=3"], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", ["vnni", "onednn", "torch_int_mm"])
def test_compiled_blocks_give_the_same_pictures(small: list[str], tmp_path: Path, backend: str) -> None:
    result = run_job([*small, "compile=blocks", f"backend={backend}"], tmp_path)
    assert result.metrics["quality/latent_rel_err"] < 0.02


def test_a_busy_machine_is_named():
    steady = {"speed/step_ms_p50": 5.0, "speed/step_ms_p90": 9.0, "float/step_ms_p50": 10.0, "float/step_ms_p90": 12.0}
    assert not scattered(steady) and not scattered({})
    assert scattered(steady | {"speed/step_ms_p90": 11.0}) and scattered(steady | {"float/step_ms_p90": 21.0})
