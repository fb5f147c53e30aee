"""Runs with quantized text encoders: on the fly and from files, against the float model, with LoRAs, kernels
and sweeps.
"""

import csv
import importlib.util
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.clip_files import answer, changed, file_of, linears
from support.compare import assert_close, assert_runs_like_the_reference
from support.helpers import CPU, without_vnni
from support.run_job import make_spec, run_job, save_lora
from support.tiers import slow_except
from support.tiny_pipeline import random_pipeline, save_random_pipeline
from text_encoders.files import File
from text_encoders.probes import probe_weight
from torch import Tensor, nn

from int8run.config.job import Job
from int8run.errors import BackendError, ConfigError, FileError
from int8run.generate.prompt_cache import PromptCache
from int8run.layers.block_int8_linear import BlockInt8Linear
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.weight_only import WeightOnlyEmbedding, WeightOnlyLinear
from int8run.lora.match import Matches
from int8run.models.sampling import Sampling
from int8run.outlier.convrot import ConvRot
from int8run.pipeline import process_cache
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.text_encoders import QuantizedEncoders, build_encoders, open_encoders
from int8run.quant.formats import FORMATS, choose_format
from int8run.report.console import Progress
from int8run.report.result_table import build_result_table
from int8run.tasks.quantize_checkpoint import quantize_file
from int8run.tasks.run import RunResult
from int8run.text_encoders.base import TextEncoders

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 256  # more than one block of every format in a row
# Backends that add the numbers of a rotation in different orders may round a tie to different integers. One
# such
# integer in one layer moves the output of these encoders by up to 0.4 %.
A_FEW_TIES = 1e-2
FLOAT = "int8.enable=false"
WO_FLOAT = {"int8_tensorwise", "int8_rowwise", "int8_blockwise", "int8_block3d"}  # where T5's `wo` suffers
WRITTEN = [name for name, form in FORMATS.items() if not form.is_read_only]
BOTH = ("clip=int8_rowwise", "clip.kernel_backend=reference", "prompts.prompts=[a,b]")
CONTRACT = {
    "memory/text_encoder_bytes",
    "float/text_encoder_bytes",
    "memory/text_encoder_ratio",
    "clip/layers_quantized",
    "clip/layers_float",
    "clip/cosine_mean",
    "clip/cosine_min",
    "clip/rel_err",
    "clip/weight_sqnr_db_mean",
    "clip/weight_sqnr_db_min",
}


@dataclass
class FinishedRun:
    """A run and what it was made with."""

    result: RunResult
    built: BuiltModel

    @property
    def metrics(self) -> dict[str, float]:
        return self.result.metrics

    @property
    def latents(self) -> list[Tensor]:
        """After each step, of what is compared with the float model."""
        return self.result.candidate.trajectories

    @property
    def floats(self) -> list[Tensor]:
        return self.result.baseline.trajectories

    @property
    def modules(self) -> dict[str, nn.Module]:
        return self.built.encoders.modules

    @property
    def rows(self) -> list[dict[str, str]]:
        """`text_encoders.csv`."""
        return list(csv.DictReader((self.result.output_dir / "text_encoders.csv").read_text().splitlines()))


def encoded(run: FinishedRun, which: str) -> list[tuple[Any, Any]]:
    """What the pipeline's `encode_prompt` made of each prompt, with the float encoders and with others."""
    known = PromptCache.for_pipeline(run.built.pipe).entries
    assert known["float"].keys() == known[which].keys()
    return [(known["float"][key].embeddings, known[which][key].embeddings) for key in known[which]]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"), text=WIDTH)


