"""Compile the Triton kernels for each GPU without having one, and count what costs speed.

`python tests/support/static_gate.py` prints the counts.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from int8run.kernels.int8_linear import kernel as linear
from int8run.kernels.int8_linear.tile import BUCKETS, FEW_ROWS, MANY_ROWS, SHARED_MEMORY, Tile, choose_tile
from int8run.kernels.quantize_rowwise import kernel as rowwise

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# mma.sync, wgmma and tcgen05 on int8
INTEGER_MMA = r"\b(?:IMMA|IGMMA|UTCIMMA)\b"
# Byte permutes in the k loop mean that the operands arrive in another order than the tensor cores want: on
# sm_80 Triton 3.9 makes
# 168 for the default tile, and 244 registers, from a weight tile loaded through a [K, N] view. The right form
# has none; on
# sm_100 scales per group have 16.
MOST_PERMUTES = 32
# FLUX.1-dev's widths and ranks are multiples of 16, and torch's memory is aligned
DIVISIBLE = [["tt.divisibility", 16]]
TYPES = {
    **dict.fromkeys(("M", "N", "K", "R", "stride_xm", "gelu_from"), "i32"),
    **dict.fromkeys(("q_ptr", "qdata_ptr"), "*i8"),
    **dict.fromkeys(
        ("x_scale_ptr", "w_scale_ptr", "scale_ptr", "factor_ptr", "h_ptr", "strengths_ptr"), "*fp32"
    ),
    **dict.fromkeys(("x_ptr", "down_ptr", "bias_ptr", "up_ptr", "y_ptr"), "*bf16"),
}
FLOAT32 = dict.fromkeys(("x_ptr", "down_ptr"), "*fp32")


@dataclass(frozen=True)
class Build:
    """One compiled variant of a kernel."""

    architecture: int
    name: str
    function: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    types: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.name}"


@dataclass(frozen=True)
class Counts:
    """What the compiler made of it."""

    registers: int
    shared: int  # bytes
    local_loads: int  # LDL and STL: registers that were spilled to memory
    local_stores: int
    integer_mma: int
    loop_permutes: int  # PRMT in loops that hold an integer MMA


def linear_build(architecture: int, tile: Tile, rank: int = 0, group: int = 0, even: bool = True) -> Build:
    """The INT8 linear kernel with a bias, bfloat16 out."""
    block_k = linear.limit_block_k(tile.block_k, group)
    constants = {
        "GROUP": group,
        "SCALE_ROWS": 1,
        "HAS_BIAS": True,
        "BLOCK_R": linear.choose_block_r(rank),
        "EVEN_N": even,
        "EVEN_K": even,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": tile.group_m,
    }
    size = f"{tile.block_m}x{tile.block_n}x{block_k} w{tile.warps} s{tile.stages}"
    options = (
        f"{f' rank {rank}' if rank else ''}{f' group {group}' if group else ''}{'' if even else ' tails'}"
    )
    return Build(
        architecture,
        f"linear {size}{options}",
        linear._int8_linear_kernel,
        constants,
        tile.warps,
        tile.stages,
    )


def rowwise_build(
    architecture: int,
    rotation: int,
    rank: int,
    before: bool,
    sylvester: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Build:
    """The walking quantize kernel. `before`: with GELU and factor."""
    block_r = rowwise.choose_block_r(rank)
    constants = {
        "HAS_FACTOR": before,
        "GELU": before,
        "ROTATION": rotation,
        "SYLVESTER": sylvester,
        "BLOCK_R": block_r,
        "EVEN_K": True,
        "PARTS": max(rotation // 64, 4),
    }
    kind = "sylvester" if sylvester else "rotation"
    name = (
        f"quantize {kind} {rotation} rank "
        f"{rank}{' gelu factor' if before else ''}{' float32' if dtype == torch.float32 else ''}"
    )
    warps = rowwise.choose_row_block_warps(rotation, block_r)
    return Build(
        architecture,
        name,
        rowwise._quantize_row_block_kernel,
        constants,
        warps,
        1,
        FLOAT32 if dtype == torch.float32 else {},
    )


def resident_build(architecture: int, block_k: int) -> Build:
    """The quantize kernel for whole rows, with GELU and factor."""
    constants = {"HAS_FACTOR": True, "GELU": True, "BLOCK_K": block_k}
    return Build(
        architecture,
        f"quantize row of {block_k}",
        rowwise._quantize_one_row_kernel,
        constants,
        rowwise.choose_one_row_warps(block_k),
        3,
    )


def linear_builds(architecture: int) -> Iterator[Build]:
    """Each default tile; the smallest and the largest with every option."""
    capability = divmod(architecture, 10)
    for rows in BUCKETS:
        tile, grouped = choose_tile(capability, rows), choose_tile(capability, rows, grouped=True)
        yield linear_build(architecture, tile)
        if rows in (FEW_ROWS, MANY_ROWS):
            yield linear_build(architecture, tile, rank=64)
            yield linear_build(architecture, grouped, group=128)
            yield linear_build(architecture, tile, even=False)


def rowwise_builds(architecture: int) -> Iterator[Build]:
    """What FLUX needs: plain rows, GELU before ff.net.2, both kinds of rotation, LoRA of small and large
    rank.
    """
    yield resident_build(architecture, 4096)
    yield resident_build(architecture, 16384)
    yield rowwise_build(architecture, 256, 0, before=False)
    yield rowwise_build(architecture, 256, 16, before=True)
    yield rowwise_build(architecture, 256, 64, before=False)
    yield rowwise_build(architecture, 128, 0, before=False, sylvester=True)
    yield rowwise_build(architecture, 128, 16, before=True, sylvester=True)
    yield rowwise_build(architecture, 0, 256, before=True)
    if architecture in (80, 90):
        yield rowwise_build(architecture, 1024, 16, before=False)
        yield rowwise_build(architecture, 256, 16, before=False, dtype=torch.float32)


def builds(architecture: int) -> list[Build]:
    """Everything that the gate compiles for one architecture."""
    return [*linear_builds(architecture), *rowwise_builds(architecture)]


def count(build: Build) -> Counts:
    """Compile and count. Nothing is left on disk."""
    names = build.function.arg_names
    types = {**TYPES, **build.types}
    source = ASTSource(
        fn=build.function,
        signature={name: "constexpr" if name in build.constants else types[name] for name in names},
        constexprs=build.constants,
        # M and gelu_from are what the kernels ask Triton not to specialize
        attrs={
            (i,): DIVISIBLE
            for i, n in enumerate(names)
            if n not in build.constants and n not in ("M", "gelu_from")
        },
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compiled = triton.compile(source, target=GPUTarget("cuda", build.architecture, 32), options=options)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _tool("nvdisasm", "-c", str(cubin))
        usage = _tool("cuobjdump", "-res-usage", str(cubin))

    def number(pattern):
        return len(re.findall(pattern, sass))

    return Counts(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        local_loads=number(r"\bLDL\b"),
        local_stores=number(r"\bSTL\b"),
        integer_mma=number(INTEGER_MMA),
        loop_permutes=sum("PRMT" in line for line in integer_loops(sass.splitlines())),
    )


def integer_loops(lines: list[str]) -> list[str]:
    """The lines of all loops that hold an integer MMA: from a label to a branch that goes back to it."""
    line_of_label = find_labels(lines)
    inside: set[int] = set()
    for end, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch is None:
            continue
        start = line_of_label.get(branch[1], end)  # after `end` where it branches forward: an empty body
        body = lines[start:end]
        if any(re.search(INTEGER_MMA, instruction) for instruction in body):
            inside.update(range(start, end))
    return [lines[i] for i in sorted(inside)]


def find_labels(lines: list[str]) -> dict[str, int]:
    """At which line each label stands."""
    found = {}
    for i, line in enumerate(lines):
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label is not None:
            found[label[1]] = i
    return found


def failures(build: Build, counts: Counts) -> list[str]:
    """What is wrong with it; empty when nothing is."""
    wrong = []
    is_linear = build.function is linear._int8_linear_kernel
    if is_linear and not counts.integer_mma:
        wrong.append("no integer tensor-core instruction")
    if counts.local_loads or counts.local_stores:
        wrong.append(f"spills: {counts.local_loads} LDL, {counts.local_stores} STL")
    if is_linear and counts.loop_permutes > MOST_PERMUTES:
        wrong.append(f"{counts.loop_permutes} byte permutes in the k loop, more than {MOST_PERMUTES}")
    if counts.shared > SHARED_MEMORY[build.architecture]:
        wrong.append(f"{counts.shared} bytes of shared memory, {SHARED_MEMORY[build.architecture]} there are")
    return wrong


def unsupported(architecture: int) -> str | None:
    """Why the installed Triton cannot compile for an architecture; None when it can."""
    try:
        count(resident_build(architecture, 32))
    except (RuntimeError, triton.runtime.errors.TritonError) as error:
        return f"Triton {triton.__version__} does not compile for sm_{architecture}: {error}"
    return None


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA programs that come with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    """Print a row for every build."""
    write = sys.stdout.write
    write(f"Triton {triton.__version__}\n{'':62} regs   smem  LDL  STL  MMA PRMT\n")
    for architecture in ARCHITECTURES:
        reason = unsupported(architecture)
        if reason:
            write(reason + "\n")
            continue
        for build in builds(architecture):
            c = count(build)
            row = (
                f"{c.registers:4} {c.shared:6} {c.local_loads:4} "
                f"{c.local_stores:4} {c.integer_mma:4} {c.loop_permutes:4}"
            )
            write(f"{build!s:62} {row}  {'; '.join(failures(build, c))}\n")


if __name__ == "__main__":
    main()
