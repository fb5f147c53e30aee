"""A whole FLUX.1-dev transformer with random weights on a CUDA GPU.

One step in bfloat16 against INT8, eager and compiled.

    # 19 + 38 blocks, 4096 + 512 tokens; about 60 GB of GPU memory
    python experiments/model_bench/gpu.py
    python experiments/model_bench/gpu.py --size big         # a small one
    python experiments/model_bench/gpu.py --size tiny --device cpu --only int8run   # a dry run: no numbers

The tests of kernels and backends run first. A variant whose output is too far from bfloat16 is refused and
not timed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo
from torch import nn

import variants  # isort: skip  # first: it adds linear_bench to the path
import flux
from sidebyside import (
    Quartiles,
    Reply,
    collect_facts,
    compute_quartiles,
    describe_error,
    describe_machine,
    format_table,
    is_wanted,
    run_gate,
    write_report,
)

from int8run.errors import BackendError
from int8run.layers.assemble import copy_sharing_tensors
from int8run.metrics.layers import count_module_bytes

Build = Callable[[nn.Module, Mapping[str, Any], str], nn.Module]
BASE = "bf16"
LIMIT = 0.05
WARMUP = 3
GIB = 2**30
EAGER, COMPILED = "eager", "compile=blocks"
COLUMNS = [
    "variant",
    "ms per step",
    "bf16 time / time, same mode",
    "bf16 eager time / time",
    "weights + step GiB",
    "output error",
]


def keep_float(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """The base of all ratios."""
    return copy_sharing_tensors(model)


def quantize_with_torchao(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """torchao's W8A8 on a copy that shares the float tensors."""
    return variants.quantize_with_torchao(copy_sharing_tensors(model), call, layers)


def quantize_with_triton(
    model: nn.Module, call: Mapping[str, Any], layers: str, outlier: str = "none"
) -> nn.Module:
    """int8run's own kernels; on a CPU their definition."""
    backend = "reference" if next(model.parameters()).device.type == "cpu" else "triton"
    return variants.quantize_with_int8run(model, call, layers, backend=backend, outlier=outlier)


BUILDS: dict[str, Build] = {
    BASE: keep_float,
    "torchao": quantize_with_torchao,
    "int8run triton": quantize_with_triton,
    "int8run triton, convrot": partial(quantize_with_triton, outlier="convrot"),
    "int8run torch_int_mm": partial(variants.quantize_with_int8run, backend="torch_int_mm"),
}


@dataclass(frozen=True)
class TimedModel:
    """A model that is timed.

    Args:
        model: takes the call.
        build: its name in BUILDS.
        mode: EAGER or COMPILED.
    """

    model: nn.Module
    build: str
    mode: str

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.build} {self.mode}"


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
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N; cpu: a dry run")
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    return parser.parse_args()


def find_device(call: Mapping[str, Any]) -> torch.device:
    """Where a call is made."""
    return next(value.device for value in call.values() if isinstance(value, torch.Tensor))


