"""The machine that a number was measured on: its name for reports and caches, and what its CPU can do."""

import platform
from typing import Any

import torch

from int8run.kernels.cpu.features import read_cpu_capabilities
from int8run.utils.host_memory import count_host_bytes
from int8run.utils.plurals import count_noun

# instruction sets by torch's names that decide how fast matrix products are
MATRIX_INSTRUCTIONS = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "neon",
    "dotprod",
    "i8mm",
    "bf16",
    "sve",
    "sme",
)


def get_cpu_name() -> str:
    """The CPU's name, or its architecture where nothing says the name."""
    return read_cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def has_device(kind: str) -> bool:
    """Whether torch sees a GPU of this kind: `cuda`, `xpu` or `mps`."""
    if kind == "mps":
        return torch.backends.mps.is_available()
    available: bool = getattr(torch, kind).is_available()
    return available


def count_devices(kind: str) -> int:
    """How many GPUs of this kind torch sees."""
    count: int = getattr(torch, kind).device_count()
    return count


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def get_device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    if device.type == "mps":
        return f"{get_cpu_name()} (Metal)"
    return f"{get_cpu_name()}, {count_noun(torch.get_num_threads(), 'thread')}"


def describe_instructions(device: torch.device) -> str:
    """What a processor has for matrix products: `avx2, avx512_vnni`, `compute capability 9.0`, `gfx942`."""
    if device.type == "cuda" and torch.version.hip:
        architecture: str = get_gpu_architecture(device)
        return architecture
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}"
    if device.type != "cpu":
        return device.type
    capabilities = read_cpu_capabilities()
    found = [name for name in MATRIX_INSTRUCTIONS if capabilities.get(name, False)]
    return ", ".join(found) or "no instructions for matrices"


def get_gpu_architecture(device: torch.device) -> str:
    """For which processor code is compiled: `sm_90` for an H100, `gfx942` for an MI300."""
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]  # what follows says which options are on
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def count_free_bytes(device: torch.device) -> int:
    """Memory that a program can still get on a device; 0 where nothing says how much it is."""
    if device.type in ("cuda", "xpu"):
        module: Any = getattr(torch, device.type)
        try:
            free, _ = module.mem_get_info(device)
        except RuntimeError:  # some Intel GPUs do not say it
            return 0
        return int(free)
    return count_host_bytes()
