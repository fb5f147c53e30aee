"""The instruction sets that the CPU kernels can be compiled for, as data, and which of them this CPU has.

`library.py` builds for one of them, `backends` asks what there is. The set is chosen when a library is
loaded, so that one cache serves machines that differ.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from int8run.kernels.cpu.features import read_cpu_features

AUTO = "auto"  # the best that this CPU has
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX2_FEATURES = ("avx2", "fma3", "f16c")
AVX512_FEATURES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
# of Linux on x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


@dataclass(frozen=True)
class InstructionSet:
    """What the kernels can be compiled for.

    Args:
        name: as users know it; its sources are `linear_<name>.cpp`, `conv_<name>.cpp`
            and `attention_<name>.cpp`.
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
        """The C++ file of linear layers."""
        return self.get_source("linear")

    def get_source(self, layer: str) -> Path:
        """The C++ file of a kind of layers: `linear`, `conv` or `attention`."""
        return Path(__file__).with_name(f"{layer}_{self.name}.cpp")


# the best first
ALL_SETS = (
    InstructionSet(
        name="amx",
        # every CPU with AMX has AVX512-VNNI, too: convolutions use it
        features=("amx_tile", "amx_int8", "avx512_vnni", *AVX512_FEATURES),
        flags=(*AVX512_FLAGS, "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
        has_tiles=True,
    ),
    InstructionSet(
        name="avx512_vnni",
        features=("avx512_vnni", *AVX512_FEATURES),
        flags=(*AVX512_FLAGS, "-mavx512vnni"),
    ),
    InstructionSet(
        name="avx_vnni",
        features=("avx_vnni", *AVX2_FEATURES),
        flags=(*AVX2_FLAGS, "-mavxvnni"),
    ),
    InstructionSet(name="avx2", features=AVX2_FEATURES, flags=AVX2_FLAGS),
    # 64-bit Arm: Graviton from 3 on and Apple's from M2 on have i8mm, those before dotprod
    InstructionSet(name="i8mm", features=("i8mm",), flags=("-march=armv8.2-a+dotprod+i8mm",)),
    InstructionSet(name="dotprod", features=("dotprod",), flags=("-march=armv8.2-a+dotprod",)),
)
INSTRUCTION_SETS = {each.name: each for each in ALL_SETS}


def list_instruction_sets() -> list[str]:
    """The names of those that this CPU has, the best first; whether the system allows them is not asked."""
    features = read_cpu_features()
    return [each.name for each in ALL_SETS if features.issuperset(each.features)]


def find_unusable_reason(names: Sequence[str]) -> str | None:
    """Why this machine can run none of some instruction sets; None where it can run one.

    The system is asked for AMX's tiles only where no other of these sets would do.
    """
    features = read_cpu_features()
    there = [each for each in map(INSTRUCTION_SETS.__getitem__, names) if features.issuperset(each.features)]
    if not there:
        found = ", ".join(list_instruction_sets()) or "none of them"
        return f"needs a CPU with {' or '.join(names)}; this one has {found}"
    if not all(each.has_tiles for each in there):
        return None
    refusal = request_tiles()
    return f"needs AMX, which the system does not allow ({refusal})" if refusal else None


@functools.cache
def request_tiles() -> str | None:
    """Ask the system for AMX's tiles, for all threads of this process; returns the reason of a refusal."""
    if sys.platform != "linux":
        return "only Linux is asked for it"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0:
        return None
    return f"arch_prctl: {os.strerror(ctypes.get_errno())}"
