"""The machine that a number was measured on: its name for reports and caches, and what its CPU can do."""

import platform
from typing import Any

import torch

from int8run.utils.plurals import count_noun


def get_cpu_capabilities() -> dict[str, Any]:
    """Instruction sets by torch's names, and `cpu_name`; before torch 2.13 only what int8 products need."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"avx512_vnni": torch.cpu._is_vnni_supported(), "amx_int8": torch.cpu._is_amx_tile_supported()}


def get_cpu_name() -> str:
    """The CPU's name, or its architecture where nothing says the name."""
    return get_cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def get_device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{get_cpu_name()}, {count_noun(torch.get_num_threads(), 'thread')}"
