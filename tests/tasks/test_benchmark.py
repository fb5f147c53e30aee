"""task=bench: which shapes are timed, what is kept for backend=auto, what is printed. No time is asserted."""

import json
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cli_process import Command
from support.tiny_pipeline import random_pipeline
from torch import nn

from int8run.backends.reference import Reference
from int8run.tasks.benchmark import (
    BenchmarkResult,
    FloatBackend,
    build_result_table,
    measure_float_rows,
    measure_shape,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT = FloatBackend(torch.float32)
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
        self.kept: dict[str, str] = {}
        self.cache = SimpleNamespace(put=self.kept.__setitem__)

    def supported_backends(self, in_features: int, out_features: int) -> list[Any]:
        return [Reference()]

    def select_correct(self, backends: list[Any], in_features: int) -> list[Any]:
        return backends

    def measure_seconds(self, backends: Sequence[Any], rows: int, *shape: int) -> dict[str, float]:
        return {backend.name: float(rows) if backend is FLOAT else self.int8_seconds for backend in backends}

    def save_choice(self, names: Iterable[str], shape: tuple[int, ...], best: str) -> None:
        self.kept[str(shape)] = best


def test_every_int8_layer_is_timed_on_its_shape(command: Command, model: str) -> None:
    outcome = command("task=bench", model, "backend=auto", "backend.table=choices.json", *SMALL)

    assert outcome.code == 0, outcome.err
    (file,) = command.folder.rglob("bench.json")
    record = json.loads(file.read_text())
    assert record["layers"].keys() == record["milliseconds"].keys()
    assert all("float" in times and len(times) > 1 for times in record["milliseconds"].values())
    timed_sizes = {shape.partition("x")[2] for shape in record["layers"]}
    linears = [m for m in random_pipeline().transformer.modules() if isinstance(m, nn.Linear)]
    sizes = {f"{linear.in_features}x{linear.out_features}" for linear in linears}
    assert timed_sizes <= sizes
    assert record["float_rows"].keys() == timed_sizes
    assert "choices:  choices.json" in outcome.out


def test_a_model_without_layers_to_quantize_is_an_error(command: Command, model: str) -> None:
    ignore = "model_type.ignore=[{pattern: '*', reason: all}]"
    outcome = command("task=bench", model, "model_type=flux", ignore, *SMALL)

    assert outcome.code == 2
    assert "no Linear would become INT8; choose another model_type=" in outcome.message


@pytest.mark.parametrize(("int8_seconds", "rows"), [(0.5, 0), (5.0, 4), (1000.0, 32)])
def test_float_is_preferred_up_to_the_rows_where_it_is_faster(int8_seconds: float, rows: int) -> None:
    chooser: Any = FakeChooser(int8_seconds)

    assert measure_float_rows(chooser, FLOAT, 64, 32) == rows
    assert chooser.kept == {"float_rows | 64x32": str(rows)}


def test_the_fastest_backend_is_kept_and_unsteady_times_are_not() -> None:
    steady: Any = FakeChooser(0.5)
    unsteady: Any = FakeChooser(0.5, is_steady=False)

    assert measure_shape(steady, FLOAT, (8, 64, 32)) == {"float": 8.0, "reference": 0.5}
    assert steady.kept == {"(8, 64, 32)": "reference"}

    measure_shape(unsteady, FLOAT, (8, 64, 32))
    measure_float_rows(unsteady, FLOAT, 64, 32)
    assert unsteady.kept == {}


def test_the_table_weighs_each_shape_by_its_layers() -> None:
    seconds = {(8, 64, 32): {"float": 0.004, "a": 0.002, "b": 0.001}, (8, 32, 64): {"float": 0.002}}
    result = BenchmarkResult(seconds, {(8, 64, 32): 3, (8, 32, 64): 1}, {}, 0)

    rows = list(zip(*(column.cells for column in build_result_table("t", result).columns), strict=True))

    assert rows == [
        ("8 × 64 → 32", "3", "4.000", "2.000", "1.000", "b 4.00×"),
        ("8 × 32 → 64", "1", "2.000", "–", "–", "float 1.00×"),
        # (3 × 4 + 2) / (3 × 1 + 2)
        ("all layers", "4", "14.00", "", "", "2.80×"),
    ]


def test_float_layers_are_timed_by_the_same_calls() -> None:
    x, weight = torch.ones(2, 4), torch.eye(4)

    y = FLOAT.linear(FLOAT.quantize(x), weight, torch.ones(4, 1), dtype=torch.float32, bias=torch.ones(4))

    assert torch.equal(y, torch.full((2, 4), 2.0))
