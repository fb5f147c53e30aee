"""Each script of `experiments/` does in small what it does in full; the slow ones start processes."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from report.run_folders import make_metrics, write_run
from safetensors.torch import save_file
from support.cli_process import command_in
from support.experiment_script import EXPERIMENTS, find_exit_code, run_script

from int8run.backends.cpu import Cpu
from int8run.config.compose import compose_jobs
from int8run.errors import BackendError
from int8run.kernels.cpu.instructions import list_instruction_sets
from int8run.models.family import ModelFamily, load_families

Capture = pytest.CaptureFixture[str]
REFUSED = Cpu().limits.unsupported_reasons(torch.device("cpu"))
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TINY_JOB = ("sampler.steps=1", "tracker=none", "metrics.layers=false", "metrics.system_s=0")


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with file.open() as lines:
        return list(csv.DictReader(lines))


def run_small_sweep(folder: Path, *overrides: str) -> Path:
    """A sweep in this process. Returns its folder."""
    with pytest.MonkeyPatch.context() as patch, command_in(folder, patch, None) as command:
        outcome = command("-m", *overrides, *TINY_JOB, "hydra.sweep.dir=sweep")
    assert outcome.code == 0
    return folder / "sweep"


@pytest.fixture(scope="module")
def lora_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs of the INT8 model with two LoRAs."""
    strengths = ("lora=stack_a", "lora.adapters.0.strength=0,1", "prompts.prompts=[fox]")
    return run_small_sweep(tmp_path_factory.mktemp("loras"), *strengths)


