"""A whole FLUX.1-dev transformer with random weights on a CUDA GPU.

One step in bfloat16 against INT8, eager and compiled.

    # 19 + 38 blocks, 4096 + 512 tokens; about 60 GB of GPU memory
    python experiments/model_bench/gpu.py
    python experiments/model_bench/gpu.py --size big         # a small one

The tests of kernels and backends run first. A variant whose output is too far from bfloat16 is refused and
not timed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn

import variants  # isort: skip  # first: it adds linear_bench to the path
import flux
from sidebyside import Reply, collect_facts, compute_quartiles, format_table, run_gate

from int8run.errors import BackendError
from int8run.layers.assemble import copy_sharing_tensors
from int8run.metrics.layers import count_module_bytes

Build = Callable[[nn.Module, Mapping[str, Any], str], nn.Module]
BASE = "bf16"
LIMIT = 0.05
WARMUP = 3
GIB = 2**30


def quantize_with_torchao(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """torchao's W8A8 on a copy that shares the float tensors."""
    return variants.quantize_with_torchao(copy_sharing_tensors(model), call, layers)


BUILDS: dict[str, Build] = {
    BASE: lambda model, call, layers: copy_sharing_tensors(model),
    "torchao": quantize_with_torchao,
    "int8run triton": partial(variants.ours, backend="triton"),
    "int8run triton, convrot": partial(variants.ours, backend="triton", outlier="convrot"),
    "int8run torch_int_mm": partial(variants.ours, backend="torch_int_mm"),
}
COMPILE = {"eager": False, "compile=blocks": True}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=flux.SIZES, default="full")
    parser.add_argument(
        "--layers",
        choices=("family", "blocks"),
        default="family",
        help="which Linears become INT8, in every variant",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="variants with one of these words in their name"
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/model_bench_gpu.json"))
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    return parser.parse_args()


def step_seconds(model: nn.Module, call: Mapping[str, Any]) -> float:
    """One step by CUDA events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    model(**call)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def workspace_bytes(model: nn.Module, call: Mapping[str, Any]) -> int:
    """What one step allocates on top of everything that is resident."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(**call)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def set_up(
    names: list[str], size: flux.Size, layers: str
) -> tuple[dict[str, nn.Module], dict[str, Any], dict[str, Reply]]:
    """Every variant that may be timed, the call, and what each is."""
    model, call = flux.make_model(size, "cuda", torch.bfloat16)
    reference = model(**call)[0]
    live: dict[str, nn.Module] = {}
    said: dict[str, Reply] = {}
    for name in names:
        try:
            made = BUILDS[name](model, call, layers)
            said[name] = {
                "error": flux.relative_error(made(**call)[0], reference),
                "weights_gib": count_module_bytes(made) / GIB,
            }
        except Exception as error:  # noqa: BLE001  whatever a peer raises is its result here
            said[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            continue
        if not said[name]["error"] <= LIMIT:
            said[name]["refused"] = f"output error {said[name]['error']:.4f}, the limit is {LIMIT:g}"
            continue
        for mode, compiled in COMPILE.items():
            variant = live[f"{name} {mode}"] = copy_sharing_tensors(made)
            if compiled:
                variant.compile_repeated_blocks(fullgraph=True)
    return live, call, said


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        print(
            "this benchmark needs a CUDA GPU; on a CPU run experiments/model_bench/bench.py", file=sys.stderr
        )
        sys.exit(BackendError.exit_code)
    if not args.no_gate:
        run_gate()
    torch._dynamo.config.recompile_limit = 64  # one block class, several kinds of Linear in it
    report = collect_facts(torch.device("cuda"))
    print(
        f"{report['gpu']}, torch {report['versions']['torch']}, triton {report['versions']['triton']}, "
        f"{report['date']}",
        flush=True,
    )
    names = [n for n in BUILDS if n == BASE or not args.only or any(word in n for word in args.only)]
    live, call, said = set_up(names, flux.SIZES[args.size], args.layers)
    seconds: dict[str, list[float]] = {name: [] for name in live}
    for number in range(args.rounds + WARMUP):
        for name, model in live.items():
            spent = step_seconds(model, call)
            if number >= WARMUP:
                seconds[name].append(spent)
    rows, timed = [], {}
    for name, times in seconds.items():
        kind = next(n for n in sorted(names, key=len, reverse=True) if name.startswith(f"{n} "))
        mode = name.removeprefix(f"{kind} ")
        ratios = [
            compute_quartiles([b / t for b, t in zip(seconds[f"{BASE} {m}"], times, strict=True)])
            for m in (mode, "eager")
        ]
        workspace = workspace_bytes(live[name], call) / GIB
        timed[name] = {
            "ms": 1000 * statistics.median(times),
            "same_mode": ratios[0],
            "to_eager": ratios[1],
            "workspace_gib": workspace,
        }
        cells = [f"{middle:.2f} [{low:.2f}–{high:.2f}]" for low, middle, high in ratios]
        memory = f"{said[kind]['weights_gib']:.1f} + {workspace:.1f}"
        rows.append([name, f"{timed[name]['ms']:.1f}", *cells, memory, f"{said[kind]['error']:.4f}"])
    header = [
        "variant",
        "ms per step",
        "bf16 time / time, same mode",
        "bf16 eager time / time",
        "weights + step GiB",
        "output error",
    ]
    print(format_table(header, rows))
    for name, record in said.items():
        if "refused" in record:
            print(f"refused, not timed: {name} – {record['refused']}")
        if "failed" in record:
            print(f"cannot run: {name} – {record['failed']}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    settings = {"size": args.size, "layers": args.layers}
    args.json.write_text(json.dumps(report | settings | {"variants": said, "timed": timed}, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