def time_step(model: nn.Module, call: Mapping[str, Any]) -> float:
    """Seconds of one step, by CUDA events; in a dry run by the clock."""
    if find_device(call).type == "cpu":
        started = time.perf_counter()
        model(**call)
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    model(**call)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def measure_workspace(model: nn.Module, call: Mapping[str, Any]) -> int:
    """Bytes that one step allocates on top of everything that is resident; 0 in a dry run."""
    if find_device(call).type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(**call)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def build_models(
    model: nn.Module, call: Mapping[str, Any], names: Sequence[str], layers: str
) -> tuple[list[TimedModel], dict[str, Reply]]:
    """Build every variant, eager and compiled.

    Args:
        model: in bfloat16.
        call: its arguments.
        names: of BUILDS.
        layers: which Linears become INT8, as `flux.make_family` takes it.

    Returns:
        those that may be timed; and what each build gave, or why it is not timed.
    """
    reference = model(**call)[0]
    timed: list[TimedModel] = []
    records: dict[str, Reply] = {}
    for name in names:
        try:
            built = BUILDS[name](model, call, layers)
            error = flux.relative_error(built(**call)[0], reference)
        except Exception as failure:  # noqa: BLE001  whatever a peer raises is its result here
            records[name] = {"failed": describe_error(failure)}
            continue
        records[name] = {"error": error, "weights_gib": count_module_bytes(built) / GIB}
        if not error <= LIMIT:
            records[name]["refused"] = f"output error {error:.4f}, the limit is {LIMIT:g}"
            continue
        compiled = copy_sharing_tensors(built)
        # Inductor takes minutes on a CPU; that the graph is one shows without it, too
        compiler = "eager" if find_device(call).type == "cpu" else "inductor"
        compiled.compile_repeated_blocks(fullgraph=True, backend=compiler)
        timed.append(TimedModel(copy_sharing_tensors(built), name, EAGER))
        timed.append(TimedModel(compiled, name, COMPILED))
    return timed, records


def time_models(models: Sequence[TimedModel], call: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each model in each round; a round runs every model once, in turn."""
    seconds: dict[str, list[float]] = {timed.name: [] for timed in models}
    for number in range(WARMUP + rounds):
        for timed in models:
            spent = time_step(timed.model, call)
            if number >= WARMUP:
                seconds[timed.name].append(spent)
    return seconds


def compare_times(timed: TimedModel, seconds: Mapping[str, Sequence[float]]) -> Reply:
    """The time of a model's step, and the ratios to the base in its own mode and to the eager base."""
    own_seconds = seconds[timed.name]
    ratios = {}
    for key, mode in (("same_mode", timed.mode), ("to_eager", EAGER)):
        base_seconds = seconds[f"{BASE} {mode}"]
        values = [base / own for base, own in zip(base_seconds, own_seconds, strict=True)]
        ratios[key] = asdict(compute_quartiles(values))
    return {"ms": 1000 * median(own_seconds), **ratios}


def format_row(timed: TimedModel, times: Reply, record: Reply) -> list[str]:
    """A model's row of the table.

    Args:
        timed: the model.
        times: of `compare_times`, with its workspace.
        record: of its build.
    """
    return [
        timed.name,
        f"{times['ms']:.1f}",
        str(Quartiles(**times["same_mode"])),
        str(Quartiles(**times["to_eager"])),
        f"{record['weights_gib']:.1f} + {times['workspace_gib']:.1f}",
        f"{record['error']:.4f}",
    ]


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "this benchmark needs a CUDA GPU; on a CPU run experiments/model_bench/bench.py", file=sys.stderr
        )
        sys.exit(BackendError.exit_code)
    if not args.no_gate:
        run_gate()
    torch._dynamo.config.recompile_limit = 64  # one block class, several kinds of Linear in it
    facts = collect_facts(device)
    print(describe_machine(facts), flush=True)

    names = [name for name in BUILDS if name == BASE or is_wanted(name, args.only)]
    model, call = flux.make_model(flux.SIZES[args.size], args.device, torch.bfloat16)
    models, records = build_models(model, call, names, args.layers)
    seconds = time_models(models, call, args.rounds)

    rows, times = [], {}
    for timed in models:
        workspace_gib = measure_workspace(timed.model, call) / GIB
        times[timed.name] = {**compare_times(timed, seconds), "workspace_gib": workspace_gib}
        rows.append(format_row(timed, times[timed.name], records[timed.build]))
    print(format_table(COLUMNS, rows))
    for name, record in records.items():
        if "refused" in record:
            print(f"refused, not timed: {name} – {record['refused']}")
        if "failed" in record:
            print(f"cannot run: {name} – {record['failed']}")
    settings = {"size": args.size, "layers": args.layers}
    write_report(args.json, facts | settings | {"variants": records, "timed": times})
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
