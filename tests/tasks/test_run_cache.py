"""What a run keeps on disk and finds again: INT8 layers, and what the float model drew. And models that come
from files of our own.
"""

import csv
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families.instances_b import wan22
from safetensors.torch import load_file, save_file
from support.run_job import run_job, save_lora
from support.tiers import slow_except
from support.tiny_pipeline import random_pipeline, save_random_pipeline

from int8run.pipeline import build, process_cache, quantize_denoiser
from int8run.pipeline.load_settings import LoadSettings
from int8run.pipeline.loaded_model import LoadedModel
from int8run.tasks.run import RunResult
from int8run.utils.content_hash import get_hash_path, hash_content

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A model that the test may change."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    process_cache.clear()
    yield
    process_cache.clear()


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were quantized."""
    seen: list[str] = []
    real = quantize_denoiser.quantize_layers

    def watched(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        for plan, layer in real(*arguments, **keywords):
            seen.append(plan.name)
            yield plan, layer

    monkeypatch.setattr(quantize_denoiser, "quantize_layers", watched)
    return seen


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., RunResult]:
    """Runs a model with a cache of the test's own, each time as a new process would."""
    numbers = iter(range(99))

    def start(model: Path | str, *words: str) -> RunResult:
        process_cache.clear()
        size = [
            "sampler.height=16",
            "sampler.width=16",
            "sampler.steps=2",
            "prompts.prompts=[a]",
            "tracker=none",
            "backend=reference",
        ]
        about = [
            f"model.location={model}",
            f"cache.folder={tmp_path / 'cache'}",
            "metrics.baseline=none",
            "metrics.layers=false",
        ]
        return run_job([*about, *size, "progress=false", *words], tmp_path / f"out{next(numbers)}")

    return start


def images(result: RunResult) -> list[bytes]:
    return [frame.tobytes() for frames in result.candidate.frames for frame in frames]


def layers(result: RunResult) -> list[dict[str, str]]:
    return list(csv.DictReader((result.output_dir / "layers.csv").read_text().splitlines()))


def kept(tmp_path: Path, kind: str = "int8") -> list[Path]:
    return sorted((tmp_path / "cache" / kind).glob("*.safetensors"))


# -- INT8 layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    slow_except(
        [["outlier=smoothquant", "calibration.prompts=[b]"], ["int8.bits=4", "outlier=convrot"]],
        [
            [],
            ["int8.bits=4", "outlier=convrot"],
            ["int8.bits=6", "int8.group_size=32", "outlier=convrot", "rounding=mse"],
            ["outlier=convrot", "rounding=mse"],
            ["outlier=hadanorm"],
            ["outlier=smoothquant", "calibration.prompts=[b]"],
        ],
    ),
    ids=str,
)
def test_a_second_run_quantizes_nothing_and_generates_the_same(
    model: Path, job: Callable[..., RunResult], quantized: list[str], words: list[str], tmp_path: Path
) -> None:
    first = job(model, *words)

    assert len(quantized) == 34
    assert len(kept(tmp_path)) == 1

    second = job(model, *words)

    assert len(quantized) == 34, "quantized again"
    assert images(first) == images(second)
    assert layers(first) == layers(second)
    assert first.metrics["quant/macs_int8_share"] == second.metrics["quant/macs_int8_share"]


@pytest.mark.slow
def test_bits_that_a_budget_chose_are_those_of_the_second_run(
    model: Path, job: Callable[..., RunResult], quantized: list[str]
) -> None:
    bits = ["int8.bits=auto", "outlier=convrot"]
    budget = ["model_type.mixed_precision=auto", "quality_db=30", "calibration.prompts=[b]"]
    first = job(model, *bits, *budget)
    number = len(quantized)

    second = job(model, *bits, *budget)

    assert len(quantized) == number, "quantized again"
    assert images(first) == images(second)
    assert layers(first) == layers(second)
    assert len({row["bits"] for row in layers(first)}) > 1, "the budget had nothing to choose"
    chosen = {name: value for name, value in first.metrics.items() if name.startswith("budget/")}
    assert chosen == {name: second.metrics[name] for name in chosen}


