"""What a LoRA branch costs an INT8 layer: measured once, remembered, measured anew where it may differ."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from support.helpers import CPU, randn

from int8run.backends.auto import AutoBackend
from int8run.backends.autotune_cache import read_entries
from int8run.backends.reference import Reference
from int8run.layers.int8_linear import Int8Linear, LowRankBranch, QuantizedLayer
from int8run.outlier.base import OutlierTransform
from int8run.ptq import layer_costs as costs_module
from int8run.ptq.layer_costs import BranchCosts
from int8run.quant.weight import quantize_weight


@dataclass(frozen=True)
class Tuned(Reference):
    """The definition, as a backend that has a setting."""

    tile: int = 32


@pytest.fixture
def backend(tmp_path: Path) -> AutoBackend:
    return AutoBackend({"reference": Reference()}, 1, str(tmp_path / "table.json"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What was timed: rank, rows, in and out features. A plain layer takes 2 s, one with a branch 3 s."""
    seen: list[tuple[int, ...]] = []

    def in_turns(
        calls: Sequence[Callable[[], object]], device: torch.device, rounds: int
    ) -> list[list[float]]:
        assert [isinstance(call, partial) for call in calls] == [True, True] and rounds > 5
        (plain, x), (changed, _) = ((call.func, call.args[0]) for call in calls)
        assert (
            plain.adapter is None
            and not changed.adapter.is_idle
            and torch.equal(plain.packed, changed.packed)
        )
        seen.append((len(changed.adapter.strengths), x.shape[-2], plain.in_features, plain.out_features))
        assert changed(x).shape == plain(x).shape and not torch.equal(changed(x), plain(x))
        return [[2.0] * rounds, [3.0] * rounds]

    monkeypatch.setattr(costs_module, "time_in_turns", in_turns)
    return seen


def layer(n: int = 12, k: int = 8, backend: Reference | None = None) -> Int8Linear:
    """An INT8 layer of a shape."""
    return Int8Linear(
        QuantizedLayer(quantize_weight(randn(n, k)), OutlierTransform(), None),
        backend or Reference(),
        torch.float32,
    )


def test_a_branch_is_measured_once_and_remembered_in_the_table(
    backend: AutoBackend, timed: list, tmp_path: Path
) -> None:
    costs = BranchCosts(backend, CPU, torch.float32)

    assert [costs.get_ratio(layer(), 4, 5), costs.get_ratio(layer(), 4, 5)] == [1.5, 1.5] and timed == [
        (4, 5, 8, 12)
    ]

    known = read_entries(tmp_path / "table.json")
    (key,) = [key for key in known if "cost of" in key]

    assert key.endswith("float32 | cost of a branch of rank 4 | Reference() | 5x8x12") and known[key] == "1.5"
    assert BranchCosts(backend, CPU, torch.float32).get_ratio(layer(), 4, 5) == 1.5 and len(timed) == 1, (
        "in another process"
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda: (layer(), 8, 5),
        lambda: (layer(), 4, 6),
        lambda: (layer(k=16), 4, 5),
        lambda: (layer(n=16), 4, 5),
        lambda: (layer(backend=Tuned()), 4, 5),
        lambda: (layer(backend=Tuned(64)), 4, 5),
    ],
    ids=["rank", "rows", "inputs", "outputs", "backend", "setting"],
)
def test_another_question_is_asked_anew(
    backend: AutoBackend, timed: list, other: Callable[[], tuple[Int8Linear, int, int]]
) -> None:
    costs = BranchCosts(backend, CPU, torch.float32)
    costs.get_ratio(layer(), 4, 5)
    costs.get_ratio(layer(backend=Tuned(16)), 4, 5)
    costs.get_ratio(*other())
    costs.get_ratio(*other())

    assert len(timed) == 3

    BranchCosts(backend, CPU, torch.bfloat16).get_ratio(layer(), 4, 5)

    assert len(timed) == 4, "another dtype of the float model"


@pytest.mark.parametrize("text", ["", "fast", "nan", "inf", "0", "-1.5"])
def test_a_table_that_somebody_edited_is_measured_over(
    backend: AutoBackend, timed: list, tmp_path: Path, text: str
) -> None:
    BranchCosts(backend, CPU, torch.float32).get_ratio(layer(), 4, 5)
    table = tmp_path / "table.json"
    table.write_text(json.dumps(dict.fromkeys(json.loads(table.read_text()), text)))

    assert BranchCosts(backend, CPU, torch.float32).get_ratio(layer(), 4, 5) == 1.5 and len(timed) == 2


def test_a_busy_machine_is_asked_again_by_the_next_run(
    backend: AutoBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        costs_module, "time_in_turns", lambda calls, device, rounds: [[3.0, 9.0, 9.0], [6.0, 6.0, 6.0]]
    )
    costs = BranchCosts(backend, CPU, torch.float32)
    with caplog.at_level(logging.WARNING):
        assert [costs.get_ratio(layer(), 4, 5), costs.get_ratio(layer(), 4, 5)] == [2.0, 2.0]

    assert caplog.messages == [
        "cost of a branch of rank 4 | Reference() | 5x8x12: times scatter by more than twice: "
        "other work runs here; measured anew next time"
    ]
    assert not (tmp_path / "table.json").exists()


def test_a_branch_that_cannot_run_here_costs_too_much_for_anybody(
    backend: AutoBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LowRankBranch, "add_product", fail)
    costs = BranchCosts(backend, CPU, torch.float32)

    assert [costs.get_ratio(layer(), 4, 5), costs.get_ratio(layer(), 4, 5)] == [math.inf, math.inf]
    assert caplog.text.count("cannot run here: OutOfMemoryError: CUDA out of memory") == 1
    assert not (tmp_path / "table.json").exists(), "the next run tries it again"


def test_a_single_backend_keeps_its_costs_in_the_users_table(
    timed: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    BranchCosts(Reference(), CPU, torch.float32).get_ratio(layer(), 4, 5)
    assert (
        "cost of a branch of rank 4" in (tmp_path / ".cache" / "int8run" / "backend_choices.json").read_text()
    )


def test_real_times_give_a_ratio(backend: AutoBackend) -> None:
    assert 0.1 < BranchCosts(backend, CPU, torch.float32).get_ratio(layer(32, 32), 4, 16) < 20
