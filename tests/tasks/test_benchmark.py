"""task=bench: which shapes are timed, what is kept for backend=auto, what is printed. No time is asserted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cli_process import Command
from support.tiny_pipeline import random_pipeline
from torch import nn

from int8run.backends.auto import AutoBackend, LayerChoice
from int8run.backends.base import LayerTimes
from int8run.backends.float import Float, TimedFloat
from int8run.backends.reference import Reference
from int8run.pipeline.checkpoint_weights import DenoiserWeights
from int8run.report.console import Progress, print_lines
from int8run.tasks.benchmark import (
    make_auto_backend,
    measure_float_rows,
    measure_shape,
    tune_grouped_weights,
)
from int8run.tasks.benchmark_table import (
    BenchmarkResult,
    build_result_table,
    describe_float_rows,
    format_milliseconds,
    make_record,
)
from int8run.utils.dtypes import FLOAT_DTYPES
from int8run.utils.hardware import describe_instructions

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("task.rounds=1", "sampler.height=16", "sampler.width=16", "prompts.prompts=[a]", "progress=false")


class FakeChooser:
    """Stands for a `BackendChooser`: float takes a second for each row, INT8 always the same time.

    Args:
        int8_seconds: of one call.
        is_steady: whether the times count.
    """

    def __init__(self, int8_seconds: float, *, is_steady: bool = True):
        self.int8_seconds = int8_seconds
        self.is_steady = is_steady
        self.kept: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.cache = SimpleNamespace(put=self.kept.__setitem__)
        self.timer = self
        self.float_layer = TimedFloat(torch.float32)

    def supported_backends(self, in_features: int, out_features: int) -> list[Any]:
        return [Reference()]

    def select_correct(self, backends: list[Any], in_features: int) -> list[Any]:
        return backends

    def measure(self, backends: dict[str, Any], shape: tuple[int, ...]) -> LayerTimes:
        seconds = {
            name: float(shape[0]) if isinstance(backend, Float) else self.int8_seconds
            for name, backend in backends.items()
        }
        return LayerTimes(seconds, {}, self.is_steady)

    def note_failures(self, failures: dict[str, str]) -> None:
        self.left_out |= failures

    def save_choice(self, names: Any, shape: tuple[int, ...], choice: LayerChoice) -> None:
        self.kept[str(shape)] = (choice.backend.name, choice.comparison.speedup)


def test_rounds_out_of_range_are_refused_at_once(command: Command, model: str) -> None:
    outcome = command("task=bench", model, "task.rounds=0")

    assert outcome.code == 2 and "task.rounds" in outcome.err


def test_every_int8_layer_is_timed_on_its_shape(command: Command, model: str) -> None:
    outcome = command("task=bench", model, "backend=auto", "backend.table=choices.json", *SMALL)

    assert outcome.code == 0, outcome.err
    (file,) = command.folder.rglob("bench.json")
    record = json.loads(file.read_text())
    assert record["layers"].keys() == record["milliseconds"].keys()
    assert all(set(times) > set(FLOAT_DTYPES) for times in record["milliseconds"].values())
    assert record["step_milliseconds"].keys() == set.union(*map(set, record["milliseconds"].values()))
    timed_sizes = {shape.partition("x")[2] for shape in record["layers"]}
    linears = [m for m in random_pipeline().transformer.modules() if isinstance(m, nn.Linear)]
    sizes = {f"{linear.in_features}x{linear.out_features}" for linear in linears}
    assert timed_sizes <= sizes
    assert record["float_rows"].keys() == timed_sizes
    assert "choices:  choices.json" in outcome.out
    attentions = record["attention"]
    assert attentions and all(entry["calls"] > 0 for entry in attentions.values())
    assert all(set(FLOAT_DTYPES) <= entry["milliseconds"].keys() for entry in attentions.values())
    assert "convolutions" not in record, "FLUX has none"


def test_no_weight_of_a_layer_that_is_timed_is_read(
    command: Command, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model that saves gigabytes: shapes are enough."""
    read: list[str] = []
    read_tensor = DenoiserWeights.read_tensor

    def read_noted(weights: DenoiserWeights, name: str) -> torch.Tensor:
        read.append(name)
        return read_tensor(weights, name)

    monkeypatch.setattr(DenoiserWeights, "read_tensor", read_noted)
    outcome = command("task=bench", model, "backend=reference", "model_type=flux", *SMALL)

    assert outcome.code == 0, outcome.err
    assert "x_embedder.weight" in read
    assert not [name for name in read if name.endswith(("to_q.weight", "proj_mlp.weight", "net.2.weight"))]


