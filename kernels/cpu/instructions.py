"""The instruction sets that the CPU kernels can be compiled for, as data, and which of them this CPU has.

`library.py` builds for one of them, `backends` asks what there is. The set is chosen when a library is
loaded, so that one cache serves machines that differ.
"""

import ctypes
import functools
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger(__name__)

AUTO = "auto"  # the best that this CPU has
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FEATURES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
# of Linux on x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class InstructionSet:
    """What the kernels of a linear layer can be compiled for.

    Args:
        name: as users know it; its source is `linear_<name>.cpp`.
        features: what the CPU must have, by torch's names.
        flags: of the compiler. Instructions are named one by one and not -march=native: a cache may be shared
            by machines that differ.
        has_tiles: whether it has AMX's tiles, which a process must ask the kernel for.
    """

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]
    has_tiles: bool = False

    @property
    def source(self) -> Path:
        """The C++ file that is compiled."""
        return Path(__file__).with_name(f"linear_{self.name}.cpp")


# the best first
ALL_SETS = (
    InstructionSet(
        name="amx",
        features=("amx_tile", "amx_int8", *AVX512_FEATURES),
        flags=(*AVX512_FLAGS, "-mamx-tile", "-mamx-int8"),
        has_tiles=True,
    ),
    InstructionSet(
        name="avx512_vnni",
        features=("avx512_vnni", *AVX512_FEATURES),
        flags=(*AVX512_FLAGS, "-mavx512vnni"),
    ),
    InstructionSet(name="avx_vnni", features=("avx_vnni", "avx2"), flags=(*AVX2_FLAGS, "-mavxvnni")),
    # every CPU with AVX2 that was built for more than a trial has FMA and F16C
    InstructionSet(name="avx2", features=("avx2",), flags=AVX2_FLAGS),
    # 64-bit Arm: Graviton from 3 on and Apple's from M2 on have i8mm, those before dotprod
    InstructionSet(name="i8mm", features=("i8mm",), flags=("-march=armv8.2-a+dotprod+i8mm",)),
    InstructionSet(name="dotprod", features=("dotprod",), flags=("-march=armv8.2-a+dotprod",)),
)
INSTRUCTION_SETS = {each.name: each for each in ALL_SETS}


def list_instruction_sets() -> list[str]:
    """The names of those that this machine can run, the best first."""
    features = read_cpu_features()
    found = []
    for each in ALL_SETS:
        is_there = features.issuperset(each.features)
        if is_there and (not each.has_tiles or may_use_tiles()):
            found.append(each.name)
    return found


@functools.cache
def may_use_tiles() -> bool:
    """Ask the kernel for AMX's tiles, for all threads of this process; a refusal is logged once."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0:
        return True
    reason = os.strerror(ctypes.get_errno())
    log.warning("the system does not allow AMX (arch_prctl: %s); the next best is used", reason)
    return False


def read_cpu_features() -> frozenset[str]:
    """What this CPU has, by torch's names; before torch 2.13 what its capability implies."""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    vectors = torch.backends.cpu.get_cpu_capability()
    found = set()
    if vectors in ("AVX2", "AVX512"):
        found |= {"avx2"}
    if vectors == "AVX512" and torch.cpu._is_vnni_supported():
        found |= {"avx512_vnni", *AVX512_FEATURES}
    if torch.cpu._is_amx_tile_supported():
        found |= {"amx_tile", "amx_int8"}
    return frozenset(found)
