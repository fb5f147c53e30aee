"""The machine's load in system.csv."""

import csv
import logging
import sys
import time
import types
from pathlib import Path

import psutil
import pytest
import torch

from int8run.metrics import system
from int8run.metrics.system import COLUMNS, SystemSampler, read_gpu_values

WAIT_S = 300  # for what happens in a moment on a quiet machine


def wait_for(path: Path, lines: int) -> None:
    end = time.monotonic() + WAIT_S
    while not path.is_file() or path.read_text().count("\n") < lines:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_line_is_written_at_every_interval(tmp_path: Path) -> None:
    path = tmp_path / "system.csv"
    started = time.time()
    with SystemSampler(path, 0.02):
        wait_for(path, 4)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert tuple(rows[0]) == COLUMNS and len(rows) >= 3

    times = [float(row["time"]) for row in rows]

    assert times == sorted(times) and started <= times[0] and times[-1] <= time.time()
    assert all(0 <= float(row["cpu_percent"]) <= 100 for row in rows)
    assert all(0 < int(row["process_bytes"]) < int(row["memory_bytes"]) for row in rows)

    wait = path.read_text()
    time.sleep(0.1)

    assert path.read_text() == wait, "it is over"


@pytest.mark.parametrize("seconds", [0, 3600], ids=["off", "one hour"])
def test_a_short_job_leaves_no_file_and_does_not_wait(tmp_path: Path, seconds: float) -> None:
    with SystemSampler(tmp_path / "system.csv", seconds):
        pass

    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_job_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), SystemSampler(tmp_path / "system.csv", 0.01):
        raise KeyError("its own")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), psutil.AccessDenied(1)])
def test_a_full_disk_ends_the_samples_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    calls = []

    def full(self: SystemSampler, values: dict[str, object]) -> None:
        calls.append(values)
        raise error

    monkeypatch.setattr(SystemSampler, "append", full)
    with caplog.at_level(logging.WARNING), SystemSampler(tmp_path / "system.csv", 0.001) as sampler:
        sampler.thread.join(WAIT_S)

    assert len(calls) == len(caplog.records) == 1
    assert "No more lines are written to system.csv: " in caplog.text


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device /dev/full")
def test_a_real_full_disk_ends_the_samples(caplog: pytest.LogCaptureFixture) -> None:
    with SystemSampler(Path("/dev/full"), 0.001) as sampler:
        sampler.thread.join(WAIT_S)

    assert not sampler.thread.is_alive() and "No space left on device" in caplog.text


class Gpu:
    """A GPU as torch tells of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, driver_tells: bool = True):
        class NVMLError(Exception): ...

        def utilization(index: int) -> int:
            if not driver_tells:
                raise NVMLError("Not Supported")
            return 71

        monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(NVMLError=NVMLError))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (30, 100))
        monkeypatch.setattr(torch.cuda, "utilization", utilization)


def test_a_gpu_is_sampled_as_far_as_its_driver_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_initialized() or read_gpu_values(0) == {}, "a look would open a context"

    with monkeypatch.context() as patch:
        Gpu(patch)
        assert read_gpu_values(0) == {"gpu_memory_bytes": 70, "gpu_percent": 71} and read_gpu_values(1) == {}
    with monkeypatch.context() as patch:
        Gpu(patch, driver_tells=False)
        assert read_gpu_values(0) == {"gpu_memory_bytes": 70}
    with monkeypatch.context() as patch:
        Gpu(patch)
        patch.setitem(sys.modules, "pynvml", None)  # not installed
        assert read_gpu_values(0) == {"gpu_memory_bytes": 70}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_is_sampled(tmp_path: Path) -> None:
    held = torch.zeros(1 << 20, device="cuda")
    found = system.read_gpu_values(0)

    assert int(str(found["gpu_memory_bytes"])) >= held.nbytes
    assert 0 <= float(str(found.get("gpu_percent", 0))) <= 100
