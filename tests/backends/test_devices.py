"""Which backends run on which kinds of device, as far as a machine without one can tell: devices are named,
and what torch would say of them is given.
"""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import shipped

from int8run.backends.auto import AutoBackend
from int8run.backends.registry import list_usable_backends, make_backend
from int8run.errors import BackendError
from int8run.generate.pipeline_call import kept_random_state
from int8run.metrics import memory
from int8run.ptq.quantize import check_backend
from int8run.utils import hardware
from int8run.utils.timing import read_clock

TURING, AMPERE = (7, 5), (8, 6)
OPTIONAL = ("comfy_kitchen",)


def list_candidates(device: torch.device) -> list[str]:
    auto: Any = make_backend("auto")
    assert isinstance(auto, AutoBackend)
    chooser = auto.make_chooser(device, torch.float16)
    return sorted(backend.name for backend in chooser.candidates if backend.name not in OPTIONAL)


@pytest.mark.parametrize(
    ("capability", "expected"), [(TURING, ["torch_int_mm"]), (AMPERE, ["torch_int_mm", "triton"])]
)
def test_turing_runs_by_torchs_own_product_and_says_why(
    capability: tuple[int, int],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    caplog.set_level(logging.INFO)

    candidates = list_candidates(torch.device("cuda:1"))

    assert [name for name in candidates if name != "float"] == expected
    reason = "backend=auto runs without triton: it needs compute capability 8.0, this GPU has 7.5"
    assert (reason in caplog.messages) == (capability == TURING)


def test_xpu_runs_by_torchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: "Intel Arc")
    properties = SimpleNamespace(driver_version="1.6")
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    candidates = list_candidates(torch.device("xpu"))
    assert [name for name in candidates if name != "float"] == ["torch_int_mm"]
    check_backend(make_backend("auto"), torch.device("xpu:1"), ())


@pytest.mark.parametrize("name", sorted(set(shipped("backend")) - {"float"}))
def test_mps_has_no_int8_product_and_is_told_so(name: str) -> None:
    with pytest.raises(BackendError) as raised:
        check_backend(shipped("backend")[name], torch.device("mps"), ())
    reason = (
        ", not on mps, for which torch has no int8 product; set device=cpu, or int8.enable=false for the "
    )
    assert reason in str(raised.value)


def test_where_nothing_runs_the_way_out_is_the_cpu_or_the_float_model() -> None:
    assert list_usable_backends(torch.device("meta")) == []
    message = r"not on meta; set device=cpu, or int8.enable=false for the float model$"
    with pytest.raises(BackendError, match=message):
        check_backend(make_backend("reference"), torch.device("meta"), ())


# -- what is asked of a device -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "xpu:1", "mps"])
def test_a_clock_waits_for_its_own_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(torch.device("mps")))

    read_clock(torch.device(device))

    assert waited == ([] if device == "cpu" else [torch.device(device)])


def test_names_and_memory_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"Arc {device.index}")
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda device: 7)
    reset = []
    monkeypatch.setattr(torch.xpu, "reset_peak_memory_stats", reset.append)
    xpu = torch.device("xpu:1")

    memory.reset_peak_memory(xpu)

    assert (reset, memory.read_peak_bytes(xpu)) == ([xpu], 7)
    assert hardware.get_device_name(xpu) == "Arc 1"
    assert hardware.get_device_name(torch.device("mps")).endswith(" (Metal)")
    assert memory.read_peak_bytes(torch.device("mps")) > 2**20, "it has the CPU's memory"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_the_random_state_is_left_as_it_was(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_mps = ["before"]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: of_mps[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", of_mps.append)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with kept_random_state(torch.device(device)):
        torch.manual_seed(5)
    assert torch.equal(torch.rand(2), expected)
    assert of_mps == {"cpu": ["before"], "mps": ["before", "before"]}[device]