@pytest.fixture(scope="module")
def floats() -> dict[str, nn.Module]:
    """The model's own text encoders."""
    pipe = random_pipeline(text=WIDTH)
    return {name: getattr(pipe, name).eval() for name in ("text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def files(floats: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Quantized files of both, and LoRAs on them."""
    folder = tmp_path_factory.mktemp("files")
    made = {
        "clip": file_of(floats["text_encoder"], "int8_rowwise"),
        "t5": file_of(floats["text_encoder_2"], ["nvfp4", "float8_e4m3fn"]),
    }
    paths = {name: file.write(folder / f"{name}.safetensors") for name, file in made.items()}
    for name, component in (("clip", "text_encoder"), ("t5", "text_encoder_2")):
        paths[f"{name}_lora"] = save_lora(
            folder / f"{name}_lora.safetensors", floats[component], only="", prefix=f"{component}."
        )
    tensors = load_file(paths["clip_lora"]) | load_file(paths["t5_lora"])
    save_file(tensors, folder / "both.safetensors")
    return {"files": made, "lora": folder / "both.safetensors", **paths}


@pytest.fixture(scope="module")
def words(model: Path) -> list[str]:
    size = [
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=1",
        "prompts.prompts=[a]",
        "tracker=none",
        "backend=reference",
    ]
    return [f"model.location={model}", *size, "progress=false", "metrics.layers=false"]


@pytest.fixture(scope="module")
def run_with(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinishedRun]:
    """Runs jobs; equal ones once, each as a new process would."""
    known: dict[tuple[str, ...], FinishedRun] = {}

    def run_once(*more: str) -> FinishedRun:
        if more not in known:
            process_cache.clear()
            result = run_job([*words, *more], tmp_path_factory.mktemp("out"))
            (built,) = process_cache._last_build.values()
            known[more] = FinishedRun(result, built)
            process_cache.clear()
        return known[more]

    return run_once


@pytest.fixture
def filled(model: Path) -> Callable[..., QuantizedEncoders]:
    """The model's encoders as a run would have them, without the rest of it."""

    def fill(folder: Path = model, **settings: Any) -> QuantizedEncoders:
        clip = TextEncoders(**settings)
        opened = open_encoders(clip, folder, {}, torch.float32)
        return build_encoders(
            opened, clip, CPU, Sampling(1, 16, 16), Matches({}, []), Progress(enabled=False)
        )

    return fill


# -- numbers and files ---------------------------------------------------------------------------------------


def find_layer_types(encoders: dict[str, nn.Module]) -> dict[str, type[nn.Module]]:
    """component.layer -> its class, of all that have a format: Linears and tables."""
    types: dict[str, type[nn.Module]] = {}
    for component, encoder in encoders.items():
        for name, layer in encoder.named_modules():
            if type(layer) in (nn.Linear, nn.Embedding):
                types[f"{component}.{name}"] = type(layer)
    return types


def test_what_a_run_says_of_its_text_encoders(run_with: Callable[..., FinishedRun]) -> None:
    run = run_with(*BOTH)
    sqnr = [float(row["weight_sqnr_db"]) for row in run.rows if row["quantized"] == "true"]

    assert set(run.metrics) >= CONTRACT
    assert run.metrics["quant/layers_int8"] > 0
    assert min(sqnr) > 40
    assert run.metrics["clip/weight_sqnr_db_min"] == pytest.approx(min(sqnr), abs=1e-3)
    assert run.metrics["clip/weight_sqnr_db_mean"] == pytest.approx(sum(sqnr) / len(sqnr), abs=1e-3)

    saved = json.loads((run.result.output_dir / "metrics.json").read_text())["metrics"]

    assert set(saved) >= CONTRACT
    assert "text_encoder" not in (run.result.output_dir / "layers.csv").read_text()


def test_every_layer_of_the_text_encoders_is_listed(
    run_with: Callable[..., FinishedRun], floats: dict[str, nn.Module]
) -> None:
    run = run_with(*BOTH)
    types = find_layer_types(floats)
    quantized = [row for row in run.rows if row["quantized"] == "true"]
    kept_float = {row["name"] for row in run.rows if row["quantized"] != "true"}
    # T5's `wo` and all tables
    expected = {name for name, kind in types.items() if kind is nn.Embedding or name.endswith(".wo")}

    assert sorted(row["name"] for row in run.rows) == sorted(types)
    assert kept_float == expected
    assert run.metrics["clip/layers_quantized"] == len(quantized)
    assert run.metrics["clip/layers_float"] == len(expected)
    assert {row["rounding"] for row in quantized} == {"int8_rowwise"}
    assert {row["backend_used"] for row in quantized} != {""}
    assert all(bool(row["why_not"]) != (row["quantized"] == "true") for row in run.rows)


def test_memory_is_that_of_codes_and_scales(
    run_with: Callable[..., FinishedRun], floats: dict[str, nn.Module]
) -> None:
    run = run_with(*BOTH)
    whole = sum(p.nbytes for module in floats.values() for p in module.parameters())
    saved = sum(
        3 * WIDTH * WIDTH - 4 * WIDTH for row in run.rows if row["quantized"] == "true"
    )  # a scale for each row
    extra = run.metrics["memory/text_encoder_bytes"] - (whole - saved)

    assert run.metrics["float/text_encoder_bytes"] - whole == extra, (
        "buffers such as position_ids are in both"
    )
    assert 0 <= extra < 1000
    assert (
        run.metrics["memory/text_encoder_ratio"]
        == run.metrics["float/text_encoder_bytes"] / run.metrics["memory/text_encoder_bytes"]
    )

    alone = run_with(FLOAT, "clip=int8_rowwise", "clip.components=[text_encoder_2]").metrics

    assert (
        run.metrics["memory/text_encoder_bytes"]
        < alone["memory/text_encoder_bytes"]
        < alone["float/text_encoder_bytes"]
    )


def test_embeddings_are_compared_token_by_token(run_with: Callable[..., FinishedRun]) -> None:
    run = run_with(*BOTH)
    pairs = encoded(run, "int8")

    assert len(pairs) == 2

    cosines, errors = [], []
    for one, other in pairs:
        for a, b in zip(
            one[:2], other[:2], strict=True
        ):  # T5's tokens and CLIP's pooled embedding; then come coordinates
            a, b = a.double().flatten(0, -2), b.double().flatten(0, -2)
            cosines.append(((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean().item())
            errors.append(((a - b).norm() / a.norm()).item())

    assert run.metrics["clip/cosine_mean"] == pytest.approx(sum(cosines) / 4)
    assert run.metrics["clip/cosine_min"] == pytest.approx(min(cosines))
    assert run.metrics["clip/rel_err"] == pytest.approx(sum(errors) / 4)
    assert 0.001 < run.metrics["clip/rel_err"] < 0.05


def test_the_table_on_the_terminal(run_with: Callable[..., FinishedRun]) -> None:
    shown = {}
    for name in ("int8_rowwise", "keep"):
        console = Console(file=StringIO(), width=100)
        console.print(
            build_result_table(
                "t", run_with(*(BOTH if name == "int8_rowwise" else ["clip=keep"])).metrics, "ours"
            )
        )
        shown[name] = console.file.getvalue()  # type: ignore[attr-defined]

    for line in ("text encoder memory", "embedding cosine, mean / min", "embedding error"):
        assert line in shown["int8_rowwise"] and line not in shown["keep"], line
    assert "3.2 MB" in shown["int8_rowwise"]
    assert "1.0 MB" in shown["int8_rowwise"]


def test_without_a_format_or_a_file_nothing_changes(run_with: Callable[..., FinishedRun]) -> None:
    kept, auto = run_with("clip=keep"), run_with("clip=auto")

    assert same(kept.latents, auto.latents)
    assert same(kept.floats, auto.floats)
    assert set(kept.metrics) == set(auto.metrics)
    assert not any(name.startswith("clip/") for name in auto.metrics)
    assert "memory/text_encoder_ratio" not in auto.metrics
    assert not auto.modules
    assert auto.metrics["memory/text_encoder_bytes"] == auto.metrics["float/text_encoder_bytes"]
    assert not (auto.result.output_dir / "text_encoders.csv").exists()


def test_float_images_are_those_of_the_float_encoders(run_with: Callable[..., FinishedRun]) -> None:
    kept, quantized = run_with("clip=keep"), run_with("clip=nvfp4")

    assert same(quantized.floats, kept.floats)
    assert not same(quantized.latents, kept.latents)
    assert quantized.metrics["quant/layers_int8"] == kept.metrics["quant/layers_int8"]


def test_with_a_float_denoiser_the_encoders_alone_differ(
    run_with: Callable[..., FinishedRun], floats: dict[str, nn.Module]
) -> None:
    run, kept = run_with(FLOAT, "clip=nvfp4"), run_with("clip=keep")

    assert same(run.floats, kept.floats)
    assert not same(run.latents, run.floats)
    assert 30 < run.metrics["quality/psnr_db"] < float("inf")
    assert run.metrics["memory/denoiser_ratio"] == 1
    assert set(run.metrics) >= CONTRACT
    assert 0.9 < run.metrics["clip/cosine_mean"] < 0.999
    assert "quant/layers_int8" not in run.metrics
    assert run.built.denoisers["clip"] is run.built.denoisers["float"]
    assert set(run.built.denoisers) == {
        "clip",
        "float",
    }
    for component, module in run.built.text_encoders["float"].items():
        assert torch.equal(answer(module), answer(floats[component]))

    ((one, other),) = encoded(run, "clip")

    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


# -- on the fly ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WRITTEN)
def test_every_format_on_the_fly(
    word: str, filled: Callable[..., QuantizedEncoders], floats: dict[str, nn.Module]
) -> None:
    quantized = 0
    for component, built in filled(format=word, kernel_backend="dequantize").built.items():
        for plan in (plan for plan in built.plans if plan.skip_reason is None):
            weight, form = floats[component].get_submodule(plan.name).weight.data, FORMATS[word]
            rotation = ConvRot().fit(weight, None) if form.is_rotated else None
            rounded = form.quantize(
                weight if rotation is None else rotation.transform_weight(weight)
            ).dequantize()
            expected = rounded if rotation is None else rotation.restore_weight(rounded)
            layer = built.module.get_submodule(plan.name)
            assert type(layer) is WeightOnlyLinear
            assert plan.rounding == word
            assert plan.backend_used == "dequantize, eager"
            assert plan.outlier == ("none" if rotation is None else rotation.label)
            assert_close(
                plan.name, torch.from_numpy(probe_weight(layer)), expected, 1e-6 if rotation is None else 3e-3
            )  # asked by rotated ones
            bias = floats[component].get_submodule(plan.name).bias
            assert (layer.bias is None and bias is None) or torch.equal(layer.bias, bias)
            quantized += 1

    assert quantized == (11 if word in WO_FLOAT else 12)


KERNELS = {
    "int8_rowwise": Int8Linear,
    "int8_tensorwise": Int8Linear,
    "int8_convrot": Int8Linear,
    "int8_blockwise": BlockInt8Linear,
}


@pytest.mark.parametrize("word", [*KERNELS, "int8_block3d", "float8_e4m3fn", "mxfp8"])
@pytest.mark.parametrize("backend", ["auto", "reference", "torch_int_mm", "onednn", "cpu"])
def test_int8_layers_run_on_the_backend(
    word: str, backend: str, filled: Callable, floats: dict[str, nn.Module]
) -> None:
    if backend in ("torch_int_mm", "onednn", "cpu") and without_vnni():
        pytest.skip("needs a CPU with VNNI")
    if not word.startswith("int8") and backend not in ("auto", "reference"):
        with pytest.raises(
            BackendError,
            match=rf"kernel_backend={backend} runs INT8 .* gives 6 × {word}; choose auto or dequantize",
        ):
            filled(format=word, kernel_backend=backend)
        return
    made = filled(format=word, kernel_backend=backend)
    kind = KERNELS.get(word, BlockInt8Linear if word.startswith("int8") else WeightOnlyLinear)
    for component, built in made.built.items():
        chosen = [plan for plan in built.plans if plan.skip_reason is None]
        layers = [built.module.get_submodule(plan.name) for plan in chosen]

        assert {type(layer) for layer in layers} == {kind}

        if kind is not WeightOnlyLinear:
            used = {layer.backend.name for layer in layers}
            assert used == {backend} or (backend == "auto" and "reference" not in used)
            assert {plan.backend_used.removesuffix(", in blocks") for plan in chosen} == used
        else:
            assert {plan.backend_used for plan in chosen} == {
                f"dequantize, {'reference' if backend == 'reference' else 'eager'}"
            }

        assert {plan.backend_asked for plan in chosen} == {backend}
        assert_close(component, answer(built.module), answer(floats[component]), 0.08)


@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
@pytest.mark.parametrize("backend", ["cpu", "onednn", "torch_int_mm"])
@pytest.mark.parametrize("format_name", ["int8_convrot", "int8_block3d"])
def test_int8_backends_agree_on_encoders(
    format_name: str, backend: str, filled: Callable[..., QuantizedEncoders]
) -> None:
    expected = filled(format=format_name, kernel_backend="reference").modules
    found = filled(format=format_name, kernel_backend=backend).modules

    for component, module in expected.items():
        assert_close(component, answer(found[component]), answer(module), A_FEW_TIES)


@pytest.mark.skipif(without_vnni(), reason="needs a CPU with VNNI")
@pytest.mark.parametrize("backend", ["reference", "cpu", "onednn", "torch_int_mm"])
def test_int8_layers_of_encoders_run_like_the_reference(
    backend: str, filled: Callable[..., QuantizedEncoders]
) -> None:
    for component, module in filled(format="int8_convrot", kernel_backend=backend).modules.items():
        inputs = record_int8_inputs(module)

        assert inputs
        for name, x in inputs.items():
            assert_runs_like_the_reference(f"{component}.{name}", module.get_submodule(name), x)


def record_int8_inputs(module: nn.Module) -> dict[str, Tensor]:
    """What each INT8 layer of an encoder is given, as [M, K]."""
    inputs: dict[str, Tensor] = {}

    def make_hook(name: str) -> Callable[..., None]:
        def keep(layer: Int8Linear, arguments: tuple[Tensor], output: Tensor) -> None:
            inputs[name] = arguments[0].reshape(-1, layer.in_features).clone()

        return keep

    int8_layers = [(name, part) for name, part in module.named_modules() if isinstance(part, Int8Linear)]
    hooks = [part.register_forward_hook(make_hook(name)) for name, part in int8_layers]
    answer(module)
    for hook in hooks:
        hook.remove()
    return inputs


def test_fp8_products(filled: Callable[..., QuantizedEncoders], caplog: pytest.LogCaptureFixture) -> None:
    for word in ("float8_e4m3fn", "float8_e5m2_cast", "float8_e4m3fn_rowwise"):
        fast, slow = (filled(format=word, kernel_backend=name) for name in ("scaled_mm", "dequantize"))
        for component, built in fast.built.items():
            chosen = [plan for plan in built.plans if plan.skip_reason is None]
            assert {plan.backend_used for plan in chosen} == {"scaled_mm"}
            assert {built.module.get_submodule(plan.name).kernels for plan in chosen} == {"scaled_mm"}
            found, expected = answer(built.module), answer(slow.modules[component])
            assert not torch.equal(found, expected)
            assert_close(word, found, expected, 0.06)

    assert not caplog.records
    for word in ("int8_rowwise", "nvfp4", "float8_e4m3fn_blockwise"):
        with pytest.raises(
            BackendError,
            match=r"clip\.kernel_backend=scaled_mm can run none of the layers of .*: 6 × scaled_mm takes fp8",
        ):
            filled(format=word, kernel_backend="scaled_mm")


def test_fp8_products_of_some_layers(
    filled: Callable, files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    made = filled(format="auto", path=str(files["t5"]), kernel_backend="scaled_mm").built["text_encoder_2"]
    used = [plan.backend_used for plan in made.plans if plan.skip_reason is None]

    assert sorted(used) == ["dequantize, eager"] * 3 + ["scaled_mm"] * 3
    assert f"scaled_mm dequantizes 3 layers of {files['t5']}: 3 × scaled_mm takes fp8" in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [("triton", "runs on cuda, not on cpu"), ("comfy_kitchen", "needs the Python package")],
)
def test_kernels_that_cannot_run_here(
    name: str, reason: str, filled: Callable[..., QuantizedEncoders]
) -> None:
    if name == "comfy_kitchen" and importlib.util.find_spec(name):
        pytest.skip("it is there")

    with pytest.raises(BackendError, match=f"cannot run here: {reason}.*these can: auto"):
        filled(format="int8_rowwise", kernel_backend=name)


def test_blocks_that_do_not_divide_a_layer(
    filled: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_random_pipeline(tmp_path / "model", text=48)
    made = filled(folder, format="int8_blockwise", kernel_backend="reference")
    chosen = [plan for plan in made.plans if plan.skip_reason is None]

    assert {plan.rounding for plan in chosen} == {"int8_rowwise"}
    assert {choose_format("int8_blockwise", 48, 48).name} == {"int8_rowwise"}
    assert all("do not divide 48 x 48" in plan.outlier_skip_reason for plan in chosen)
    for count, component in ((6, "text_encoder"), (5, "text_encoder_2")):
        assert (
            f"{folder / component}: {count} layers cannot be "
            f"int8_blockwise: {count} × int8_rowwise: int8_blockwise has"
        ) in caplog.text
    assert {type(layer) for layer in made.modules["text_encoder"].modules()} & {
        Int8Linear,
        BlockInt8Linear,
    } == {Int8Linear}


def test_some_of_the_encoders(run_with: Callable[..., FinishedRun], floats: dict[str, nn.Module]) -> None:
    run = run_with(FLOAT, "clip=int8_rowwise", "clip.components=[text_encoder_2]")

    assert set(run.modules) == {"text_encoder_2"}
    assert {row["name"].split(".")[0] for row in run.rows} == {"text_encoder_2"}
    assert torch.equal(answer(run.built.pipe.text_encoder), answer(floats["text_encoder"]))

    ((one, other),) = encoded(run, "clip")

    assert torch.equal(one[1], other[1]) and not torch.equal(one[0], other[0]), "CLIP's is float"
    assert run.metrics["clip/layers_quantized"] == 5
    assert run.metrics["clip/cosine_mean"] > run.metrics["clip/cosine_min"]


# -- what is in memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "cached"])
def test_without_float_images_no_float_encoder_is_held(
    baseline: str, run_with: Callable[..., FinishedRun]
) -> None:
    run, whole = run_with("clip=mxfp8", f"metrics.baseline={baseline}"), run_with("clip=mxfp8")

    assert same(run.latents, whole.latents), "the same images with less memory"
    assert set(run.built.text_encoders) == {"int8"}
    assert "float" not in run.built.denoisers

    for component, built in run.built.encoders.built.items():
        assert getattr(run.built.pipe, component) is built.module

        left = {name for name, part in built.skeleton.named_parameters() if part.is_meta}

        assert left == {f"{plan.name}.weight" for plan in built.plans if plan.skip_reason is None}
        assert left
        assert not any(part.is_meta for part in [*built.module.parameters(), *built.module.buffers()])

    for name in (
        "float/text_encoder_bytes",
        "memory/text_encoder_bytes",
        "memory/text_encoder_ratio",
        "clip/weight_sqnr_db_min",
    ):
        assert run.metrics[name] == whole.metrics[name], name
    assert "clip/cosine_mean" not in run.metrics, "nothing to compare with"

    if baseline == "cached":
        assert same(run.floats, whole.floats)
        assert run.metrics["quality/psnr_db"] == whole.metrics["quality/psnr_db"]
    else:
        assert run.result.baseline is None


def test_one_encoder_of_two_is_loaded_whole(
    run_with: Callable[..., FinishedRun], floats: dict[str, nn.Module]
) -> None:
    run = run_with(FLOAT, "clip=int8_rowwise", "clip.components=[text_encoder_2]", "metrics.baseline=none")

    assert same(run.latents, run_with(FLOAT, "clip=int8_rowwise", "clip.components=[text_encoder_2]").latents)
    assert torch.equal(answer(run.built.pipe.text_encoder), answer(floats["text_encoder"]))


def test_images_for_the_calibration_are_generated_with_float_encoders(
    run_with: Callable[..., FinishedRun],
) -> None:
    words = ("outlier=smoothquant", "calibration.prompts=[b]", "metrics.baseline=none")
    run, kept = run_with("clip=nvfp4", *words), run_with("clip=keep", *words)

    assert "float" in run.built.text_encoders
    assert run.built.pipe.text_encoder is run.modules["text_encoder"]

    factors = [
        {
            name: part.transform.factor
            for name, part in one.built.denoisers["int8"].named_modules()
            if isinstance(part, Int8Linear)
        }
        for one in (run, kept)
    ]

    assert any(factor is not None for factor in factors[0].values())
    assert all(one is None or torch.equal(one, factors[1][name]) for name, one in factors[0].items())


# -- from a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_file_finds_its_place(
    name: str, filled: Callable, files: dict, floats: dict, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = ("text_encoder", "text_encoder_2") if name == "clip" else ("text_encoder_2", "text_encoder")
    with caplog.at_level(logging.INFO):
        made = filled(format="auto", path=str(files[name]), kernel_backend="dequantize")

    assert set(made.modules) == {own}
    assert f"clip.path has the weights of {own}; {other} stays as it is" in caplog.text

    file = files["files"][name]

    assert_close(name, answer(made.modules[own]), answer(changed(floats[own], file.real)), 1e-5)

    words = [plan.rounding for plan in made.plans if plan.skip_reason is None]

    assert sorted(words) == sorted(file.words.values())
    assert len(words) == 6
    assert all("weight_sqnr_db" not in plan.measured for plan in made.plans), "nothing was rounded here"


def test_files_by_component(
    run_with: Callable[..., FinishedRun], files: dict[str, Any], floats: dict[str, nn.Module]
) -> None:
    run = run_with(
        "clip=auto",
        f"clip.path={{text_encoder: {files['clip']}, text_encoder_2: {files['t5']}}}",
        "clip.kernel_backend=dequantize",
    )

    for component, name in (("text_encoder", "clip"), ("text_encoder_2", "t5")):
        assert_close(
            name,
            answer(run.modules[component]),
            answer(changed(floats[component], files["files"][name].real)),
            1e-5,
        )
    assert run.metrics["clip/layers_quantized"] == 12
    assert "clip/weight_sqnr_db_mean" not in run.metrics
    assert same(run.floats, run_with("clip=keep").floats)
    assert CONTRACT - set(run.metrics) == {
        "clip/weight_sqnr_db_mean",
        "clip/weight_sqnr_db_min",
    }


def test_a_file_from_the_command_line_without_a_baseline(
    run_with: Callable[..., FinishedRun], files: dict[str, Any]
) -> None:
    words = (FLOAT, "clip=auto", f"clip.path={files['clip']}")
    run, whole = run_with(*words, "metrics.baseline=none"), run_with(*words)

    assert same(run.latents, whole.latents)
    assert set(run.modules) == {"text_encoder"}
    assert whole.metrics["clip/cosine_min"] < whole.metrics["clip/cosine_mean"]


def test_quantized_tables_are_looked_up(
    filled: Callable, floats: dict[str, nn.Module], tmp_path: Path
) -> None:
    file = file_of(floats["text_encoder_2"], "int8_rowwise", tables=["shared"])
    made = filled(
        format="auto", path=str(file.write(tmp_path / "x.safetensors")), kernel_backend="dequantize"
    ).modules["text_encoder_2"]

    assert type(made.shared) is WeightOnlyEmbedding
    assert type(made.encoder.embed_tokens) is WeightOnlyEmbedding
    assert made.shared.qdata.data_ptr() == made.encoder.embed_tokens.qdata.data_ptr(), "one table"
    assert_close(
        "t5",
        answer(made),
        answer(changed(floats["text_encoder_2"], file.real | {"encoder.embed_tokens": file.real["shared"]})),
        1e-5,
    )


def test_a_float_file_replaces_weights(
    filled: Callable, floats: dict[str, nn.Module], tmp_path: Path
) -> None:
    other = random_pipeline(seed=5, text=WIDTH).text_encoder.eval()
    made = filled(format="auto", path=str(file_of(other, []).write(tmp_path / "x.safetensors")))

    assert torch.equal(answer(made.modules["text_encoder"]), answer(other))
    assert not torch.equal(answer(other), answer(floats["text_encoder"]))
    assert {plan.skip_reason for plan in made.plans} == {"float in the file"}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with two CLIPs of one size."""
    folder = tmp_path_factory.mktemp("twins")
    clip = random_pipeline(text=WIDTH).text_encoder
    for name in ("text_encoder", "text_encoder_2"):
        clip.save_pretrained(folder / name)
    index = {name: ["transformers", "CLIPTextModel"] for name in ("text_encoder", "text_encoder_2")}
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "X", **index, "text_encoder_3": [None, None]})
    )
    return folder


def test_a_file_that_fits_two(
    twins: Path, filled: Callable[..., QuantizedEncoders], files: dict[str, Any]
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"fits text_encoder, text_encoder_2; say which: 'clip\.path=\{text_encoder: FILE\}'",
    ):
        filled(twins, format="auto", path=str(files["clip"]))
    assert set(filled(twins, format="auto", path={"text_encoder_2": str(files["clip"])}).modules) == {
        "text_encoder_2"
    }


def test_files_that_fit_none(
    model: Path, twins: Path, filled: Callable, files: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"t5\.safetensors holds t5_old, which fits no place: text_encoder is a CLIPTextModel",
    ):
        filled(twins, format="auto", path=str(files["t5"]))

    small = file_of(random_pipeline(text=64).text_encoder, "int8_rowwise").write(
        tmp_path / "small.safetensors"
    )

    with pytest.raises(
        ConfigError,
        match=(
            r"holds clip, .*text_encoder has another size .*has the "
            r"shape \[.*64.*; text_encoder_2 is a T5EncoderModel"
        ),
    ):
        filled(format="auto", path=str(small))

    lost = file_of(random_pipeline(text=WIDTH).text_encoder, "int8_rowwise").drop(
        "mlp.fc2.weight", "mlp.fc2.comfy_quant", "mlp.fc2.weight_scale"
    )

    with pytest.raises(ConfigError, match=r"text_encoder needs .*fc2\.weight"):
        filled(format="auto", path=str(lost.write(tmp_path / "lost.safetensors")))
    for path in ({"text_encoder_2": str(files["clip"])}, {"text_encoder": str(files["t5"])}):
        with pytest.raises(
            ConfigError,
            match=(
                r"holds (clip|t5_old), which fits no place: "
                r"text_encoder(_2)? is a (CLIPText|T5Encoder)Model"
            ),
        ):
            filled(format="auto", path=path)


def test_a_checkpoint_with_several_encoders(
    filled: Callable, floats: dict[str, nn.Module], tmp_path: Path
) -> None:
    """Each finds its place, also where a component is named."""
    whole = File()
    made = {
        "text_encoder": file_of(floats["text_encoder"], "nvfp4"),
        "text_encoder_2": file_of(floats["text_encoder_2"], "int8_rowwise"),
    }
    for prefix, file in (("clip_l", made["text_encoder"]), ("t5xxl", made["text_encoder_2"])):
        whole.tensors |= file.copy().prefixed(f"text_encoders.{prefix}.transformer.").tensors
    path = whole.write(tmp_path / "whole.safetensors")
    both = filled(format="auto", path=str(path), kernel_backend="dequantize").modules

    for component, file in made.items():
        assert_close(component, answer(both[component]), answer(changed(floats[component], file.real)), 1e-5)

    one = filled(format="auto", path={"text_encoder_2": str(path)}, kernel_backend="dequantize").modules

    assert set(one) == {"text_encoder_2"}
    assert torch.equal(answer(one["text_encoder_2"]), answer(both["text_encoder_2"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"path": {"text_encoder_3": "x"}},
            r"clip\.path names text_encoder_3; did you mean 'text_encoder_2'\? the pipeline has text_encoder",
        ),
        (
            {"format": "int8_rowwise", "components": ["vae"]},
            r"clip\.components names vae; the pipeline has text_encoder, text_encoder_2",
        ),
    ],
)
def test_components_that_are_not_there(
    settings: dict, message: str, filled: Callable[..., QuantizedEncoders]
) -> None:
    with pytest.raises(ConfigError, match=message):
        filled(**{"format": "auto", **settings})


def test_a_file_in_another_format(filled: Callable, files: dict[str, Any], tmp_path: Path) -> None:
    assert filled(format="int8_rowwise", path=str(files["clip"])).built
    assert filled(format="int8_tensorwise", path=str(files["clip"])).built
    with pytest.raises(
        ConfigError,
        match=r"holds 6 layers int8_rowwise, and nvfp4 was asked for; clip=auto \(quant_format in a",
    ):
        filled(format="nvfp4", path=str(files["clip"]))
    with pytest.raises(FileError, match="no such file"):
        filled(format="auto", path=str(tmp_path / "none.safetensors"))
    with pytest.raises(FileError, match="holds no text encoder that is known: it is a LoRA"):
        filled(format="auto", path=str(files["lora"]))


def test_a_pipeline_without_a_text_encoder(filled: Callable[..., QuantizedEncoders], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]})
    )

    with pytest.raises(
        ConfigError, match=r"clip=nvfp4: the pipeline in .* has no text encoder; set clip=keep"
    ):
        filled(tmp_path, format="nvfp4")


# -- LoRAs ---------------------------------------------------------------------------------------------------


def lora(path: Path, strength: float, **more: Any) -> str:
    settings = "".join(f", {name}: {value}" for name, value in more.items())
    return f"lora.adapters=[{{name: a, path: {path}, strength: {strength}{settings}}}]"


def with_lora(
    component: str, path: Path, strength: float, real: dict[str, Any], module: nn.Module
) -> dict[str, Tensor]:
    """The weights of all Linears with a LoRA added by its definition.

    Real: weights in place of the module's own.
    """
    tensors, found = load_file(path), {}
    for name in linears(module):
        down, up = (tensors[f"{component}.{name}.lora_{x}.weight"].double() for x in "AB")
        known = {key.removeprefix("text_model."): weight for key, weight in real.items()}
        weight = torch.as_tensor(known[name]) if name in known else module.get_submodule(name).weight.data
        found[name] = weight.double() + strength * (up @ down)
    return found


def rounded(weight: Tensor, word: str) -> Tensor:
    """What a format makes of a weight."""
    weight, form = weight.float(), FORMATS[word]
    rotation = ConvRot().fit(weight, None) if form.is_rotated else None
    if rotation is None:
        return form.quantize(weight).dequantize()
    return rotation.restore_weight(form.quantize(rotation.transform_weight(weight)).dequantize())


@pytest.mark.parametrize("word", ["int8_rowwise", "int8_convrot", "float8_e4m3fn_blockwise", "nvfp4"])
def test_a_lora_is_rounded_with_the_weight(
    word: str, run_with: Callable, files: dict[str, Any], floats: dict[str, nn.Module]
) -> None:
    run = run_with(FLOAT, f"clip={word}", "clip.kernel_backend=dequantize", lora(files["lora"], 1.5))

    assert run.metrics["lora/modules_matched"] == 12

    for component, built in run.built.encoders.built.items():
        weights = with_lora(component, files["lora"], 1.5, {}, floats[component])
        for plan in built.plans:
            if plan.skip_reason is None:
                weights[plan.name] = rounded(weights[plan.name], word)

        assert_close(
            component, answer(built.module), answer(changed(floats[component], weights)), 6e-3
        )  # ties
        assert_close(
            component, answer(built.module), answer(run.built.text_encoders["float"][component]), 0.5
        )
        assert not torch.equal(answer(built.module.cpu()), answer(floats[component]))


@pytest.mark.parametrize("source", slow_except(["on the fly"], ["on the fly", "file"]))
def test_strength_0_is_the_encoder_without_the_lora(
    source: str, run_with: Callable[..., FinishedRun], files: dict[str, Any]
) -> None:
    path = f"clip.path={{text_encoder: {files['clip']}, text_encoder_2: {files['t5']}}}"
    words = (FLOAT, *(["clip=int8_rowwise"] if source == "on the fly" else ["clip=auto", path]))
    without, off, on = (
        run_with(*words),
        run_with(*words, lora(files["lora"], 0.0)),
        run_with(*words, lora(files["lora"], 1.0)),
    )

    assert same(without.latents, off.latents)
    assert same(without.floats, off.floats)
    assert not same(on.latents, off.latents)
    assert not same(on.floats, off.floats)
    for component, module in without.modules.items():
        assert torch.equal(answer(off.modules[component]), answer(module))
        assert not torch.equal(answer(on.modules[component]), answer(module))

    bare = run_with(*words, lora(files["lora"], 1.0), "metrics.baseline=none")

    assert same(bare.latents, on.latents), "without float encoders beside them"


def test_a_lora_on_a_files_weights(
    run_with: Callable[..., FinishedRun], files: dict[str, Any], floats: dict[str, nn.Module]
) -> None:
    path = f"clip.path={{text_encoder: {files['clip']}, text_encoder_2: {files['t5']}}}"
    run = run_with(FLOAT, "clip=auto", path, "clip.kernel_backend=dequantize", lora(files["lora"], 1.5))
    for component, name in (("text_encoder", "clip"), ("text_encoder_2", "t5")):
        file, built = files["files"][name], run.built.encoders.built[component]
        weights = with_lora(component, files["lora"], 1.5, file.real, floats[component])
        words = {plan.name: plan.rounding for plan in built.plans if plan.skip_reason is None}

        assert sorted(words.values()) == sorted(file.words.values()), "each layer in its own format again"

        rough = {layer: rounded(weight, words[layer]) for layer, weight in weights.items()}

        assert_close(name, answer(built.module), answer(changed(floats[component], rough)), 1e-3)


@pytest.mark.parametrize("word", ["nvfp4_modelopt", "int8 in groups", "int8_blockwise", "mxfp8"])
def test_a_lora_on_weights_in_formats_that_are_not_written(
    word: str, run_with: Callable, files: dict, floats: dict, tmp_path: Path
) -> None:
    module = floats["text_encoder_2"]
    file = file_of(module, word if word != "int8 in groups" else "int8_block3d")
    if word == "int8 in groups":
        file.drop(".comfy_quant")
        for name, stored in file.tensors.items():
            if name.endswith("weight_scale"):
                file.tensors[name] = stored._replace(shape=stored.shape[:2])
    path, asked_for = file.write(tmp_path / "x.safetensors"), word if word == "nvfp4_modelopt" else "auto"
    run = run_with(
        FLOAT,
        f"clip={asked_for}",
        f"clip.path={path}",
        "clip.kernel_backend=dequantize",
        "metrics.baseline=none",
        lora(files["t5_lora"], 1.0),
    )
    expected = answer(changed(module, with_lora("text_encoder_2", files["t5_lora"], 1.0, file.real, module)))

    assert_close(word, answer(run.modules["text_encoder_2"]), expected, 0.4 if "4" in word else 0.1)

    run.built.set_strengths([0.0], [0.0])

    assert_close(word, answer(run.modules["text_encoder_2"]), answer(changed(module, file.real)), 1e-5)


@pytest.mark.slow
def test_strengths_there_and_back(words: list[str], files: dict[str, Any], tmp_path: Path) -> None:
    process_cache.clear()
    path = f"clip.path={files['t5']}"
    for clip in (["clip=float8_e4m3fn"], ["clip=auto", path]):
        made = [
            run_job([*words, FLOAT, *clip, lora(files["lora"], s)], tmp_path / "out")
            for s in (1.0, 0.25, 0.0, 1.0)
        ]

        assert [result.metrics["build/load_s"] > 0 for result in made] == [True, False, False, False]

        first, weak, off, again = (result.candidate.trajectories for result in made)

        assert same(first, again)
        assert not same(first, weak)
        assert not same(weak, off)

        cosines = [result.metrics["clip/cosine_mean"] for result in made]

        assert cosines[0] == cosines[3] and len(set(cosines)) == 3, (
            "of the float encoders with the same strengths"
        )
    process_cache.clear()


def test_text_strength_of_quantized_encoders(
    run_with: Callable[..., FinishedRun], files: dict[str, Any]
) -> None:
    words = (FLOAT, "clip=int8_rowwise")
    quiet = run_with(*words, lora(files["lora"], 1.0, text_strength=0.0))

    assert same(quiet.latents, run_with(*words).latents)

    loud = run_with(*words, lora(files["lora"], 0.0, text_strength=1.0))

    assert same(loud.latents, run_with(*words, lora(files["lora"], 1.0)).latents)


def test_a_loras_bias(
    filled: Callable, run_with: Callable, files: dict[str, Any], floats: dict[str, nn.Module], tmp_path: Path
) -> None:
    name, module = "encoder.layers.0.mlp.fc1", floats["text_encoder"]
    bias = torch.linspace(-1, 1, WIDTH)
    path = tmp_path / "bias.safetensors"
    save_file({f"text_encoder.{name}.diff_b": bias}, path)
    words = (
        FLOAT,
        "clip=int8_rowwise",
        "clip.kernel_backend=dequantize",
        "metrics.baseline=none",
        "model.dtype=bfloat16",
    )
    run = run_with(*words, lora(path, 2.0))
    layer = run.modules["text_encoder"].get_submodule(name)

    assert_close("bias", layer.bias, module.get_submodule(name).bias + 2 * bias, 0.005)

    run.built.set_strengths([0.0], [0.0])

    assert torch.equal(
        run.modules["text_encoder"].get_submodule(name).bias,
        module.get_submodule(name).bias.bfloat16().float(),
    )


# -- sweeps --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_builds_for_each_setting_of_clip_once(
    words: list[str], files: dict[str, Any], tmp_path: Path
) -> None:
    process_cache.clear()
    jobs = [
        ["clip=int8_rowwise"],
        ["clip=int8_rowwise", "seed=3"],
        ["clip=nvfp4"],
        ["clip=nvfp4", "clip.kernel_backend=dequantize"],
        ["clip=nvfp4", "clip.components=[text_encoder]"],
        ["clip=auto", f"clip.path={files['clip']}"],
    ]
    made = [run_job([*words, FLOAT, *job], tmp_path / "out") for job in jobs]
    process_cache.clear()

    assert [result.metrics["build/load_s"] > 0 for result in made] == [True, False, True, True, True, True]

    drew = [result.baseline for result in made]

    assert drew[0] is drew[2] is drew[3] is drew[4] is drew[5] and drew[0] is not drew[1], (
        "the float images are the same for all"
    )

    cosines = [
        result.metrics["clip/cosine_mean"] for result in made
    ]  # also where the float model drew nothing

    assert cosines[0] == cosines[1]
    assert cosines[2] == pytest.approx(cosines[3], abs=1e-6)
    assert len({round(c, 5) for c in cosines}) == 4


# -- settings ------------------------------------------------------------------------------------------------


def test_the_denoisers_file_has_no_text_encoder(model: Path, tmp_path: Path) -> None:
    spec = make_spec(
        [
            "task=quantize",
            f"model.location={model}",
            "clip=nvfp4",
            f"save={tmp_path / 'x.safetensors'}",
            "tracker=none",
        ]
    )
    message = (
        r"task=quantize writes one component, here no text encoder, and "
        r"clip= is about those; .*task\.component=text_encoder"
    )

    with pytest.raises(ConfigError, match=message):
        quantize_file(spec, Job({}, {}, [], tmp_path), None)
    assert not (tmp_path / "x.safetensors").exists()


def test_offloading_moves_one_set_of_encoders() -> None:
    with pytest.raises(
        ConfigError, match=r"offload=model moves one model to a GPU and back, metrics.baseline=run holds two"
    ):
        make_spec([FLOAT, "clip=nvfp4", "offload=model"])
    assert make_spec([FLOAT, "clip=auto", "offload=model"]).candidate == "float"
    assert make_spec([FLOAT, "clip=nvfp4", "offload=model", "metrics.baseline=none"]).candidate == "clip"


def test_embeddings_that_are_plainly_wrong(
    words: list[str], files: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of another model fits by its shapes; the images would be of something else."""
    stranger = file_of(random_pipeline(seed=5, text=WIDTH).text_encoder_2, "int8_rowwise").write(
        tmp_path / "x.safetensors"
    )
    run_job([*words, "clip=auto", f"clip.path={stranger}", "int8.enable=false"], tmp_path / "out")

    assert re.search(
        r"the embeddings are \d+ % from the float encoders', more than any format costs", caplog.text
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["clip=auto"], "clip=auto without clip.path leaves the text encoders as they are"),
        (
            ["clip=int8_rowwise", "metrics.baseline=none"],
            "has no float text encoders in memory; embeddings are not compared",
        ),
    ],
)
def test_what_a_setting_does_not_do_is_said(
    asked: list[str], message: str, words: list[str], tmp_path: Path, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO):
        run_job([*words, *asked], tmp_path / "out")

    assert message in caplog.text
