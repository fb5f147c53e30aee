"""What the limits of a backend rule out, and the reasons that they give."""

import os
import subprocess
import sys

import pytest
import torch
from support.helpers import shipped, usable

from int8run.backends import base
from int8run.backends.base import INT8_CPU_FEATURES, Limits, has_cpu_feature
from int8run.backends.onednn import OneDnn
from int8run.backends.reference import Reference
from int8run.backends.torch_int_mm import TorchIntMM

CPU = torch.device("cpu")


@pytest.fixture
def cpu_without_vnni(monkeypatch):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False, "architecture": "x86_64"}
    )


@pytest.mark.parametrize("backend", shipped("backend").values(), ids=lambda b: b.name)
def test_no_backend_runs_on_meta(backend):
    (reason,) = backend.limits.unsupported_reasons(torch.device("meta"))
    assert reason == f"runs on {' and '.join(backend.limits.devices)}, not on meta"


INT8_BACKENDS = [backend for name, backend in shipped("backend").items() if name != "float"]


@pytest.mark.parametrize("backend", INT8_BACKENDS, ids=lambda b: b.name)
def test_a_layer_too_wide_for_32_bit_sums_is_rejected(backend):
    limit = backend.limits.max_in_features
    if backend.name == "reference":
        assert limit is None and backend.limits.unsupported_layer_reasons(2**24, 8) == []
        return

    assert backend.limits.unsupported_layer_reasons(limit, 8) == []

    (reason,) = backend.limits.unsupported_layer_reasons(limit + 1, 8)

    assert reason == f"in_features={limit + 1} overflows its 32-bit sums, which hold {limit}"


def test_a_missing_compiler_or_package_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert Limits(needs_compiler=True).unsupported_reasons(CPU) == [
        "needs a C++ compiler on the PATH (g++, clang++, c++)"
    ]
    assert Limits(python_packages=("no_such_package",)).unsupported_reasons(CPU) == [
        "needs the Python package no_such_package (pip install no-such-package)"
    ]


def test_onednn_stays_on_the_cpu():
    assert OneDnn.limits.unsupported_reasons(torch.device("cuda")) == ["runs on cpu, not on cuda"]


@pytest.mark.parametrize("backend", [OneDnn(), TorchIntMM()], ids=lambda b: b.name)
def test_a_cpu_without_vnni_is_rejected(backend, cpu_without_vnni):
    (reason,) = backend.limits.unsupported_reasons(CPU)
    assert reason == "needs a CPU with avx512_vnni or avx_vnni or amx_int8: without, int8 products saturate"
    assert not usable(backend, CPU)


@pytest.mark.parametrize("feature", ["avx512_vnni", "avx_vnni", "amx_int8"])
@pytest.mark.parametrize("backend", [OneDnn(), TorchIntMM()], ids=lambda b: b.name)
def test_one_feature_is_enough(backend, feature, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True})
    monkeypatch.setattr(base, "onednn_saturates", lambda: False)

    assert usable(backend, CPU) and has_cpu_feature([feature])


PRINT_REASONS = """
import torch
from int8run.backends.onednn import OneDnn
from int8run.backends.torch_int_mm import TorchIntMM
from int8run.backends.cpu import Cpu

for backend in (OneDnn(), TorchIntMM(), Cpu()):
    print(*backend.limits.unsupported_reasons(torch.device("cpu")), sep=", ")
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_cpu_feature(INT8_CPU_FEATURES), reason="a CPU without int8 products is rejected")
def test_a_limited_onednn_is_rejected():
    # oneDNN reads the variable once, so it takes a process of its own
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", PRINT_REASONS]

    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    onednn, torch_int_mm, cpu = output.splitlines()
    assert onednn == torch_int_mm
    assert (
        onednn.startswith("uses oneDNN, whose int8 products saturate here") and "unset ONEDNN_MAX" in onednn
    )
    assert "oneDNN" not in cpu  # its kernels are our own


def test_cpu_features_are_not_asked_of_a_gpu(cpu_without_vnni):
    assert usable(TorchIntMM(), torch.device("cuda"))


def test_the_reference_runs_on_any_cpu(cpu_without_vnni):
    assert usable(Reference(), CPU) and Limits().unsupported_reasons(CPU) == []
