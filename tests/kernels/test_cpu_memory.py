"""Memory that runs out inside the CPU kernels is an error of Python, and does not end the process."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.helpers import CPU, full_range, randn

from int8run.backends.cpu import Cpu
from int8run.backends.run_errors import find_run_failure
from int8run.kernels.cpu import linear, rows
from int8run.kernels.cpu.instructions import INSTRUCTION_SETS, find_unusable_reason, list_instruction_sets
from int8run.kernels.cpu.library import OUT_OF_MEMORY

COMPILER = shutil.which("g++")
DRIVER = Path(__file__).with_name("out_of_memory_driver.cpp")
FOUND = [name for name in list_instruction_sets() if find_unusable_reason((name,)) is None]
WORDS = "the CPU kernels ran out of memory; a smaller batch needs less"


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("instructions", FOUND)
def test_threads_that_run_out_of_memory_are_reported(instructions, tmp_path):
    chosen = INSTRUCTION_SETS[instructions]
    program = tmp_path / "program"
    flags = ("-O1", "-std=c++17", "-fopenmp", "-w", *chosen.flags)
    subprocess.run([COMPILER, *flags, str(chosen.source), str(DRIVER), "-o", str(program)], check=True)

    for threads in ("1", "3"):
        done = subprocess.run([program, threads], capture_output=True, text=True, check=True, timeout=60)
        quantize_failures, multiply_failures, codes_failures = map(int, done.stdout.split())
        # a row; the sums between pieces, and of the branch its products, integers and scales
        assert quantize_failures >= 1
        assert multiply_failures >= 4
        # the sums between pieces, and the decoded weights
        assert codes_failures >= 2


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("instructions", FOUND)
def test_attention_that_runs_out_of_memory_is_reported(instructions, tmp_path):
    chosen = INSTRUCTION_SETS[instructions]
    program = tmp_path / "program"
    flags = ("-O1", "-std=c++17", "-fopenmp", "-w", *chosen.flags)
    sources = (str(chosen.get_source("attention")), str(DRIVER.with_name(f"attention_{DRIVER.name}")))
    subprocess.run([COMPILER, *flags, *sources, "-o", str(program)], check=True)

    for threads in ("1", "3"):
        done = subprocess.run([program, threads], capture_output=True, text=True, check=True, timeout=60)
        # scales and means of a head, a row and its bytes, and what a thread keeps
        assert int(done.stdout) >= 10


def fail(*arguments):
    return OUT_OF_MEMORY


def test_a_kernel_without_memory_raises(monkeypatch):
    q, x_scale = linear.quantize_rows(randn(3, 8))
    packed = linear.pack_weight(full_range(5, 8))
    functions = SimpleNamespace(int8run_quantize=fail, int8run_linear=fail, int8run_quantize_weight_rows=fail)
    monkeypatch.setattr(linear, "load_linear_library", lambda name: SimpleNamespace(functions=functions))
    monkeypatch.setattr(rows, "has_compiled_library", lambda: True)
    monkeypatch.setattr(rows, "load_rows_library", lambda: functions)

    with pytest.raises(MemoryError, match=f"^{WORDS}$"):
        linear.quantize_rows(randn(3, 8))
    with pytest.raises(MemoryError, match=f"^{WORDS}$"):
        linear.int8_linear(q, x_scale, packed, torch.ones(5), None, torch.float32)
    with pytest.raises(MemoryError, match=f"^{WORDS}$"):
        rows.quantize_weight_rows(randn(5, 8), torch.empty(5, 8, dtype=torch.int8), torch.empty(5, 1))
    # such a candidate is left out by backend=auto, with its reason
    assert find_run_failure(lambda: Cpu().quantize(randn(3, 8)), CPU) == f"MemoryError: {WORDS}"
