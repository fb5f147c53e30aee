"""What this CPU can do, by torch's names: reports, backends and the choice of kernels all read it here.

Environment variables that hold torch's own kernels back (`ATEN_CPU_CAPABILITY`) change nothing of it.
"""

from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")
# the lines of it that list features, on x86 and on Arm
FEATURE_LINES = ("flags", "Features")
# torch's name -> that of Linux
LINUX_NAMES = {
    "avx2": "avx2",
    "fma3": "fma",
    "f16c": "f16c",
    "avx512_f": "avx512f",
    "avx512_bw": "avx512bw",
    "avx512_vl": "avx512vl",
    "avx512_dq": "avx512dq",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "avx_vnni": "avx_vnni",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "amx_fp16": "amx_fp16",
    "neon": "asimd",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sme": "sme",
}
# where nothing else says it: what each of torch's two levels of vectors stands for
AVX2_LEVEL = ("avx2", "fma3", "f16c")
AVX512_LEVEL = (*AVX2_LEVEL, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
IMPLIED = {"AVX2": AVX2_LEVEL, "AVX512": AVX512_LEVEL}


def read_cpu_capabilities() -> dict[str, Any]:
    """Features by torch's names, and `cpu_name` where torch knows it.

    Before torch 2.13 those of LINUX_NAMES, as the system lists them, and on other systems those of x86 for
    which torch chooses its kernels.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    try:
        found = parse_cpuinfo(CPUINFO.read_text(errors="replace"))
    except OSError:  # not Linux
        found = frozenset(IMPLIED.get(torch.backends.cpu.get_cpu_capability(), ()))
    return dict.fromkeys(found, True)


def read_cpu_features() -> frozenset[str]:
    """The names of the features that this CPU has."""
    return frozenset(name for name, value in read_cpu_capabilities().items() if value is True)


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The features of the first processor in the text of /proc/cpuinfo, by torch's names."""
    for line in text.splitlines():
        key, _, values = line.partition(":")
        if key.strip() in FEATURE_LINES:
            listed = values.split()
            return frozenset(name for name, linux_name in LINUX_NAMES.items() if linux_name in listed)
    return frozenset()
