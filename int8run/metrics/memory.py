"""Peak memory of a generation."""

import resource
import sys

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak where the device keeps one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peak_bytes(device: torch.device) -> float:
    """Peak memory in bytes.

    On a GPU what was allocated since `reset_peak_memory`; on a CPU the process's largest resident size so
    far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
