"""What a machine says of itself. Files and devices are given."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.helpers import CPU

from int8run.utils import host_memory
from int8run.utils.hardware import count_free_bytes

GIB = 2**30
VERSION_1 = {
    "memory.limit_in_bytes": 8 * GIB,
    "memory.usage_in_bytes": 5 * GIB,
    "memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}",
}
VERSION_2 = {
    "memory.max": 8 * GIB,
    "memory.current": 5 * GIB,
    "memory.stat": f"anon 5\ninactive_file {GIB}",
}
NO_LIMIT = {"memory.max": "max", "memory.current": 5 * GIB, "memory.stat": ""}


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_says_what_is_free_on_it(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(getattr(torch, kind), "mem_get_info", lambda device: (3 * GIB, 9 * GIB))
    assert count_free_bytes(torch.device(kind)) == 3 * GIB


def test_a_gpu_that_does_not_say_it_counts_as_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("The device does not support querying the available free memory")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refuse)
    assert count_free_bytes(torch.device("xpu")) == 0


@pytest.mark.parametrize(
    ("lines", "folder", "files", "expected"),
    [
        ("0::/", "", VERSION_2, 4 * GIB),
        ("0::/user/job", "user/job", VERSION_2, 4 * GIB),
        ("4:cpu,memory:/job\n1:cpu:/", "memory/job", VERSION_1, 4 * GIB),
        ("4:memory:/elsewhere", "memory", VERSION_1, 4 * GIB),
        ("0::/", "", NO_LIMIT, 64 * GIB),
        ("0::/", "", {}, 64 * GIB),
    ],
    ids=["container", "group", "version 1", "version 1, container", "no limit", "no files"],
)
def test_a_limit_of_the_container_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    folder: str,
    files: dict[str, object],
    expected: int,
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(f"{text}\n")
    (tmp_path / "lines").write_text(lines)
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "PROCESS_CGROUPS", tmp_path / "lines")
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))

    assert count_free_bytes(CPU) == expected


def test_a_system_without_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_memory, "PROCESS_CGROUPS", tmp_path / "none")
    assert count_free_bytes(CPU) > 0
