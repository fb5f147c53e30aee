"""The most that a product of each instruction set can reach, beside which layers are seen."""

import ctypes
import tempfile
import time
from pathlib import Path

from int8run.kernels.cpu.instructions import INSTRUCTION_SETS, find_unusable_reason
from int8run.kernels.cpu.library import build_library

SOURCE = Path(__file__).with_name("peak.cpp")
SLOTS = 7
SLOT_SECONDS = 0.1
OPERANDS = bytes(range(256)) * 4


def measure_peaks(names: list[str]) -> dict[str, float]:
    """GOP/s of one thread, for those of some instruction sets that this machine can run."""
    return {name: measure_peak(name) for name in names if find_unusable_reason((name,)) is None}


def measure_peak(name: str) -> float:
    """GOP/s of one instruction set on one thread: the best of some slots of CPU time."""
    chosen = INSTRUCTION_SETS[name]
    kernels = f'-DKERNELS="{chosen.source}"'
    # in a folder of its own: the name of a library does not depend on sources that a macro names
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(build_library(Path(folder), SOURCE, (*chosen.flags, kernels))))
    multiply = library.int8run_multiply_repeatedly
    multiply.argtypes, multiply.restype = [ctypes.c_char_p, ctypes.c_int64], ctypes.c_double
    best, times = 0.0, 100_000
    for _ in range(SLOTS):
        started = time.process_time()
        operations = multiply(OPERANDS, times)
        seconds = time.process_time() - started
        best = max(best, operations / seconds)
        times = round(times * SLOT_SECONDS / seconds)
    return best / 1e9
