"""The Triton version of dequantization: the reference's bits, one node in a graph, no spills."""

import os
import re
import subprocess
import sys
from math import ceil
from pathlib import Path

import pytest
import torch
from support.helpers import full_range, randn
from support.tiers import slow_except
from support.triton_process import needs_gpu, needs_interpreter

from int8run.kernels.dequantize import reference

triton = pytest.importorskip("triton", reason="Triton is not installed")
from int8run.kernels.dequantize import kernel  # noqa: E402

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def make_bytes(*shape, seed=0):
    """Seeded bytes, all of 0..255."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def make_block_scales(n, k, block, swizzled):
    """Seeded bytes in the shape that a weight [n, k] needs; the padding of swizzled ones is random too."""
    columns = ceil(k / block)
    return make_bytes(*((ceil(n / 128) * 128, ceil(columns / 4) * 4) if swizzled else (n, columns)), seed=1)


def list_calls_per_layout():
    """Every layout of a scale, in int8 and both fp8: [N, K] of the weight, shape of the scale, `block`."""
    for shape, scales, block in [
        ((1, 1), (), None),
        ((3, 7), (3, 1), None),
        ((2, 2049), (2,), None),  # a program has 2048 columns
        ((6, 9), (2, 3), None),
        ((5, 7), (2, 3), 3),
        ((4, 2112), (1, 17), 128),
        ((3, 96), (3, 2), None),
        ((3, 70), (3, 3, 1), 32),
    ]:
        yield "dequantize_int8", (full_range(*shape), randn(*scales), block), {}
        for fp8 in (E4M3, E5M2):
            yield (
                "dequantize_fp8",
                (make_bytes(*shape).view(fp8), randn(*scales, dtype=torch.float16), block),
                {},
            )


def list_calls_per_packing():
    """mxfp8 and nvfp4, with scales in rows and swizzled; the bytes hold NaN, infinities and subnormals."""
    for n, k in [(1, 2), (3, 32), (130, 80), (2, 2118)]:
        for swizzled in (True, False):
            for fp8 in (E4M3, E5M2):
                yield (
                    "dequantize_mxfp8",
                    (make_bytes(n, k).view(fp8), make_block_scales(n, k, 32, swizzled)),
                    {"swizzled": swizzled},
                )
            for high_first in (True, False):
                arguments = (
                    make_bytes(n, k // 2),
                    make_block_scales(n, k, 16, swizzled).view(E4M3),
                    randn(1)[0],
                )
                yield "dequantize_nvfp4", arguments, {"swizzled": swizzled, "high_first": high_first}


def list_edge_cases():
    """All 256 codes, published vectors, memory that is not contiguous, and half-precision results."""
    all_codes = torch.arange(256).to(torch.uint8)[None]
    for fp8 in (E4M3, E5M2):
        for scale in (1.0, 0.0):
            yield "dequantize_fp8", (all_codes.view(fp8), torch.tensor(scale)), {}
    ones = torch.ones(1, 256 * 32).to(E4M3)
    yield "dequantize_mxfp8", (ones, all_codes.view(torch.float8_e8m0fnu)), {"swizzled": False}
    for high_first in (True, False):
        byte, scale = torch.tensor([[0x2F]], dtype=torch.uint8), torch.tensor([[0x38]], dtype=torch.uint8)
        yield (
            "dequantize_nvfp4",
            (byte, scale, torch.tensor([1.0])),
            {"swizzled": False, "high_first": high_first},
        )
    yield "dequantize_int8", (full_range(9, 4).T, randn(4, 2)[:, :1]), {}
    yield "dequantize_fp8", (make_bytes(9, 4).view(E4M3).T, randn(3, 2).T, 3), {}
    yield (
        "dequantize_nvfp4",
        (make_bytes(8, 4).T, make_bytes(1, 8)[:, ::8].expand(4, 1), torch.tensor(0.3)),
        {"swizzled": False, "high_first": True},
    )
    yield "dequantize_int8", (full_range(3, 50), randn(3, 1)), {"dtype": torch.float16}
    # the interpreter cuts bfloat16 off where devices round, so here a case without rounding
    yield (
        "dequantize_int8",
        (full_range(3, 50), 2.0 ** torch.arange(-1, 2)[:, None]),
        {"dtype": torch.bfloat16},
    )


CALLS = [*list_calls_per_layout(), *list_calls_per_packing(), *list_edge_cases()]
IDS = [f"{i}-{name}-{list(arguments[0].shape)}" for i, (name, arguments, _) in enumerate(CALLS)]

# Triton reads TRITON_INTERPRET when it decorates: a process of its own
INTERPRETED = """
import sys, torch
from int8run.kernels.dequantize import kernel

torch.use_deterministic_algorithms(True)  # fresh memory is NaN
calls = torch.load(sys.argv[1], weights_only=False)
results = [getattr(kernel, name)(*arguments, **keywords) for name, arguments, keywords in calls]
torch.save(results, sys.argv[2])

nodes = []
def collect(graph, inputs):
    nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph

for name, (arguments, keywords) in {name: rest for name, *rest in calls}.items():
    op = getattr(kernel, name)
    torch.library.opcheck(op, arguments, keywords, test_utils="test_faketensor")
    torch.compile(lambda: op(*arguments, **keywords), fullgraph=True, backend=collect)()
