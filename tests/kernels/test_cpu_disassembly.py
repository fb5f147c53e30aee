"""What the compiler made of the inner loops: products of registers, and no sums that pass through memory."""

import re
import shutil
import subprocess

import pytest

from int8run.kernels.cpu.instructions import ALL_SETS, InstructionSet
from int8run.kernels.cpu.library import FLAGS, OPENMP_FLAGS

# what compiles for this CPU, and for Arm
TOOLS = {
    "x86": (shutil.which("g++"), shutil.which("objdump")),
    "arm": (shutil.which("aarch64-linux-gnu-g++"), shutil.which("aarch64-linux-gnu-objdump")),
}
pytestmark = pytest.mark.slow
# the instruction that adds products, and how many of them a full tile takes at a step
PRODUCTS = {
    "amx": ("tdpbusd", 4),
    "avx512_vnni": ("vpdpbusd", 24),
    "avx_vnni": ("vpdpbusd", 12),
    "avx2": ("vpmaddwd", 12),
    "i8mm": ("usmmla", 24),
    "dotprod": ("sdot", 24),
}
ARM_SETS = ("i8mm", "dotprod")
ENDS_BLOCK = re.compile(r"^(j|ret|call|b(l|r|lr|\.\w+)?\s|cbn?z\s|tbn?z\s)")
TO_STACK = re.compile(r"^vmov\w+ +%[xyz]mm\d+,.*\(%r[sb]p|^(st|ld)\w+\s+(q\d|\{).*\[sp")


def list_blocks(operator: str, instruction_set: InstructionSet, folder) -> list[list[str]]:
    """The instructions between jumps."""
    compiler, disassembler = TOOLS["arm" if instruction_set.name in ARM_SETS else "x86"]
    if None in (compiler, disassembler):
        pytest.skip(f"needs g++ and objdump for {instruction_set.name}")
    library = folder / f"{operator}.so"
    command = [
        compiler,
        *FLAGS,
        *OPENMP_FLAGS,
        *instruction_set.flags,
        str(instruction_set.get_source(operator)),
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized" in done.stderr:
        pytest.skip(f"this g++ is too old for {instruction_set.name}")
    assert done.returncode == 0, done.stderr
    output = subprocess.run(
        [disassembler, "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    blocks: list[list[str]] = [[]]
    for line in output.splitlines():
        _, _, instruction = line.partition(":\t")
        instruction = instruction.removeprefix("{vex} ")  # of a VNNI that is not AVX512's
        blocks[-1].append(instruction)
        if ENDS_BLOCK.match(instruction):
            blocks.append([])
    return blocks


@pytest.mark.parametrize("operator", ["linear", "attention", "conv"])
@pytest.mark.parametrize("instruction_set", ALL_SETS, ids=lambda each: each.name)
def test_the_inner_loop_keeps_its_sums_in_registers(instruction_set, operator, tmp_path):
    name, count = PRODUCTS[instruction_set.name]
    loops = []
    for block in list_blocks(operator, instruction_set, tmp_path):
        products = [i for i, line in enumerate(block) if line.split()[:1] == [name]]
        if len(products) == count:
            loops.append(block[products[0] : products[-1] + 1])

    assert loops
    for loop in loops:
        assert not [line for line in loop if TO_STACK.match(line)]