def test_configs_are_enough_for_a_number_of_rows(
    command: Command, model_folder: Path, tmp_path: Path
) -> None:
    configs = tmp_path / "configs"
    for file in model_folder.rglob("*.json"):
        copied = configs / file.relative_to(model_folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    outcome = command("task=bench", f"model.location={configs}", "task.rows=24", "backend=reference", *SMALL)

    assert outcome.code == 0, outcome.err
    (file,) = command.folder.rglob("bench.json")
    layers = json.loads(file.read_text())["layers"]
    assert layers and all(shape.startswith("24x") for shape in layers)
    assert "not timed: convolutions and attention" in outcome.out


@pytest.mark.parametrize("rows", ["0", "1.5"])
def test_a_number_of_rows_that_cannot_be_is_an_error(command: Command, model: str, rows: str) -> None:
    outcome = command("task=bench", model, f"task.rows={rows}")

    assert outcome.code == 2 and f"task.rows is {rows}; allowed is a whole number from 1" in outcome.message


def test_a_model_without_layers_to_quantize_is_an_error(command: Command, model: str) -> None:
    ignore = "model_type.ignore=[{pattern: '*', reason: all}]"
    outcome = command("task=bench", model, "model_type=flux", ignore, *SMALL)

    assert outcome.code == 2
    assert "no Linear would become INT8; choose another model_type=" in outcome.message


@pytest.mark.parametrize(("int8_seconds", "rows"), [(0.5, 0), (5.0, 4), (1000.0, 32)])
def test_float_is_preferred_up_to_the_rows_where_it_is_faster(int8_seconds: float, rows: int) -> None:
    chooser: Any = FakeChooser(int8_seconds)

    assert measure_float_rows(chooser, 64, 32) == rows
    assert chooser.kept == {"float_rows | 64x32": str(rows)}


def test_the_fastest_backend_is_kept_and_unsteady_times_are_not() -> None:
    steady: Any = FakeChooser(0.5)
    unsteady: Any = FakeChooser(0.5, is_steady=False)

    times = measure_shape(steady, (8, 64, 32))

    assert times.seconds == {**dict.fromkeys(FLOAT_DTYPES, 8.0), "reference": 0.5}
    assert steady.kept == {"(8, 64, 32)": ("reference", 16.0)}

    measure_shape(unsteady, (8, 64, 32))
    measure_float_rows(unsteady, 64, 32)
    assert unsteady.kept == {}


SECONDS = {
    (8, 64, 32): {"float32": 0.004, "bfloat16": 0.0015, "a": 0.002, "b_c": 0.001},
    (8, 32, 64): {"float32": 0.002, "bfloat16": 0.003},
}
RESULT = BenchmarkResult(SECONDS, {(8, 64, 32): 3, (8, 32, 64): 1}, {})


class DecodingBackend(Reference):
    """Stands for a backend with tiles for weights of few bits."""

    def __init__(self) -> None:
        object.__setattr__(self, "tuned", [])

    def tune_grouped(self, timer: Any, shape: tuple[int, int, int], bits: int) -> None:
        self.tuned.append((shape, bits))


def test_weights_of_few_bits_are_tuned_for_each_shape_where_the_settings_ask_for_them() -> None:
    chooser, backend = FakeChooser(int8_seconds=1.0), DecodingBackend()
    chooser.supported_backends = lambda in_features, out_features: [Reference(), backend]
    shapes, progress = [(9, 64, 32), (9, 32, 64)], Progress(enabled=False)
    tune_grouped_weights(chooser, shapes, [], progress)
    assert backend.tuned == []

    tune_grouped_weights(chooser, shapes, [4, 6], progress)
    assert backend.tuned == [((9, 32, 64), 4), ((9, 32, 64), 6), ((9, 64, 32), 4), ((9, 64, 32), 6)]


def test_the_table_is_sorted_and_weighs_each_shape_by_its_layers() -> None:
    table = build_result_table("t", RESULT)

    assert [str(column.header) for column in table.columns] == [
        "rows×in→out",
        "layers",
        "bf16",  # 3 x 1.5 + 3, float32 takes 14
        "fp32",
        "a",
        "b_\nc",
        "ratio",
    ]
    assert list(zip(*(column.cells for column in table.columns), strict=True)) == [
        ("8×64→32", "3", "1.50", "4.00", "2.00", "1.00", "1.50×"),
        ("8×32→64", "1", "3.00", "2.00", "–", "–", "–"),
        ("all layers", "4", "7.50", "14.0", "–", "–", "–"),
    ]


def test_a_long_name_is_printed_on_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines(build_result_table("t", RESULT))

    printed = capsys.readouterr().out
    assert "b_\n" in printed.replace(" ", "") and "\\n" not in printed


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.51e-5, "0.055"), (1.5e-3, "1.50"), (14e-3, "14.0"), (1.2344, "1234")]
)
def test_a_time_has_three_digits(seconds: float, text: str) -> None:
    assert format_milliseconds(seconds) == text


