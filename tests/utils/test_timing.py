"""Times of calls that take turns."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.helpers import CPU

from int8run.utils import timing
from int8run.utils.timing import is_steady, time_in_turns, time_medians


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Sequence[float]], Callable[[], None]]:
    """Calls that take the given times by a clock of their own, and note their names in `taking.order`."""
    clock = [0.0]
    monkeypatch.setattr(timing, "read_clock", lambda device: clock[0])

    def taking(name: str, seconds: Sequence[float]) -> Callable[[], None]:
        durations = iter(seconds)

        def call() -> None:
            taking.order.append(name)
            clock[0] += next(durations)

        return call

    taking.order = []
    return taking


def test_calls_take_turns_and_the_first_round_warms_up(taking: Callable) -> None:
    calls = [taking("a", [100, 1, 2, 3]), taking("b", [100, 7, 8, 9])]
    assert time_in_turns(calls, CPU, 3) == [[1, 2, 3], [7, 8, 9]] and taking.order == ["a", "b"] * 4


def test_the_median_counts(taking: Callable) -> None:
    assert time_medians(
        [taking("a", [100, *range(1, 12)]), taking("b", [100, *[7] * 5, 999, *[7] * 5])], CPU, 11
    ) == [6, 7]


@pytest.mark.parametrize(
    ("times", "quiet"),
    [([1, 1, 1], True), ([1, 2, 2], True), ([1, 2.1, 3], False), ([1, 1, 9], True)],
    ids=str,
)
def test_a_median_far_above_the_shortest_time_is_a_busy_machine(times: list[float], quiet: bool) -> None:
    assert is_steady(times) is quiet


class FakeGpu:
    """A GPU whose work starts when it was launched and what was launched before is done."""

    def __init__(self) -> None:
        self.cpu_ms = self.gpu_ms = 0.0

    def launch(self, launch_ms: float, work_ms: float) -> None:
        self.cpu_ms += launch_ms
        self.gpu_ms = max(self.gpu_ms, self.cpu_ms) + work_ms

    def synchronize(self, device: object) -> None:
        self.cpu_ms = max(self.gpu_ms, self.cpu_ms)

    def make_event(self, *, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", max(self.gpu_ms, self.cpu_ms))
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture(params=["cuda", "xpu"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.device, FakeGpu]:
    """A device, and the GPU that stands for it; work ahead takes a millisecond there."""
    fake = FakeGpu()
    module = getattr(torch, request.param)
    monkeypatch.setattr(module, "device", lambda device: nullcontext())
    monkeypatch.setattr(module, "Event", fake.make_event)
    monkeypatch.setattr(module, "synchronize", fake.synchronize)
    buffer = SimpleNamespace(zero_=lambda: fake.launch(0.0, 1 / timing.AHEAD_FILLS))
    monkeypatch.setattr(timing.torch, "empty", lambda *size, **options: buffer)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: fake.launch(0.0, cycles / timing.AHEAD_CYCLES), raising=False
    )
    return torch.device(request.param), fake


def test_the_time_on_a_gpu_is_without_the_launch(gpu: tuple[torch.device, FakeGpu]) -> None:
    device, fake = gpu
    calls = [lambda: fake.launch(0.5, 0.02), lambda: fake.launch(0.01, 0.1), lambda: fake.launch(3.0, 1.0)]

    slow_launch, slow_work, both = time_medians(calls, device, 3)

    assert slow_launch == pytest.approx(0.02e-3) and slow_work == pytest.approx(0.1e-3)
    # launched when the work ahead had long been done
    assert both == pytest.approx(3e-3)
