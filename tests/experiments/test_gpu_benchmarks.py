"""What the GPU benchmarks make of their times: ratios and tables, where no GPU is needed."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.experiment_script import load_script

from int8run.backends import triton
from int8run.kernels.int8_linear.tile import BUCKETS, find_bucket

SIZE = (2048, 1024, 512)
GIGA_OPS = 2 * 2048 * 1024 * 512 / 1e9


@pytest.fixture(scope="module")
def linear_gpu() -> ModuleType:
    """`linear_bench/gpu.py`."""
    return load_script("linear_bench/gpu.py")


@pytest.fixture(scope="module")
def model_gpu() -> ModuleType:
    """`model_bench/gpu.py`."""
    return load_script("model_bench/gpu.py")


def test_a_layer_is_compared_with_cublas_round_by_round(linear_gpu: ModuleType) -> None:
    ceilings = linear_gpu.Ceilings(bf16_ops=1e15, int8_ops=2e15, bytes=1e12, int8_from="a guess")
    records = {"bf16 cuBLAS": {"error": 0.0}, "int8run triton": {"error": 0.01}}
    seconds = {"bf16 cuBLAS": [2e-3, 4e-3, 6e-3], "int8run triton": [1e-3, 2e-3, 2e-3]}

    linear_gpu.add_times(records, seconds, SIZE, ceilings)

    triton = records["int8run triton"]
    assert triton["us"] == 2000
    assert triton["ratio"] == {"low": 2.0, "median": 2.0, "high": 2.5}
    assert triton["tops"] == pytest.approx(GIGA_OPS / 2)
    # x and y in bfloat16 and the weight in int8, at 1 TB/s
    assert triton["limit_share"] == pytest.approx(
        (2 * 2048 * 1024 + 1024 * 512 + 2 * 2048 * 512) / 1e12 / 2e-3
    )
    assert triton["limited_by"] == "bytes"


def test_what_a_lora_adds_is_a_share_of_the_layer_alone(linear_gpu: ModuleType) -> None:
    ceilings = linear_gpu.Ceilings(bf16_ops=1.0, int8_ops=1.0, bytes=1e12, int8_from="a guess")
    names = ("bf16 cuBLAS", "int8run triton", "int8run triton, LoRA r16")
    records: dict[str, dict[str, object]] = {name: {} for name in names}
    seconds = dict(zip(names, ([2.0] * 3, [1.0] * 3, [1.25] * 3), strict=True))

    linear_gpu.add_times(records, seconds, SIZE, ceilings)

    assert records["int8run triton, LoRA r16"]["extra"] == {"low": 0.25, "median": 0.25, "high": 0.25}
    assert "extra" not in records["int8run triton"]
    assert records["int8run triton"]["limited_by"] == "operations"


def test_the_table_of_a_size_names_what_was_not_timed(linear_gpu: ModuleType) -> None:
    shape = linear_gpu.LayerShape("FLUX", "single out", *SIZE, calls=38)
    timed = {
        "us": 12.34,
        "ratio": {"low": 1.0, "median": 1.5, "high": 2.0},
        "tops": 80.4,
        "limit_share": 0.5,
        "limited_by": "bytes",
        "launch_us": 9.0,
        "error": 0.0123,
    }
    methods = {
        "fast": timed,
        "wrong": {"error": 0.5, "refused": "error 0.5"},
        "absent": {"failed": "no module"},
    }
    tiles = [{"tile": "64x64", "us": 3.0, "tops": 7.0}, {"tile": "too large", "failed": "no memory"}]

    lines = linear_gpu.format_size([shape], {"methods": methods, "tiles": tiles}).splitlines()

    assert lines[0] == "## 2048x1024x512: FLUX single out x38"
    assert "| fast | 12.3 | 1.50 [1.00–2.00] | 80 | 50 % of bytes | 9 | 0.0123 |  |" in lines
    assert lines[-3:] == [
        "refused, not timed: wrong – error 0.5",
        "cannot run: absent – no module",
        "tile: 64x64 3.0 µs, 7 TOPS",
    ]


def test_a_step_sums_every_layer_of_more_than_one_row(linear_gpu: ModuleType) -> None:
    shapes = [
        linear_gpu.LayerShape("FLUX", "large", *SIZE, calls=10),
        linear_gpu.LayerShape("FLUX", "modulation", 1, 8, 8, calls=1000),
    ]
    methods = {"base": {"us": 200.0}, "own": {"us": 50.0}, "refused": {"error": 1.0}}

    table = linear_gpu.format_steps({"flux": shapes}, {SIZE: {"methods": methods}}, "base")

    assert table.splitlines()[2:] == ["| base | 2.0 (1.00x) |", "| own | 0.5 (4.00x) |", "| refused | – |"]


def test_the_fastest_tile_is_kept_where_the_backend_looks_for_it(
    linear_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "get_gpu_architecture", lambda device: "sm_90")
    table, ours = str(tmp_path / "choices.json"), linear_gpu.ours
    case, fastest = linear_gpu.make_case(2048, 64, 32), ours.parse_tile("64x64x64/4/4")

    ours.keep_tile(case, fastest, table)

    backend = triton.Triton(table=table)
    tiles = backend.load_tiles(case.x.device, 64, 32)
    assert tiles[BUCKETS.index(find_bucket(2048))] == fastest
    assert fastest not in tiles[:-1]
    assert fastest not in backend.load_tiles(case.x.device, 64, 64)


def test_a_model_is_compared_in_its_own_mode_and_with_eager(model_gpu: ModuleType) -> None:
    timed = model_gpu.TimedModel(torch.nn.Identity(), "torchao", "compile=blocks")
    seconds = {
        "bf16 eager": [4.0, 4.0],
        "bf16 compile=blocks": [2.0, 2.0],
        "torchao compile=blocks": [1.0, 1.0],
    }

    times = model_gpu.compare_times(timed, seconds)
    row = model_gpu.format_row(timed, {**times, "workspace_gib": 1.0}, {"weights_gib": 11.5, "error": 0.01})

    assert row == [
        "torchao compile=blocks",
        "1000.0",
        "2.00 [2.00–2.00]",
        "4.00 [4.00–4.00]",
        "11.5 + 1.0",
        "0.0100",
    ]


def test_a_model_is_built_eager_and_compiled_unless_it_is_wrong(
    model_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (2 * x,)

        def compile_repeated_blocks(self, fullgraph: bool, backend: str) -> None:
            assert fullgraph and backend == "eager"

    def build_wrong(model: torch.nn.Module, call: object, layers: str) -> torch.nn.Module:
        return torch.nn.Flatten()

    monkeypatch.setitem(model_gpu.BUILDS, "broken", build_wrong)

    call = {"x": torch.ones(2)}
    models, records = model_gpu.build_models(Doubling(), call, ["bf16", "broken"], "family")

    assert [model.name for model in models] == ["bf16 eager", "bf16 compile=blocks"]
    assert records["bf16"] == {"error": 0.0, "weights_gib": 0.0}
    assert records["broken"]["failed"].startswith("TypeError: ")