def test_all_layers_are_compared_with_one_float_dtype() -> None:
    seconds = {**SECONDS, (8, 32, 64): {"float32": 0.002, "bfloat16": 0.003, "b_c": 0.0045}}
    result = BenchmarkResult(seconds, RESULT.layers, {})

    # bfloat16 takes 3 x 1.5 + 3, INT8 3 x 1 + 4.5
    assert list(build_result_table("t", result).columns[-1].cells)[-1] == "1.00×"
    assert make_record(result, "here", {"a": "why"})["cannot_run"] == {"a": "why"}


def test_the_instruction_sets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"avx2": True, "sse2": True, "amx_int8": True, "avx512_vnni": False, "cpu_name": "a"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert describe_instructions(torch.device("cpu")) == "avx2, amx_int8"

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert describe_instructions(torch.device("cpu")) == "no instructions for matrices"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert describe_instructions(torch.device("cuda")) == "compute capability 9.0"

    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert describe_instructions(torch.device("cuda")) == "gfx942"


def test_one_backend_is_timed_alone_and_float_beside_all_of_them() -> None:
    assert list(make_auto_backend(Reference()).candidates) == ["reference"]
    assert {"cpu", "triton"} <= make_auto_backend(Float()).candidates.keys()
    auto = AutoBackend({})
    assert make_auto_backend(auto) is auto


def read_ratios(result: BenchmarkResult) -> tuple[list[str], list[str]]:
    """The heads of a result's columns, and the ratio of each row."""
    table = build_result_table("", result)
    return [str(column.header) for column in table.columns], [str(cell) for cell in table.columns[-1].cells]


def test_times_that_scatter_are_not_compared() -> None:
    """One shape takes nearly all of a step."""
    seconds = {(8, 64, 32): {"cpu": 1.0, "float32": 4.0}, (8, 32, 64): {"cpu": 0.1, "float32": 0.2}}
    layers = {(8, 64, 32): 1, (8, 32, 64): 1}

    heads, ratios = read_ratios(BenchmarkResult(seconds, layers, {}, [(8, 64, 32)]))
    _, small_ratios = read_ratios(BenchmarkResult(seconds, layers, {}, [(8, 32, 64)]))

    assert ratios == ["?", "2.00×", "?"] and small_ratios == ["4.00×", "?", "3.82×"]
    assert heads[2:4] == ["cpu", "fp32"]


def test_where_times_scatter_no_backend_is_first() -> None:
    seconds = {(8, 64, 32): {"float32": 4.0, "cpu": 1.0}}
    result = BenchmarkResult(seconds, {(8, 64, 32): 1}, {(64, 32): None}, [(8, 64, 32)])

    assert result.names == ["float32", "cpu"]
    assert make_record(result, "here", {})["unsteady"] == ["8x64x32"]
    assert describe_float_rows(result.float_rows).endswith(": 64x32: ?")
