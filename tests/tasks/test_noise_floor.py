"""`metrics.noise_floor`: what of the float model is varied, what it is compared with, and what is said."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.run_job import make_spec, run_job
from support.tiny_pipeline import save_random_pipeline

from int8run.errors import ConfigError
from int8run.generate.generate import Generation
from int8run.generate.pipeline_call import choose_noise_seed
from int8run.generate.prompts import build_samples
from int8run.metrics.quality import SampleQuality
from int8run.metrics.settings import MetricsSettings
from int8run.pipeline import process_cache
from int8run.pipeline.model_files import count_weight_numbers
from int8run.report.noise_floor_text import describe_noise_floors
from int8run.tasks import noise_floor
from int8run.tasks.noise_floor import (
    FloatVariation,
    NoiseFloor,
    has_drawn_noise,
    plan_variations,
)
from int8run.tasks.noise_floor_metrics import (
    add_noise_floor,
    compare_with_noise_floor,
    describe_noise_floor,
    flatten_equivalences,
)

FLOOR, OF_DTYPE = "quality/noise_floor_db", "quality/dtype_floor_db"


@pytest.fixture(scope="module")
def spec():
    return make_spec(["metrics.noise_floor=true", "device=cpu", "tracker=none"])


def plan(spec, num_samples=2):
    """What is varied, by metric, and what is not."""
    inputs = SimpleNamespace(samples=build_samples(["a"] * num_samples, 1, 0))
    inputs.get_first_batch = lambda spec: inputs.samples[: spec.sampling.batch]
    impossible = []
    return {one.metric: one for one in plan_variations(spec, inputs, impossible)}, impossible


def test_batch_attention_threads_and_dtype_are_varied(spec):
    variations, impossible = plan(spec)

    kernels, dtype = variations[FLOOR], variations[OF_DTYPE]
    assert impossible == []
    assert kernels.changes[:2] == ["batch 2 in place of 1", "math attention"]
    assert kernels.changes[2].endswith("CPU threads") and kernels.num_threads != torch.get_num_threads()
    assert kernels.spec.sampling.batch == 2 and not kernels.spec.int8.enable
    assert dtype.spec.model.dtype == "bfloat16" and dtype.changes == ["bfloat16 in place of float32"]


@pytest.mark.parametrize(
    ("changes", "num_samples", "reason"),
    [
        ({}, 1, "batch: no two samples of this run share a call"),
        ({"attention": "flash"}, 2, "attention: attention=flash is no kernel of torch"),
        ({"compile": "full"}, 2, "attention: compile=full has chosen its kernels"),
    ],
)
def test_what_cannot_be_varied_is_said(spec, changes, num_samples, reason):
    variations, impossible = plan(replace(spec, **changes), num_samples)

    assert impossible == [reason] and len(variations[FLOOR].changes) == 2


def test_a_batch_of_several_becomes_one_of_one(spec):
    variations, _ = plan(replace(spec, sampler=replace(spec.sampler, batch=4)), num_samples=4)

    assert variations[FLOOR].changes[0] == "batch 1 in place of 4"
    assert variations[FLOOR].with_own_batch().spec.sampling.batch == 4
    assert variations[FLOOR].with_own_batch().changes == variations[FLOOR].changes[1:]


def test_threads_and_kernels_of_before_come_back(spec):
    threads = torch.get_num_threads()
    variation = FloatVariation(FLOOR, ["x"], spec, num_threads=threads + 1)

    with variation.applied():
        assert torch.get_num_threads() == threads + 1
    assert torch.get_num_threads() == threads


def test_noise_between_steps_is_noticed():
    sample = build_samples(["a"], 1, 3)[0]
    with torch.random.fork_rng([]):
        torch.manual_seed(choose_noise_seed(sample))
        assert not has_drawn_noise(sample, torch.device("cpu"))
        torch.randn(1)
        assert has_drawn_noise(sample, torch.device("cpu"))


@pytest.mark.parametrize(("free", "fits"), [(10, False), (100, True), (0, True)])
def test_a_float32_copy_is_drawn_only_where_it_fits(spec, monkeypatch, free, fits):
    monkeypatch.setattr(noise_floor, "count_free_bytes", lambda device: free)
    monkeypatch.setattr(noise_floor, "count_weight_numbers", lambda source: 10)
    monkeypatch.setattr(noise_floor, "resolve_model", lambda source: None)

    if fits:
        noise_floor.check_room(spec)
    else:
        with pytest.raises(noise_floor.NoFitError):
            noise_floor.check_room(spec)


def test_the_memory_of_a_float32_copy_is_counted_in_numbers_not_bytes(tmp_path):
    """A file in float32 needs what it has, one in fp8 four times as much."""
    weights = {
        "a": torch.zeros(3, 4, dtype=torch.float32),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
        "d": torch.tensor(1.0),
    }
    save_file(weights, tmp_path / "model.safetensors")
    source = SimpleNamespace(folder=tmp_path, elsewhere={}, has_single_files=False)

    assert count_weight_numbers(source) == 12 + 5 + 4 + 1


def test_a_noise_floor_without_a_float_model_is_refused():
    with pytest.raises(ConfigError, match=r"^metrics\.noise_floor=true compares the float model with itself"):
        MetricsSettings(noise_floor=True, baseline="none")


@pytest.mark.parametrize("value", [0, -1, "much"])
def test_a_margin_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"^metrics\.margin_db is "):
        MetricsSettings(margin_db=value)


def test_intervals_that_are_no_settings_are_refused():
    with pytest.raises(ConfigError, match=r"^metrics\.intervals is 3; it takes names and values"):
        MetricsSettings(intervals=3)


# -- comparing -----------------------------------------------------------------------------------------------


def make_flat(value):
    return [Image.new("RGB", (8, 8), (value,) * 3)]


def compare(int8_psnrs, float_values, margin_db=1.0):
    """Float images of 100 beside such of other values: (metrics, part of metrics.json, lines)."""
    baseline = Generation(frames=[make_flat(100)] * len(float_values))
    otherwise = Generation(frames=[make_flat(value) for value in float_values])
    variation = SimpleNamespace(metric=FLOOR, changes=["batch 2 in place of 1"])
    floor = NoiseFloor([variation], ["threads: the model runs on cuda"], {FLOOR: otherwise})
    quality = add_noise_floor([SampleQuality({"psnr_db": p}, []) for p in int8_psnrs], baseline, floor)
    settings = MetricsSettings(noise_floor=True, margin_db=margin_db)
    found = compare_with_noise_floor(quality, baseline, floor, settings)
    metrics = {FLOOR: quality[0].values["noise_floor_db"], "quality/psnr_db": int8_psnrs[0]}
    described = describe_noise_floor(floor, found)
    return flatten_equivalences(found), described, describe_noise_floors(described, metrics, {})


def test_int8_is_compared_with_what_float_differs_from_itself_by():
    # 20 log10(255 / 10) is 28.13 dB
    metrics, described, (line,) = compare([28.0, 28.2, 28.1, 28.3], [110] * 4)

    assert metrics["quality/noise_floor_gap_db"] == pytest.approx(28.15 - 28.1308, abs=1e-3)
    assert metrics["quality/noise_floor_p"] < 0.05
    assert described["drawn"][FLOOR]["varied"] == ["batch 2 in place of 1"]
    assert described["not_varied"] == ["threads: the model runs on cuda"]
    assert line.startswith(
        "INT8 28.0 dB; the float model against itself 28.1 dB (batch 2 in place of 1): the same"
    )


def test_a_float_model_that_repeats_itself_is_closer_than_int8():
    metrics, _, (line,) = compare([28.0, 28.2, 28.1], [100] * 3)

    assert math.isfinite(metrics["quality/noise_floor_gap_db"])
    assert "against itself identical" in line and "INT8 is further, surely by more than 1 dB" in line


def test_what_the_samples_do_not_decide_is_said_with_how_many_would():
    _, _, (line,) = compare([27.0, 29.6, 28.1], [110] * 3)

    assert "3 samples do not tell whether these are the same within 1 dB" in line and "more would" in line
    assert "1 sample cannot say" in compare([28.0], [110])[2][0]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_draws_the_float_model_otherwise_once(tmp_path: Path) -> None:
    model = save_random_pipeline(tmp_path / "model")
    words = [
        f"model.location={model}",
        f"cache.folder={tmp_path / 'cache'}",
        *("sampler.height=16", "sampler.width=16", "sampler.steps=3", "prompts.prompts=[a,b,c]"),
        *("tracker=none", "backend=reference", "device=cpu", "metrics.noise_floor=true"),
    ]
    process_cache.clear()
    metrics = run_job(words, tmp_path / "first").metrics
    process_cache.clear()
    again = run_job(words, tmp_path / "second").metrics

    measured = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert metrics[OF_DTYPE] == again[OF_DTYPE] and metrics[FLOOR] == again[FLOOR]
    assert metrics[FLOOR] > metrics[OF_DTYPE] > 20, "kernels change less than half precision does"
    assert len(list((tmp_path / "cache" / "float").glob("*.safetensors"))) == 2
    assert measured["noise_floor"]["drawn"].keys() == {FLOOR, OF_DTYPE}
    assert measured["noise_floor"]["drawn"][OF_DTYPE]["test"]["num_samples"] == 3
    assert {"quality/psnr_db_low", "quality/psnr_db_high", "quality/psnr_db_median"} <= set(metrics)
    assert len(list((tmp_path / "first" / "images").iterdir())) == 6, "its images are not kept"
