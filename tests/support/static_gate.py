"""Compile the Triton kernels for each GPU without having one, and count what costs speed.

`tests/kernels/test_triton_static.py` fails where something does; `experiments/gpu/compile_table.py` writes
the counts into a table.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from support.static_builds import AMD, Build, resident_build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from int8run.kernels.grouped_weight.programs import grouped_linear_kernel
from int8run.kernels.int8_attention.programs import attention_kernel
from int8run.kernels.int8_conv.programs import conv_kernel
from int8run.kernels.int8_linear import hopper
from int8run.kernels.int8_linear import kernel as linear
from int8run.kernels.int8_linear.tile import find_architecture

# Byte permutes in the k loop mean that the operands arrive in another order than the tensor cores want: on
# sm_80 Triton 3.9 makes 168 for the default tile, and 244 registers, from a weight tile loaded through a
# [K, N] view. The right form has none; on sm_100 scales per group have 16.
MOST_PERMUTES = 32
# FLUX.1-dev's widths and ranks are multiples of 16, and torch's memory is aligned
DIVISIBLE = [["tt.divisibility", 16]]
# what the kernels ask Triton not to specialize, and what is no pointer or number
NOT_SPECIALIZED = ("M", "gelu_from", "q_desc", "qdata_desc", "L", "LQ", "LK", "heads", "kv_heads", "scale")
NOT_SPECIALIZED += ("pixels", "groups", "T", "H", "W", "OT", "OH", "OW", "first_sum")
TYPES = {
    **dict.fromkeys(("M", "N", "K", "R", "stride_xm", "stride_hm", "gelu_from"), "i32"),
    **dict.fromkeys(("L", "LQ", "LK", "D", "DV", "heads", "kv_heads"), "i32"),
    **dict.fromkeys(("stride_xb", "stride_xh", "stride_xl", "stride_vb", "stride_vh", "stride_vl"), "i32"),
    **dict.fromkeys(("stride_mb", "stride_mh", "stride_mq", "stride_mk"), "i32"),
    **dict.fromkeys(("q_ptr", "qdata_ptr", "k_ptr"), "*i8"),
    **dict.fromkeys(
        ("x_scale_ptr", "w_scale_ptr", "scale_ptr", "factor_ptr", "h_ptr", "strengths_ptr"), "*fp32"
    ),
    **dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "mean_ptr"), "*fp32"),
    **dict.fromkeys(("x_ptr", "down_ptr", "bias_ptr", "up_ptr", "y_ptr", "v_ptr"), "*bf16"),
    **dict.fromkeys(
        ("pixels", "C", "groups", "stride_w", "first_sum", "T", "H", "W", "OT", "OH", "OW"), "i32"
    ),
    **dict.fromkeys(("codes_ptr", "group_scale_ptr"), "*u8"),
    "codebook_ptr": "*fp32",
    "center_ptr": "*fp32",
    "sums_ptr": "*i32",
    "scale": "fp32",
}
# what multiplies integers on tensor cores
PRODUCTS = (
    linear.int8_linear_kernel,
    grouped_linear_kernel,
    hopper._hopper_kernel,
    attention_kernel,
    conv_kernel,
)


@dataclass(frozen=True)
class Assembly:
    """How one vendor's assembly language looks, as regular expressions.

    Args:
        label: the beginning of a block, its name in the group.
        branch: a jump to a label, its name in the group.
        integer_mma: a tensor-core instruction on int8.
        permute: an instruction that shuffles bytes.
        product_wait: an instruction that waits for products, how many may go on in the group.
    """

    label: str
    branch: str
    integer_mma: str
    permute: str
    product_wait: str


NVIDIA_ASSEMBLY = Assembly(
    label=r"\s*(\.L_x_\d+):",
    branch=r"\bBRA\b.*`\((\.L_x_\d+)\)",
    integer_mma=r"\b(?:IMMA|IGMMA|UTCIMMA)\b",  # mma.sync, wgmma and tcgen05
    permute=r"\bPRMT\b",
    product_wait=r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)",
)
AMD_ASSEMBLY = Assembly(
    label=r"\s*(\.LBB\d+_\d+):",
    branch=r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)",
    integer_mma=r"\bv_(?:mfma|wmma)_i32_\w*i\w*8\b",
    permute=r"\bv_perm_b32\b",
    product_wait=r"\bnever (\d)",
)
# a tensor-core instruction in PTX or in AMD's assembly, its name without the types
INSTRUCTION = r"\b(wgmma|mma\.sync|tcgen05\.mma|v_mfma|v_wmma)\S*?(?:[._](m\d+n\d+k\d+|\d+x\d+x\d+)\S*)?\s"


@dataclass(frozen=True)
class Counts:
    """What the compiler made of it."""

    registers: int
    shared: int  # bytes
    spills: int  # instructions that move registers to memory and back (NVIDIA), registers there (AMD)
    integer_mma: int
    loop_permutes: int  # in the innermost loops that hold an integer MMA
    instruction: str = ""  # the tensor-core instruction
    loop_waits: tuple[int, ...] = ()  # how many products may still run when those loops wait for products

    @property
    def is_asynchronous(self) -> bool:
        """Whether a warp-group product runs on while the next is started."""
        return bool(self.loop_waits) and min(self.loop_waits) >= 1


def count(build: Build) -> Counts:
    """Compile and count. Nothing is left on disk."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compiled = compile_build(build)
        if build.architecture in AMD:
            return count_amd(compiled)
        return count_nvidia(compiled, Path(folder) / "kernel.cubin")


