"""Peak memory of a generation, as the system or the GPU keeps it. `generate` resets and reads it."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

# Linux: what is written there resets counters of this process; 5 stands for its largest resident size
CLEAR_REFS, RESET_PEAK = Path("/proc/self/clear_refs"), "5"
STATUS, PEAK_LINE = Path("/proc/self/status"), "VmHWM:"


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak where the device or the system keeps one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if device.type == "xpu":
        torch.xpu.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # another system, or one that does not allow it: the peak is that of the process
        CLEAR_REFS.write_text(RESET_PEAK)


def read_peak_bytes(device: torch.device) -> float:
    """Peak memory in bytes since `reset_peak_memory`.

    On a GPU what was allocated. On a CPU, and with MPS, which has the CPU's memory, the process's largest
    resident size; on systems that cannot reset it, since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device)
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith(PEAK_LINE):
            kibibytes = int(line.split()[1])  # `VmHWM:  12345 kB`
            return kibibytes * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
