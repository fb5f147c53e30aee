"""The instruction sets that the CPU kernels can be compiled for, as data, and which of them this CPU has.

`library.py` builds for one of them, `backends` asks what there is. The set is chosen when a library is
loaded, so that one cache serves machines that differ.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

AUTO = "auto"  # the best that this CPU has
AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")


@dataclass(frozen=True)
class InstructionSet:
    """What the kernels of a linear layer can be compiled for.

    Args:
        name: as users know it; its source is `linear_<name>.cpp`.
        features: what the CPU must have, by torch's names.
        flags: of the compiler. Instructions are named one by one and not -march=native: a cache may be shared
            by machines that differ.
    """

    name: str
    features: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def source(self) -> Path:
        """The C++ file that is compiled."""
        return Path(__file__).with_name(f"linear_{self.name}.cpp")


# the best first
ALL_SETS = (
    InstructionSet(
        name="avx512_vnni",
        features=("avx512_vnni", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"),
        flags=(*AVX512_FLAGS, "-mavx512vnni"),
    ),
    InstructionSet(name="avx_vnni", features=("avx_vnni", "avx2"), flags=(*AVX2_FLAGS, "-mavxvnni")),
    # every CPU with AVX2 that was built for more than a trial has FMA and F16C
    InstructionSet(name="avx2", features=("avx2",), flags=AVX2_FLAGS),
)
INSTRUCTION_SETS = {each.name: each for each in ALL_SETS}


def list_instruction_sets() -> list[str]:
    """The names of those that this machine can run, the best first."""
    features = read_cpu_features()
    return [each.name for each in ALL_SETS if features.issuperset(each.features)]


def read_cpu_features() -> frozenset[str]:
    """What this CPU has, by torch's names; before torch 2.13 AVX512-VNNI and AVX2 alone."""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    vectors = torch.backends.cpu.get_cpu_capability()
    found = set()
    if vectors in ("AVX2", "AVX512"):
        found |= {"avx2"}
    if vectors == "AVX512" and torch.cpu._is_vnni_supported():
        found |= {"avx512_vnni", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"}
    return frozenset(found)