def compile_build(build: Build) -> Any:
    """What Triton makes of a build."""
    names = build.function.arg_names
    types = {**TYPES, **build.types}
    is_gluon = build.function is hopper._hopper_kernel
    make_source = GluonASTSource if is_gluon else ASTSource
    source = make_source(
        fn=build.function,
        signature={name: "constexpr" if name in build.constants else types[name] for name in names},
        constexprs=build.constants,
        attrs={
            (i,): DIVISIBLE
            for i, name in enumerate(names)
            if name not in build.constants and name not in NOT_SPECIALIZED
        },
    )
    options = {"num_warps": build.warps, "enable_fp_fusion": True}
    if not is_gluon:
        options["num_stages"] = build.stages
    return triton.compile(source, target=make_target(build.architecture), options=options)


def make_target(architecture: str) -> GPUTarget:
    """What Triton calls an architecture: its warps have 64 threads on AMD's Instinct, else 32."""
    if architecture not in AMD:
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    warp_size = 64 if architecture.startswith("gfx9") else 32
    return GPUTarget("hip", architecture, warp_size)


def count_nvidia(compiled: Any, cubin: Path) -> Counts:
    """Read the machine code, which is written to `cubin`."""
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", str(cubin))
    sass = _tool("nvdisasm", "-c", str(cubin)).splitlines()
    return Counts(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        spills=count_lines(r"\b(?:LDL|STL)\b", sass),
        instruction=find_instruction(compiled.asm["ptx"]),
        **count_products(sass, NVIDIA_ASSEMBLY),
    )


def count_amd(compiled: Any) -> Counts:
    """Read the assembly and what it says of itself at its end."""
    text = compiled.asm["amdgcn"]
    lines = text.splitlines()
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    return Counts(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        shared=compiled.metadata.shared,
        spills=int(spills[1]) + count_lines(r"\bscratch_(?:load|store)", lines),
        instruction=find_instruction(text),
        **count_products(lines, AMD_ASSEMBLY),
    )


def count_products(lines: list[str], assembly: Assembly) -> dict[str, Any]:
    """The fields of `Counts` that tell of integer products."""
    loops = integer_loops(lines, assembly)
    waits = [re.search(assembly.product_wait, line) for line in loops]
    return {
        "integer_mma": count_lines(assembly.integer_mma, lines),
        "loop_permutes": count_lines(assembly.permute, loops),
        "loop_waits": tuple(int(wait[1]) for wait in waits if wait),
    }


def count_lines(pattern: str, lines: list[str]) -> int:
    """How many lines have something that matches."""
    return sum(re.search(pattern, line) is not None for line in lines)


def find_instruction(text: str) -> str:
    """The first integer tensor-core instruction by its name and size, `wgmma m64n128k32`."""
    for line in text.splitlines():
        found = re.search(INSTRUCTION, line)
        if found and re.search(r"s8|u8|i8", line):
            return " ".join(part for part in found.groups() if part)
    return ""


def integer_loops(lines: list[str], assembly: Assembly = NVIDIA_ASSEMBLY) -> list[str]:
    """The lines of the innermost loops that hold an integer MMA: from a label to a branch back to it."""
    line_of_label = find_labels(lines, assembly)
    loops: list[range] = []
    for end, line in enumerate(lines):
        branch = re.search(assembly.branch, line)
        if branch is None:
            continue
        start = line_of_label.get(branch[1], end)  # after `end` where it branches forward: an empty body
        if count_lines(assembly.integer_mma, lines[start:end]):
            loops.append(range(start, end))
    innermost: list[range] = []
    # a longer one around it is an outer loop, or comes back from a block that waits out of line
    for loop in sorted(loops, key=len):
        if not any(overlap(loop, other) for other in innermost):
            innermost.append(loop)
    inside = {i for loop in innermost for i in loop}
    return [lines[i] for i in sorted(inside)]


def overlap(loop: range, other: range) -> bool:
    """Whether two loops have lines in common."""
    return loop.start < other.stop and other.start < loop.stop


def find_labels(lines: list[str], assembly: Assembly) -> dict[str, int]:
    """At which line each label stands."""
    found = {}
    for i, line in enumerate(lines):
        label = re.match(assembly.label, line)
        if label is not None:
            found[label[1]] = i
    return found


def failures(build: Build, counts: Counts) -> list[str]:
    """What is wrong with it; empty when nothing is."""
    wrong = []
    multiplies = build.function in PRODUCTS
    shared_memory = find_architecture(build.architecture).shared_memory
    if multiplies and not counts.integer_mma:
        wrong.append("no integer tensor-core instruction")
    # AMD's compiler keeps all parts of a rotated group at once: right, and slower where they are many
    may_spill = build.architecture in AMD and not multiplies
    if counts.spills and not may_spill:
        wrong.append(f"{counts.spills} spills")
    # decoded weights are packed by permutes, four to a register; so are probabilities by AMD's compiler
    packs = build.function is grouped_linear_kernel
    packs |= build.architecture in AMD and build.function is attention_kernel
    if multiplies and not packs and counts.loop_permutes > MOST_PERMUTES:
        wrong.append(f"{counts.loop_permutes} byte permutes in the k loop, more than {MOST_PERMUTES}")
    if counts.shared > shared_memory:
        wrong.append(f"{counts.shared} bytes of shared memory, {shared_memory} there are")
    if build.function is hopper._hopper_kernel and not counts.is_asynchronous:
        wrong.append("waits for each product before it starts the next")
    return wrong


def unsupported(architecture: str) -> str | None:
    """Why the installed Triton cannot compile for an architecture; None when it can."""
    try:
        count(resident_build(architecture, 32))
    except (RuntimeError, triton.runtime.errors.TritonError, subprocess.CalledProcessError) as error:
        return f"Triton {triton.__version__} does not compile for {architecture}: {error}"
    return None


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA programs that come with Triton, or that TRITON_NVDISASM_PATH names."""
    program = getattr(triton.knobs.nvidia, name).path
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
