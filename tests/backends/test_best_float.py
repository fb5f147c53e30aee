"""The fastest float dtype of a machine: which is tried, what is kept, what is left out. Times are faked."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.helpers import CPU, TinyModel, randn

from int8run.backends import best_float
from int8run.backends.autotune_cache import AutotuneCache, read_entries
from int8run.backends.base import LayerTimes
from int8run.backends.best_float import (
    BestFloat,
    cast_floats,
    count_copy_bytes,
    find_best_float,
    parse_best_float,
    run_step,
)
from int8run.backends.layer_timer import LayerTimer
from int8run.utils.dtypes import FLOAT_DTYPES


class Pair(NamedTuple):
    """What a model may take."""

    first: torch.Tensor
    second: str


LARGEST = (8, 64, 96)
CALLS = [{"x": randn(8, 7)}]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Seconds of the largest product by dtype, of the two steps, and bytes that are free."""
    found: dict[str, Any] = {
        "products": {"float32": 1.0, "bfloat16": 0.5, "float16": 9.0},
        "steps": [[1.0, 1.0], [0.4, 0.5]],
        "free": 2**40,
        "is_steady": True,
        "timed": 0,
    }

    def time_steps(steps: Any, device: torch.device, rounds: int) -> Any:
        found["timed"] += 1
        assert all(step() for step in steps)
        return found["steps"]

    monkeypatch.setattr(best_float, "RIVALS", FLOAT_DTYPES)
    monkeypatch.setattr(
        LayerTimer, "measure", lambda *args: LayerTimes(found["products"], {}, is_steady=found["is_steady"])
    )
    monkeypatch.setattr(best_float, "time_in_turns", time_steps)
    monkeypatch.setattr(best_float, "count_free_bytes", lambda device: found["free"])
    return found


def find(folder: Path, model: torch.nn.Module | None = None) -> BestFloat | None:
    cache = AutotuneCache(folder / "table.json", CPU, torch.float32)
    return find_best_float(model or TinyModel(), CALLS, dtype=torch.float32, largest=LARGEST, cache=cache)


def test_a_step_in_the_fastest_dtype_is_timed_once(machine: dict[str, Any], tmp_path: Path) -> None:
    assert find(tmp_path) == find(tmp_path) == BestFloat("bfloat16", 0.4)
    assert machine["timed"] == 1
    assert list(read_entries(tmp_path / "table.json").values()) == ["bfloat16 0.4"]


@pytest.mark.parametrize("bfloat16_seconds", [0.97, 3.0])
def test_no_copy_is_made_where_the_models_own_dtype_is_as_fast(
    machine: dict[str, Any], tmp_path: Path, bfloat16_seconds: float
) -> None:
    machine["products"]["bfloat16"] = bfloat16_seconds

    assert find(tmp_path) == BestFloat("float32", 1.0) and machine["timed"] == 0


def test_a_whole_step_that_is_slower_counts_more_than_one_product(
    machine: dict[str, Any], tmp_path: Path
) -> None:
    machine["steps"] = [[1.0, 1.0], [1.5, 1.5]]

    assert find(tmp_path) == BestFloat("float32", 1.0)


def test_times_that_scatter_say_nothing(machine: dict[str, Any], tmp_path: Path) -> None:
    machine["steps"] = [[1.0, 1.0, 9.0, 9.0], [0.5, 0.5, 0.5, 0.5]]

    assert find(tmp_path) is None and not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("bfloat16_seconds", [0.5, 3.0])
def test_products_that_scatter_say_nothing(
    machine: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, bfloat16_seconds: float
) -> None:
    caplog.set_level("INFO")
    machine["is_steady"] = False
    machine["products"]["bfloat16"] = bfloat16_seconds

    assert find(tmp_path) is None and machine["timed"] == 0
    assert not (tmp_path / "table.json").exists() and "times scatter" in caplog.text


def test_a_copy_is_as_large_as_the_wider_of_the_two_dtypes() -> None:
    """It is copied in its own dtype, and cast then."""
    model = torch.nn.BatchNorm1d(3)  # 4 x 3 float32 and an int64
    assert count_copy_bytes(model, torch.bfloat16) == count_copy_bytes(model, torch.float32) == 56
    assert count_copy_bytes(torch.nn.Linear(3, 2).bfloat16(), torch.float32) == 32


def test_a_copy_that_does_not_fit_is_not_made(machine: dict[str, Any], tmp_path: Path) -> None:
    machine["free"] = 1000

    assert find(tmp_path) is None and machine["timed"] == 0


def test_a_dtype_in_which_the_model_overflows_or_fails_is_no_rival(
    machine: dict[str, Any], tmp_path: Path
) -> None:
    machine["products"] = {"float32": 1.0, "float16": 0.1}
    model = TinyModel()
    model.proj_out.weight.fill_(60000.0)  # its products pass 65504
    assert find(tmp_path / "a", model) == BestFloat("float32", 1.0)

    class InFloat32(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float())

    assert find(tmp_path / "b", InFloat32()) is None


def test_calls_are_cast_at_any_depth() -> None:
    named = Pair(torch.ones(1), "b")
    call = {"x": torch.ones(1), "ids": torch.ones(1).int(), "nested": [(torch.ones(1), None)], "n": named}

    cast = cast_floats(call, torch.float32, torch.bfloat16)

    assert (cast["x"].dtype, cast["ids"].dtype) == (torch.bfloat16, torch.int32)
    assert isinstance(cast["n"], Pair) and (cast["n"].first.dtype, cast["n"].second) == (torch.bfloat16, "b")
    assert cast["nested"][0][0].dtype == torch.bfloat16 and cast["nested"][0][1] is None
    assert not run_step(lambda x: {"out": [x, x / 0]}, [{"x": torch.ones(1)}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", [None, "", "bfloat16", "bfloat16 much", "int8 0.5", "bfloat16 2", "bfloat16 nan"]
)
def test_a_damaged_entry_counts_as_none(text: str | None) -> None:
    assert parse_best_float(text) is None