print(*nodes)
"""


def assert_bit_equal(actual, expected):
    """Equal bit for bit, zeros with their signs; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


@pytest.fixture(scope="module")
def interpreted_results(tmp_path_factory):
    """The results of all calls under Triton's interpreter, and the nodes that torch.compile saw."""
    asked, answered = (tmp_path_factory.mktemp("triton") / name for name in ("calls.pt", "results.pt"))
    torch.save(CALLS, asked)
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(asked), str(answered)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(answered), done.stdout.split()


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("i", range(len(CALLS)), ids=IDS)
def test_interpreted_kernel_equals_the_reference(i, interpreted_results):
    name, arguments, keywords = CALLS[i]
    assert_bit_equal(interpreted_results[0][i], getattr(reference, name)(*arguments, **keywords))


@pytest.mark.slow
@needs_interpreter
def test_compiled_graphs_see_each_operator_whole(interpreted_results):
    assert interpreted_results[1] == [
        f"int8run.triton_{name}.default" for name in dict.fromkeys(name for name, *_ in CALLS)
    ]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_kernel_equals_the_reference(dtype):
    for name, arguments, keywords in CALLS:
        there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
        keywords = keywords | {"dtype": dtype}
        assert_bit_equal(
            getattr(kernel, name)(*there, **keywords).cpu(), getattr(reference, name)(*arguments, **keywords)
        )


@pytest.mark.parametrize(
    ("name", "arguments", "keywords"),
    [
        ("dequantize_int8", (make_bytes(2, 4), randn(1)), {}),
        ("dequantize_int8", (full_range(2, 4), randn(4)), {}),
        ("dequantize_fp8", (full_range(2, 4), randn(1)), {}),
        ("dequantize_fp8", (make_bytes(5, 7).view(E4M3), randn(2, 3)), {}),
        ("dequantize_mxfp8", (make_bytes(3, 64).view(E4M3), make_bytes(3, 2)), {"swizzled": True}),
        (
            "dequantize_nvfp4",
            (make_bytes(3, 32), make_bytes(128, 4), randn(1)),
            {"swizzled": False, "high_first": True},
        ),
        (
            "dequantize_nvfp4",
            (make_bytes(3, 32), make_bytes(128, 4), randn(3)),
            {"swizzled": True, "high_first": True},
        ),
    ],
)
def test_errors_are_those_of_the_reference(name, arguments, keywords):
    messages = []
    for module in (reference, kernel):
        with pytest.raises(ValueError) as error:
            getattr(module, name)(*arguments, **keywords)
        messages.append(str(error.value))

    assert messages[0] == messages[1]


# types of codes and scale, their formats, columns of a group, the integers that are 1: Triton makes constants
# of them
COMPILED = {
    "int8 rows": ("*i8", "*fp32", "int8", "float32", kernel.BLOCK_COLUMNS, ["columns", "height"]),
    "fp8 tensor": ("*u8", "*fp32", "e5m2", "float32", kernel.BLOCK_COLUMNS, ["columns"]),
    "fp8 blocks": ("*u8", "*fp32", "e4m3", "float32", 128, []),
    "fp8 odd groups": ("*u8", "*fp32", "e4m3", "float32", 1, ["height"]),
    "mxfp8": ("*u8", "*u8", "e4m3", "e8m0", 32, ["height"]),
    "nvfp4": ("*u8", "*u8", "e2m1", "e4m3", 16, ["height"]),
}


@pytest.mark.skipif(
    bool(os.environ.get("TRITON_INTERPRET")), reason="nothing is compiled under TRITON_INTERPRET"
)
@pytest.mark.parametrize("variant", COMPILED)
@pytest.mark.parametrize("architecture", slow_except([80], [80, 89, 90]))
def test_compiles_without_spills(architecture, variant, tmp_path):
    codes, scale, code_format, scale_format, group, ones = COMPILED[variant]
    constants = {
        "FORMAT": code_format,
        "SCALE": scale_format,
        "SWIZZLED": scale_format != "float32",
        "HIGH_FIRST": True,
    }
    constants |= {"GROUPS": kernel.BLOCK_COLUMNS // group, "GROUP": group} | dict.fromkeys(ones, 1)
    constants |= {} if variant == "nvfp4" else {"global_scale_ptr": None}
    signature = {
        "qdata_ptr": codes,
        "scale_ptr": scale,
        "global_scale_ptr": "*fp32",
        "out_ptr": "*bf16",
    }
    signature |= dict.fromkeys(("K", "columns", "height", "width"), "i32") | dict.fromkeys(
        constants, "constexpr"
    )
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if name in ("qdata_ptr", "scale_ptr", "out_ptr", "K")
    }
    source = triton.compiler.ASTSource(
        fn=kernel._dequantize_kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", architecture, 32))
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    sass = subprocess.run([nvdisasm, tmp_path / "cubin"], capture_output=True, check=True, text=True).stdout

    assert re.search(r"\bSTG\b", sass)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    # no flush of subnormals, bfloat16 rounded to nearest: the interpreter shows neither
    assert "cvt.rn.bf16" in compiled.asm["ptx"]
    assert ".ftz" not in compiled.asm["ptx"]