def test_layers_that_no_file_can_hold_are_not_kept(
    model: Path, job: Callable[..., RunResult], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    job(model, "int8.bits=4", "outlier=none")

    assert not kept(tmp_path)
    assert "The INT8 layers are not kept for later runs: asym_w4a8_int8" in caplog.text


def test_the_same_weights_elsewhere_are_the_same(
    model: Path, job: Callable[..., RunResult], quantized: list[str], tmp_path: Path
) -> None:
    first = job(model)
    moved = shutil.move(model, tmp_path / "moved")

    assert images(job(moved, "metrics.baseline=run")) == images(first)
    assert len(quantized) == 34


OTHER = {
    "method": ["outlier=convrot"],
    "rounding": ["rounding=mse"],
    "dtype": ["model.dtype=bfloat16"],
    "family": ["model_type=none"],
    "reasons": ["model_type=flux", "model_type.ignore=[{pattern: x_embedder, reason: asked}]"],
}


def test_other_settings_are_quantized_anew(
    model: Path, job: Callable[..., RunResult], quantized: list[str], tmp_path: Path
) -> None:
    job(model)
    for number, words in enumerate(OTHER.values()):
        quantized.clear()
        job(model, *words)
        assert quantized and len(kept(tmp_path)) == number + 2, words
    quantized.clear()
    # these have no say in the integers
    job(model, "sampler.steps=1", "seed=3", "prompts.prompts=[b]", "int8.small_batch_fallback=never")

    assert not quantized


def test_another_weight_is_quantized_anew(
    model: Path, job: Callable[..., RunResult], quantized: list[str]
) -> None:
    first = job(model)
    tensors = load_file(model / WEIGHTS)
    tensors["transformer_blocks.0.attn.to_q.weight"] = (
        tensors["transformer_blocks.0.attn.to_q.weight"].flip(0).contiguous()
    )
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    quantized.clear()

    assert images(job(model)) != images(first)
    assert len(quantized) == 34


def lora(path: Path, strength: float = 1.0, mode: str = "bake") -> list[str]:
    adapter = f"_target_: int8run.lora.config.Adapter, name: style, path: {path}, strength: {strength}"
    return [
        f"lora.adapters=[{{{adapter}}}]",
        f"lora.mode={mode}",
    ]


@pytest.mark.slow
def test_baked_loras_count_and_others_do_not(
    model: Path, job: Callable[..., RunResult], quantized: list[str], tmp_path: Path
) -> None:
    file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer)
    baked = job(model, *lora(file))
    quantized.clear()

    assert images(job(model, *lora(file))) == images(baked)
    assert not quantized
    assert images(job(model, *lora(file, 0.5))) != images(baked)
    assert quantized

    quantized.clear()
    tensors = load_file(file)
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, file)  # another LoRA of that name

    assert images(job(model, *lora(file))) != images(baked)
    assert quantized

    quantized.clear()
    names = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k")]
    halves = {key.removeprefix(names[0]): t for key, t in tensors.items() if key.startswith(names[0])}
    assert len(halves) == 2
    runs = []
    for name in names:  # the same tensors for another layer
        save_file({f"{name}{end}": tensor for end, tensor in halves.items()}, file)
        runs.append(images(job(model, *lora(file))))

    assert runs[0] != runs[1]

    quantized.clear()
    job(model)

    assert quantized, "without a LoRA"

    quantized.clear()
    dynamic = job(model, *lora(file, mode="dynamic"))

    assert not quantized
    assert images(dynamic) == images(job(model, *lora(file, mode="dynamic"), "cache.limit_gb=0"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def no_scale(path: Path) -> None:
    tensors = load_file(path)
    save_file(
        {key: t for key, t in tensors.items() if key != "transformer_blocks.0.attn.to_q.weight_scale"}, path
    )


def empty(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)


def one_less(path: Path) -> None:
    tensors = load_file(path)
    save_file(
        {key: t for key, t in tensors.items() if not key.startswith("transformer_blocks.0.attn.to_q.")}, path
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def with_its_hash(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """A file that was wrong when it was written."""

    def write(path: Path) -> None:
        damage(path)
        get_hash_path(path).write_text(hash_content(path))

    write.__name__ = f"{damage.__name__}, as written"
    return write


@pytest.mark.parametrize(
    "damage",
    slow_except([flip], [flip, *map(with_its_hash, [cut, no_scale, empty, one_less])]),
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_file_is_made_anew(
    damage: Callable[[Path], None],
    model: Path,
    job: Callable[..., RunResult],
    quantized: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = job(model)
    (file,) = kept(tmp_path)
    damage(file)
    quantized.clear()
    with caplog.at_level(logging.WARNING):
        assert images(job(model)) == images(first)
        assert len(quantized) == 34

    assert f"{file} is not used and removed from the cache" in caplog.text

    quantized.clear()

    assert images(job(model)) == images(first)
    assert not quantized


def test_nothing_is_kept_where_nothing_is_allowed(
    model: Path, job: Callable[..., RunResult], quantized: list[str], tmp_path: Path
) -> None:
    job(model, "cache.limit_gb=0")
    job(model, "cache.limit_gb=0")

    assert len(quantized) == 68
    assert not (tmp_path / "cache").exists()


# -- what the float model generated ------------------------------------------------------------------------


@pytest.fixture
def float_loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each model that was loaded, whether its float denoiser was loaded whole."""
    seen: list[bool] = []
    real = build.load_model

    def watched(settings: LoadSettings, *arguments: Any) -> LoadedModel:
        seen.append(settings.needs_float_denoiser)
        return real(settings, *arguments)

    monkeypatch.setattr(build, "load_model", watched)
    return seen


QUALITY = ("quality/psnr_db", "quality/ssim", "quality/latent_rel_err")
CACHED = "metrics.baseline=cached"


def test_a_cached_baseline_says_what_a_run_says(
    model: Path, job: Callable[..., RunResult], float_loads: list[bool], tmp_path: Path
) -> None:
    run = job(model, "metrics.baseline=run")
    float_loads.clear()
    first = job(model, CACHED)

    assert float_loads == [True, False] and len(kept(tmp_path, "float")) == 1, (
        "the float model alone, then the INT8 model alone"
    )

    float_loads.clear()
    second = job(model, CACHED)

    assert float_loads == [False], "no float model in the second run"
    for result in (first, second):
        assert images(result) == images(run)
        assert result.baseline is not None
        assert run.baseline is not None
        assert [f.tobytes() for f in result.baseline.images] == [f.tobytes() for f in run.baseline.images]
        assert {key: result.metrics[key] for key in QUALITY} == {key: run.metrics[key] for key in QUALITY}
        assert result.metrics["float/denoiser_bytes"] == run.metrics["float/denoiser_bytes"]
        assert result.metrics["memory/denoiser_ratio"] == run.metrics["memory/denoiser_ratio"]
        assert sorted(p.name for p in (result.output_dir / "images").iterdir()) == sorted(
            p.name for p in (run.output_dir / "images").iterdir()
        )


OTHER_IMAGES = {
    "prompt": ["prompts.prompts=[b]"],
    "seed": ["seed=5"],
    "steps": ["sampler.steps=1"],
    "guidance": ["sampler.guidance=2"],
    "scheduler": ["+sampler.scheduler_settings.shift=3.0"],
    "dtype": ["model.dtype=bfloat16"],
}


@pytest.mark.slow
def test_other_images_are_generated(
    model: Path, job: Callable[..., RunResult], float_loads: list[bool], tmp_path: Path
) -> None:
    job(model, CACHED)
    for words in OTHER_IMAGES.values():
        float_loads.clear()
        job(model, CACHED, *words)
        assert True in float_loads, words
    float_loads.clear()
    job(model, CACHED, "outlier=convrot", "rounding=mse")  # which the float model knows nothing of

    assert True not in float_loads

    (model / "scheduler" / "scheduler_config.json").write_text(
        (model / "scheduler" / "scheduler_config.json").read_text().replace('"shift": 1.0', '"shift": 3.0')
    )
    job(model, CACHED)

    assert True in float_loads, "another scheduler in the folder"


@pytest.mark.slow
def test_loras_and_schedules_of_them_have_images_of_their_own(
    model: Path, job: Callable[..., RunResult], float_loads: list[bool], tmp_path: Path
) -> None:
    file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer)
    dynamic = lora(file, mode="dynamic")
    scheduled = [dynamic[0].replace("strength: 1.0", "strength: [[0, 1], [0.5, 0]]"), "lora.mode=dynamic"]
    for words in (dynamic, lora(file, 0.5, "dynamic"), scheduled):
        float_loads.clear()
        made = job(model, CACHED, *words)

        assert True in float_loads, words

        float_loads.clear()
        again, run = job(model, CACHED, *words), job(model, "metrics.baseline=run", *words)

        assert float_loads[0] is False
        for result in (made, again):
            assert {key: result.metrics[key] for key in QUALITY} == {key: run.metrics[key] for key in QUALITY}


@pytest.mark.slow
def test_a_damaged_image_is_generated_again(
    model: Path,
    job: Callable[..., RunResult],
    float_loads: list[bool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = job(model, CACHED)
    (file,) = kept(tmp_path, "float")
    for damage in (flip, cut, empty, with_its_hash(cut), with_its_hash(empty)):
        damage(file)
        float_loads.clear()

        assert job(model, CACHED).metrics["quality/psnr_db"] == first.metrics["quality/psnr_db"]
        assert True in float_loads
        assert f"{file} is not used and removed from the cache" in caplog.text


def test_the_float_job_is_the_same_without_int8() -> None:
    from support.run_job import make_spec

    spec = make_spec(
        ["metrics.baseline=cached", "model_type.mixed_precision=auto", "quality_db=40", "save=m.safetensors"]
    )
    alone = spec.float_only

    assert not alone.int8.enable
    assert alone.save is None
    assert alone.needs_float_denoiser
    assert alone.float_key == spec.float_key


# -- files of our own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.safetensors", "folder"])
def test_a_saved_model_is_a_checkpoint_and_a_model(
    name: str, model: Path, job: Callable[..., RunResult], quantized: list[str], tmp_path: Path
) -> None:
    made = job(model, "outlier=convrot", f"save={tmp_path / name}", "cache.limit_gb=0")
    quantized.clear()
    read = job(model, f"int8.checkpoint={tmp_path / name}", "cache.limit_gb=0")
    itself = job(tmp_path / name, f"++model.base={model}", "cache.limit_gb=0")

    assert images(read) == images(itself) == images(made)
    assert not quantized

    again = tmp_path / f"again_{name}"
    job(tmp_path / name, f"++model.base={model}", f"save={again}", "cache.limit_gb=0")
    one, two = (load_file(p if p.is_file() else p / WEIGHTS.name) for p in (tmp_path / name, again))

    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bake", "dynamic", "stochastic"])
def test_loras_on_a_streamed_model_are_those_of_a_resident_one(
    mode: str, model: Path, job: Callable[..., RunResult], tmp_path: Path
) -> None:
    file = save_lora(
        tmp_path / "style.safetensors", random_pipeline().transformer, only=""
    )  # float layers and all
    words = [*lora(file, 0.7, mode), "cache.limit_gb=0"]
    streamed, resident = job(model, *words), job(model, *words, "metrics.baseline=run")
    without = job(model, "cache.limit_gb=0")

    assert images(streamed) != images(without)
    for key in ("lora/modules_matched", f"lora/layers_{mode}"):
        assert streamed.metrics.get(key) == resident.metrics.get(key)

    if mode != "stochastic":
        # of a resident model stochastic rounding may start from float weights, of a streamed one from
        # integers: near, not equal
        assert images(streamed) == images(resident)
        assert all(map(torch.equal, streamed.candidate.trajectories, resident.candidate.trajectories))
    else:
        one, two = streamed.candidate.trajectories[0][-1], resident.candidate.trajectories[0][-1]
        assert (one - two).norm() < 0.02 * two.norm()


@pytest.mark.slow
def test_baked_integers_are_the_same_streamed_and_resident(
    model: Path, job: Callable[..., RunResult], tmp_path: Path
) -> None:
    file = save_lora(tmp_path / "style.safetensors", random_pipeline().transformer, only="")
    words = [*lora(file, 0.7), "cache.limit_gb=0", "outlier=convrot"]
    job(model, *words, f"save={tmp_path / 'a.safetensors'}")
    job(model, *words, f"save={tmp_path / 'b.safetensors'}", "metrics.baseline=run")
    one, two = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")

    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


# -- two experts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan22")
    wan22().save_pretrained(folder)
    return folder


WAN = ["model.dtype=float32", "model_type=wan", "+sampler.extra.num_frames=5", "sampler.guidance=1"]


@pytest.mark.slow
def test_two_experts_are_kept_and_found(
    experts: Path, job: Callable[..., RunResult], quantized: list[str], tmp_path: Path
) -> None:
    first = job(experts, *WAN)
    names = {name.partition(".")[0] for name in quantized}

    assert names == {"transformer", "transformer_2"}

    quantized.clear()
    second = job(experts, *WAN)

    assert not quantized
    assert images(first) == images(second)
    assert layers(first) == layers(second)


@pytest.mark.slow
def test_two_experts_go_into_a_folder_and_come_back(
    experts: Path, job: Callable[..., RunResult], quantized: list[str], tmp_path: Path
) -> None:
    made = job(experts, *WAN, f"save={tmp_path / 'saved'}", "cache.limit_gb=0")

    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "card.md",
        "grid.png",
        "transformer",
        "transformer_2",
    ]

    quantized.clear()
    read = job(experts, *WAN, f"int8.checkpoint={tmp_path / 'saved'}", "cache.limit_gb=0")
    files = {name: str(tmp_path / "saved" / name / WEIGHTS.name) for name in ("transformer", "transformer_2")}
    mapping = "{" + ", ".join(f"{name}: {path}" for name, path in files.items()) + "}"
    itself = job(mapping, f"++model.base={experts}", *WAN, "cache.limit_gb=0")

    assert images(read) == images(itself) == images(made)
    assert not quantized

    job(experts, *WAN, f"save={tmp_path / 'one.safetensors'}", "cache.limit_gb=0")

    assert sorted(p.name for p in tmp_path.glob("one*")) == [
        "one.card.md",
        "one.grid.png",
        "one_transformer.safetensors",
        "one_transformer_2.safetensors",
    ]