@pytest.fixture(scope="module")
def encoder_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs of the float model with different text encoders."""
    encoders = ("clip=keep,int8_rowwise", "int8.enable=false", "prompts.prompts=[parrot,strawberry]")
    return run_small_sweep(tmp_path_factory.mktemp("encoders"), *encoders)


# -- one layer, one forward --------------------------------------------------------------------------


@pytest.mark.slow
def test_cpu_forward_prints_a_row_for_each_variant(capsys: Capture) -> None:
    run_script("cpu_forward/bench.py", "--rounds", "1", "--batches", "1", "--backends", "reference")

    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[1:3] for row in rows] == [["reference", "none"], ["reference", "convrot"]]


@pytest.mark.slow
def test_attention_prints_errors_of_each_treatment_and_part(capsys: Capture) -> None:
    run_script("attention/errors.py", "--queries", "4", "--keys", "300", "--prompts", "fox")

    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| ")]
    assert [len(row) for row in rows] == [10] * 15
    assert rows[4][0] == "| rotated by 64"
    # dB of the shipped model's layers and of keys with an outlier, rotated
    assert all(float(cell) > 35 for cell in rows[4][1:6])
    assert float(rows[4][8]) > float(rows[1][8]) + 5


@pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}")
def test_attention_prints_a_speed_for_each_variant(capsys: Capture) -> None:
    run_script("attention/speed.py", "--rounds", "1", "--sizes", "tiny, batch 1")

    rows = capsys.readouterr().out.splitlines()[4:]
    treated = ["INT8, rotated by 64", "INT8, keys centered"]
    names = [row.split(" | ")[2] for row in rows]
    assert names == ["float32", "bfloat16", "INT8", "INT8 of bfloat16", *treated]


@pytest.mark.slow  # several seconds
@pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}")
def test_convolutions_prints_its_tables(capsys: Capture) -> None:
    small = ("--models", "SD1.5", "--channels", "320")
    run_script("convolutions/layers.py", "errors", *small)

    *_, row, mean, worst = capsys.readouterr().out.splitlines()
    assert row.startswith("| SD1.5 | 1x1 320 to")
    for line in (mean, worst):
        numbers = [float(cell) for cell in line.split("|")[3:-1]]
        assert len(numbers) == 6
        assert numbers[4] > 40  # what the kernels do
    run_script("convolutions/layers.py", "speed", *small, "--rounds", "1")

    total, _, last = capsys.readouterr().out.splitlines()[-3:]
    assert total.startswith("| all of a step | ")
    assert last.startswith("With bfloat16 in and out, INT8 is ")


@pytest.mark.slow  # several seconds
@pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}")
def test_a_unets_step_prints_a_row_for_each_part_in_int8(capsys: Capture) -> None:
    run_script("convolutions/unet.py", "--small", "--latent", "16", "--rounds", "1")

    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0].strip("| ") for row in rows] == [
        "float32",
        "bfloat16",
        "INT8 Linears",
        "+ convolutions",
        "+ attention",
    ]
    linears, convolutions, attention = (float(row[1]) for row in rows[2:])
    assert linears < convolutions <= attention


def test_call_overhead_prints_a_row_for_each_layer(capsys: Capture) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    run_script("gpu/call_overhead.py", "--rounds", "2")

    rows = capsys.readouterr().out.splitlines()[1:]
    names = [row[:19].strip() for row in rows]
    assert names == ["F.linear", "nn.Linear", "Int8Linear", "Int8Linear, rotated"]
    assert all(float(row.split()[-2]) > 0 for row in rows)


@pytest.mark.slow
def test_families_prints_the_models_that_are_asked_for(capsys: Capture) -> None:
    run_script("families/table.py", "SD1.5")

    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("| sd15 | SD1.5 |")


def test_every_family_has_a_row_of_its_full_size() -> None:
    rows = yaml.safe_load((EXPERIMENTS / "families" / "models.yaml").read_text())

    assert {row["family"] for row in rows} == set(load_families())


@pytest.mark.slow  # several seconds
def test_families_counts_models_that_choose_rows_by_masks(capsys: Capture) -> None:
    run_script("families/table.py", "HunyuanImage", "GLM-Image", "Qwen-Image 2.1")

    cells = [row.split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    # INT8 and float Linears, parameters in 10⁹: as many as the authors publish
    assert [(row[1], row[3], row[4]) for row in cells] == [
        ("Qwen-Image 2.1", "224 / 8", "7.12"),
        ("HunyuanImage 2.1", "440 / 106", "17.43"),
        ("GLM-Image", "180 / 41", "6.93"),
    ]


@pytest.mark.slow  # builds every model of models.yaml on the meta device
def test_a_drafted_family_finds_what_the_shipped_one_says(tmp_path: Path, capsys: Capture) -> None:
    flux = load_families()["flux"]
    config = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **config}))
    # x_embedder.weight under a name that no key mapping knows
    save_file({"patchify.weight": torch.zeros(16, 64)}, tmp_path / "new.safetensors")
    files = ("--config", tmp_path / "config.json", "--file", tmp_path / "new.safetensors")

    run_script("families/draft.py", "FluxTransformer2DModel", "--name", "flux_draft", *files)

    page = capsys.readouterr().out
    settings = yaml.safe_load(page)
    settings.pop("_target_")
    draft = ModelFamily(**settings)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (draft.find_skip_reason(name) is None) == (flux.find_skip_reason(name) is None), name
    assert set(draft.blocks) == set(flux.blocks)
    assert set(draft.deferred_gelu) < set(flux.deferred_gelu), "all but the one that joins attention and MLP"
    assert draft.fingerprints[0].matches(set(model.state_dict()))
    assert "#   patchify.weight [16x64]: x_embedder.weight" in page


def test_verdicts_counts_the_prompts_that_each_pair_needs(tmp_path: Path, capsys: Capture) -> None:
    further = {"quality/psnr_db_median": 50.0, "quality/latent_rel_err": 0.01}
    for number, psnr in enumerate((50.0, 50.01, 45.0)):
        metrics = make_metrics(psnr=psnr, **further)
        write_run(tmp_path, number, [f"outlier={number}"], metrics=metrics, num_samples=12)

    run_script("verdicts/verdicts.py", tmp_path, "--draws", "20", "--out", tmp_path / "results")

    pairs = read_table(tmp_path / "results" / "pairs.csv")
    assert len(read_table(tmp_path / "results" / "methods.csv")) == 3
    assert [row["told apart"] for row in pairs] == ["no", *["yes, the first is closer"] * 2]
    assert pairs[1]["prompts by drawing"] == "2" and int(pairs[1]["unpaired"]) > 2
    assert "| outlier=0 | outlier=1 |" in capsys.readouterr().out


def test_fidelity_compares_methods_on_planted_layers(tmp_path: Path, capsys: Capture) -> None:
    run_script("fidelity/layers.py", "--sources", "gaussian", "--width", "16", "--out", tmp_path)

    rows = read_table(tmp_path / "layers.csv")
    assert {row["layer"] for row in rows} == {"gaussian", "common mean 3"}
    assert "| gaussian, gptq |" in capsys.readouterr().out


def test_fidelity_plots_every_layer(tmp_path: Path) -> None:
    results = tmp_path / "results"
    shutil.copytree(EXPERIMENTS / "fidelity" / "results", results)

    run_script("fidelity/plots.py", "layers", "--results", results)

    assert (tmp_path / "layers.png").is_file()


@pytest.mark.parametrize(("what", "rows"), [("errors", 8), ("times", 8)])
def test_lora_modes_writes_a_table(what: str, rows: int, tmp_path: Path) -> None:
    run_script("lora_modes/layers.py", what, "--quick", "--out", tmp_path)

    (table,) = tmp_path.iterdir()
    assert len(read_table(table)) == rows


def test_streaming_writes_a_checkpoint_of_flux_layers(tmp_path: Path) -> None:
    run_script("streaming/make_flux.py", tmp_path, "--doubles", "1", "--singles", "0", "--heads", "1")

    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert "transformer_blocks.0.attn.to_out.0.weight" in index["weight_map"]


# -- what is read of a sweep -------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_modes_puts_strengths_side_by_side(lora_sweep: Path, tmp_path: Path) -> None:
    run_script("lora_modes/grid.py", lora_sweep, "--out", tmp_path / "grid.png")

    assert (tmp_path / "grid.png").is_file()


@pytest.mark.slow
def test_fidelity_has_a_line_for_each_job(lora_sweep: Path, capsys: Capture) -> None:
    # the layers' SQNR is not measured by small jobs
    for job in lora_sweep.glob("[0-9]*"):
        metrics = json.loads((job / "metrics.json").read_text())
        metrics["metrics"].setdefault("quant/output_sqnr_db_mean", 40.0)
        (job / "metrics.json").write_text(json.dumps(metrics))

    run_script("fidelity/images.py", "--sweep", lora_sweep)

    assert len(capsys.readouterr().out.splitlines()) == 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize("image", ["pareto", "drift"])
def test_fidelity_plots_a_sweep(image: str, lora_sweep: Path, tmp_path: Path) -> None:
    run_script("fidelity/plots.py", image, "--sweep", lora_sweep, "--out", tmp_path / "plot.png")

    assert (tmp_path / "plot.png").is_file()


@pytest.mark.slow
def test_text_encoders_shows_what_formats_change(encoder_sweep: Path, tmp_path: Path) -> None:
    run_script("text_encoders/images.py", "--sweep", encoder_sweep, "--out", tmp_path)

    rows = read_table(tmp_path / "results" / "images.csv")
    assert [row["format"] for row in rows] == ["keep", "int8_rowwise"]
    assert (tmp_path / "images.png").is_file()


# -- text encoders -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_text_encoders_are_measured_in_every_part(tmp_path: Path) -> None:
    case = ("--cases", "tiny_clip", "--formats", "int8_rowwise", "--parts", "quality", "time", "wo")
    folders = ("--work", tmp_path / "work", "--out", tmp_path / "out")

    run_script("text_encoders/measure.py", "--quick", *case, *folders)

    tables = {path.stem: read_table(path) for path in (tmp_path / "out").glob("*.csv")}
    assert set(tables) == {"quality", "time", "wo"}
    assert {row["format"] for row in tables["quality"]} == {"bfloat16", "int8_rowwise"}


def test_text_encoders_prints_every_table(capsys: Capture) -> None:
    run_script("text_encoders/tables.py")

    text = capsys.readouterr().out
    for title in ("Cosine to the float", "Whole encoders at full size", "Seconds from file", "Images of the"):
        assert title in text


def test_text_encoders_plots_quality_and_speed(tmp_path: Path) -> None:
    run_script("text_encoders/plots.py", "--out", tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality.png", "speed.png"]


# -- benchmarks of several processes -----------------------------------------------------------------


@pytest.mark.slow
def test_linear_bench_times_methods_beside_float(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    small = ("--no-gate", "--shapes", "16x64x64", "--seconds", "0.1", "--only", "int8run reference")

    run_script("linear_bench/bench.py", *small, "--json", report)

    methods = json.loads(report.read_text())["shapes"]["16x64x64"]
    assert all("ms" in methods[name] for name in ("fp32", "int8run reference", "int8run reference, convrot"))


@pytest.mark.slow
@pytest.mark.skipif(not list_instruction_sets(), reason="the CPU kernels: no instruction set")
def test_linear_bench_compares_instruction_sets_with_their_most(tmp_path: Path, capsys: Capture) -> None:
    report, name = tmp_path / "report.json", list_instruction_sets()[-1]
    small = ("--no-gate", "--shapes", "16x64x64", "--seconds", "0.1", "--only", "bf16", f"cpu, {name}")

    run_script("linear_bench/bench.py", "--table", "instructions", *small, "--json", report)

    found = json.loads(report.read_text())
    methods = found["shapes"]["16x64x64"]
    own = methods[f"int8run cpu, {name}"]
    assert set(methods) == {"fp32", "bf16", "int8run cpu, bf16 in and out", f"int8run cpu, {name}"}
    assert 0 < own["gops"] < found["peaks"][name]
    assert f"| {name} | {found['peaks'][name]:.0f} | " in capsys.readouterr().out


@pytest.mark.slow
def test_model_bench_times_variants_beside_float(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    small = ("--no-gate", "--size", "tiny", "--seconds", "0.1", "--only", "int8run reference eager")

    run_script("model_bench/bench.py", *small, "--profile", "--json", report)

    variants = json.loads(report.read_text())["variants"]
    assert set(variants) == {"fp32 eager", "int8run reference eager"}
    assert all(record["operators"] for record in variants.values())


@pytest.mark.parametrize("script", ["linear_bench/gpu.py", "model_bench/gpu.py"])
def test_gpu_benchmarks_say_that_they_need_one(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    code = find_exit_code(script)

    assert code == BackendError.exit_code
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_linear_bench_for_a_gpu_runs_dry_on_a_cpu(tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "report.json"
    dry = ("--device", "cpu", "--no-gate", "--models", "flux", "--rounds", "1", "--only", "int8run triton")

    run_script("linear_bench/gpu.py", *dry, "--json", report)

    sizes = json.loads(report.read_text())["sizes"]
    assert len(sizes) == 11
    for size in sizes:
        assert max(size["layers"][0][length] for length in "mkn") <= 288, "tiny"
        for name in ("bf16 cuBLAS", "int8run triton", "int8run triton, convrot", "int8run triton, LoRA r64"):
            assert size["methods"][name].get("us", 0) > 0, size["methods"][name]
    assert "a dry run on a CPU" in capsys.readouterr().out


@pytest.mark.slow
def test_model_bench_for_a_gpu_runs_dry_on_a_cpu(tmp_path: Path) -> None:
    dry = ("--device", "cpu", "--no-gate", "--size", "tiny", "--rounds", "1", "--only", "int8run triton")

    run_script("model_bench/gpu.py", *dry, "--json", tmp_path / "report.json")

    timed = json.loads((tmp_path / "report.json").read_text())["timed"]
    builds = ("bf16", "int8run triton", "int8run triton, convrot")
    assert set(timed) == {f"{name} {mode}" for name in builds for mode in ("eager", "compile=blocks")}


@pytest.mark.slow
@pytest.mark.gpu
@NEEDS_GPU
def test_linear_bench_times_methods_on_a_gpu(tmp_path: Path) -> None:
    small = ("--no-gate", "--no-tune", "--models", "flux", "--rounds", "2", "--only", "int8run triton")

    run_script("linear_bench/gpu.py", *small, "--json", tmp_path / "report.json")

    sizes = json.loads((tmp_path / "report.json").read_text())["sizes"]
    assert all("us" in size["methods"]["int8run triton"] for size in sizes)


@pytest.mark.slow
@pytest.mark.gpu
@NEEDS_GPU
def test_model_bench_times_variants_on_a_gpu(tmp_path: Path) -> None:
    small = ("--no-gate", "--size", "tiny", "--rounds", "2", "--only", "int8run triton")

    run_script("model_bench/gpu.py", *small, "--json", tmp_path / "report.json")

    assert "int8run triton eager" in json.loads((tmp_path / "report.json").read_text())["timed"]


# -- commands of their own ---------------------------------------------------------------------------


@pytest.mark.slow
def test_lora_modes_sweeps_over_strengths(tmp_path: Path) -> None:
    small = ("--seeds", "1", "--stacks", "gloss", "--modes", "bake", "--outliers", "none")

    run_script("lora_modes/images.py", *small, "--work", tmp_path, "--out", tmp_path / "table.csv")

    rows = read_table(tmp_path / "table.csv")
    assert [row["strength"] for row in rows] == ["0.5", "1"]


@pytest.mark.slow
def test_streaming_measures_copies_and_runs(tmp_path: Path, capsys: Capture) -> None:
    checkpoint = tmp_path / "checkpoint"
    run_script("streaming/make_flux.py", checkpoint, "--doubles", "1", "--singles", "1", "--heads", "2")

    run_script("streaming/measure.py", checkpoint, tmp_path / "copies", "--rounds", "1")
    measured = capsys.readouterr().out
    run_script("streaming/build.py", checkpoint, tmp_path / "work", "--size", "64")
    built = json.loads(capsys.readouterr().out)

    assert "1 layers agree with the definition" in measured
    assert built["quant/layers_int8"] > 0


@pytest.mark.slow
def test_streaming_quantizes_a_gguf_file(tmp_path: Path, capsys: Capture) -> None:
    size = ("--doubles", "1", "--singles", "1", "--heads", "2")

    run_script("streaming/quantize_gguf.py", tmp_path / "out", "--type", "Q4_K", *size)

    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Q4_K |")]
    assert row.endswith("| 10 | 1 |")


@pytest.mark.slow
def test_sweeps_cost_is_told_beside_the_bare_work(capsys: Capture) -> None:
    sweep = ("outlier=none,convrot", "sampler.steps=1", "prompts.prompts=[fox]")

    run_script("sweeps/overhead.py", *sweep, "--rounds", "1", "--only", "tracker=none")

    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["alone", "tracker=none"]


@pytest.mark.slow
@pytest.mark.browser
def test_dashboards_are_photographed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, command_in(tmp_path / "work", patch, None) as command:
        small = ("sampler.steps=1", "prompts.prompts=[fox,parrot]", "outlier=none,convrot")
        assert command("-m", *small, "hydra.sweep.dir=sweep").code == 0

    run_script("dashboards/shoot.py", "--sweep", tmp_path / "work" / "sweep", "--out", tmp_path)

    assert len(list(tmp_path.glob("*.png"))) == 7


def write_recorder(folder: Path) -> Path:
    """An `int8run` that writes its words to a file and leaves a report. Returns the file."""
    words = folder / "words.txt"
    program = folder / "bin" / "int8run"
    program.parent.mkdir()
    lines = [
        f"#!{sys.executable}",
        "import pathlib, sys",
        f"pathlib.Path({str(words)!r}).write_text('\\n'.join(sys.argv[1:]))",
        "report = pathlib.Path(sys.argv[-1].partition('=')[2], 'report.html')",
        "report.parent.mkdir(parents=True)",
        "report.write_text('a report')",
    ]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    return words


@pytest.mark.slow
def test_the_study_is_a_sweep_of_36_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = shutil.copy(EXPERIMENTS / "sweeps" / "study.sh", tmp_path)
    words = write_recorder(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    assert os.spawnlp(os.P_WAIT, "bash", "bash", script) == 0

    multirun, *overrides = words.read_text().splitlines()
    _, jobs = compose_jobs(overrides, multirun=True)
    assert multirun == "-m"
    assert len(jobs) == 36
    assert (tmp_path / "study.html").read_text() == "a report"


@pytest.mark.slow
def test_audit_is_measured_beside_a_copy(tmp_path: Path, capsys: Capture) -> None:
    checkpoint = tmp_path / "checkpoint"
    run_script("streaming/make_flux.py", checkpoint, "--doubles", "1", "--singles", "1", "--heads", "2")

    run_script("audit/measure.py", checkpoint, tmp_path / "work", "--rounds", "1")

    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[-3:]] == ["| copy", "| reproduced", "| not reproduced"]
    assert rows[-2][-1].startswith("A, ")
    assert rows[-1][-1].startswith("B, 0 of ")


@pytest.mark.slow
def test_step_caches_are_compared_on_the_tiny_model(tmp_path: Path, capsys: Capture) -> None:
    small = ("sampler.steps=6", "backend=reference", "metrics.layers=false")

    run_script(
        "step_caches/measure.py",
        *("--caches", "first_block", "--prompts", "owl", "--out", tmp_path, "--words", *small),
    )

    rows = read_table(tmp_path / "step_caches.csv")
    assert [row["cache"] for row in rows] == [
        f"first_block threshold={threshold}" for threshold in ("0.03", "0.05", "0.1", "0.2")
    ]
    assert "| `first_block threshold=0.2` |" in capsys.readouterr().out


# -- a search ----------------------------------------------------------------------------------------


@pytest.mark.slow  # several runs
def test_search_draws_its_front_and_reproduces_the_recipe(tmp_path: Path) -> None:
    left_out = ("rounding", "bits", "kept", "cache", "few_step")
    words = [
        "quality_db=20",
        *TINY_JOB[1:],
        "backend=reference",
        "sampler.steps=2",
        "calibration.prompts=[fox,owl]",
        "prompts.take=1",
    ]
    words += [f"task.space.{name}=null" for name in left_out]
    words.append("task.space.steps.choices=[null,1]")

    run_script("search/run.py", *words, "--trials", "4", "--out", tmp_path, "--work", tmp_path / "work")

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["is_met"]
    assert summary["identical_images"] == "1 of 1"
    assert 3 <= len(read_table(tmp_path / "front.csv")) <= 4
    assert (tmp_path / "front.png").stat().st_size > 10_000


# -- weights of few bits -----------------------------------------------------------------------------


@pytest.mark.slow  # the tiny model, and gptq
def test_w4a8_errors_have_a_row_for_each_setting(tmp_path: Path, capsys: Capture) -> None:
    run_script("w4a8/errors.py", "--sources", "flux", "--widths", "256", "--out", tmp_path)

    rows = read_table(tmp_path / "errors.csv")
    errors = {}
    for row in rows:
        if row["outlier"] == "convrot":
            errors[row["rounding"], row["bits"]] = float(row["output_error"])
    for rounding in ("absmax", "mse", "gptq"):
        assert errors[rounding, "4"] > errors[rounding, "6"] > errors[rounding, "8"]
    assert errors["gptq", "4"] < errors["mse", "4"] < errors["even levels", "4"]
    sizes = {row["bits"]: float(row["bytes_per_weight"]) for row in rows if row["rounding"] == "absmax"}
    assert sizes["4"] < 0.6 < sizes["6"] < 0.9 < sizes["8"]
    assert "flux, 1 layers: error of the output" in capsys.readouterr().out


@pytest.mark.slow
def test_w4a8_images_have_a_line_for_each_job(lora_sweep: Path, capsys: Capture) -> None:
    # the layers' SQNR is not measured by small jobs
    for job in lora_sweep.glob("[0-9]*"):
        results = json.loads((job / "metrics.json").read_text())
        results["metrics"].setdefault("quant/output_sqnr_db_mean", 40.0)
        (job / "metrics.json").write_text(json.dumps(results))

    run_script("w4a8/images.py", "--sweep", lora_sweep)

    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| bits | outlier |")
    assert len(rows) == 2
    assert rows[0].startswith("| 8 | none | absmax |")


def test_w4a8_speed_has_a_row_for_each_number_of_bits(capsys: Capture) -> None:
    run_script("w4a8/speed.py", "--backend", "reference", "--shapes", "64x32", "--rows", "4", "--rounds", "1")

    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[2] for row in rows] == ["8", "6", "4"]
    assert rows[2][7].startswith("some rows at each call")
