"""INT8 linear layers on a CUDA GPU, bfloat16 in and out.

The Linears of one step of three models, every method interleaved.

    python experiments/linear_bench/gpu.py                   # all models, all methods
    python experiments/linear_bench/gpu.py --models flux --rounds 50

The tests of kernels and backends run first. A method whose error is above its limit is refused and not timed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import methods
import ours
import torch
import torch.nn.functional as F
from case import Case, make_case
from shapes import MODELS, LayerShape
from sidebyside import Reply, collect_facts, compute_quartiles, format_table, run_gate
from toolkit import ToolkitLinear
from torch import Tensor

from int8run.errors import BackendError
from int8run.kernels.hadamard.reference import regular_hadamard, rotate_groups

Forward = Callable[[Tensor], Tensor]
DTYPE = torch.bfloat16
BASE = "bf16 cuBLAS"
LIMIT = 0.02
RANKS = (16, 64)
WARMUP = 5
INPUTS = 4
FLUSH_BYTES = 256 * 2**20  # more than any L2
# the GPU waits this long before each call, so that what is timed does not wait for the CPU's launches
AHEAD_CYCLES = 1_000_000
CEILING_SIDE = 8192


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="methods with one of these words in their name"
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/linear_bench_gpu.json"))
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    parser.add_argument("--no-tune", action="store_true", help="do not try the tiles of our kernel")
    return parser.parse_args()


def make_cublas(case: Case) -> Forward:
    """The base of all ratios."""
    return lambda x: F.linear(x, case.weight, case.bias)


def toolkit_triton(case: Case) -> Forward:
    """ComfyUI-INT8-Toolkit's Triton path, restated."""
    from toolkit_triton import ToolkitTritonLinear

    return ToolkitTritonLinear(case.linear()[0])


def comfy_kitchen(case: Case, group: int = 0) -> Forward:
    """comfy_kitchen.int8_linear with a scale per row; `group` rotates x inside it."""
    import comfy_kitchen

    weight = (
        rotate_groups(case.weight.float(), regular_hadamard(group).to(case.weight.device).T)
        if group
        else case.weight
    )
    qdata, scale = comfy_kitchen.quantize_int8_rowwise(weight)
    rotation = dict(convrot=True, convrot_groupsize=group) if group else {}
    return lambda x: comfy_kitchen.int8_linear(x, qdata, scale, case.bias, out_dtype=x.dtype, **rotation)


def int8run_triton(
    case: Case, outlier: str = "none", tile: Any = None, branch: Callable[..., Forward] | None = None
) -> Forward:
    """Ours, as the runner builds it."""
    layer = ours.int8_layer(case, ours.triton_backend(tile), outlier)
    return layer if branch is None else branch(case, layer)


METHODS: dict[str, Callable[[Case], Forward]] = {
    BASE: make_cublas,
    "torchao eager": methods.torchao_eager,
    "torchao compile": methods.torchao_compile,
    "sdnq": methods.make_sdnq,
    "Toolkit triton": toolkit_triton,
    "Toolkit torch_int_mm": lambda case: ToolkitLinear(case.linear()[0]),
    "comfy_kitchen": comfy_kitchen,
    "comfy_kitchen, convrot": partial(comfy_kitchen, group=256),
    "int8run torch_int_mm": lambda case: ours.int8_layer(
        case, ours.make_backend("torch_int_mm", "TorchIntMM")
    ),
    "int8run triton": int8run_triton,
    "int8run triton, convrot": partial(int8run_triton, outlier="convrot"),
}


class Clock:
    """Times calls on the GPU by events, from a cold L2, with the launches ahead of the GPU."""

    def __init__(self, device: torch.device):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, calls: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
        """Each round runs every call once, in turn, with the number of the round."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + WARMUP):
            events = {
                name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for name in calls
            }
            for name, call in calls.items():
                self.flush.zero_()
                torch.cuda._sleep(AHEAD_CYCLES)
                events[name][0].record()
                call(number)
                events[name][1].record()
            torch.cuda.synchronize()
            if number >= WARMUP:
                for name, (begin, end) in events.items():
                    found[name].append(begin.elapsed_time(end) / 1000)
        return found

    def launch_seconds(self, call: Callable[[int], object], times: int = 20) -> float:
        """What one call costs the CPU while the GPU is busy."""
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD_CYCLES)
        started = time.perf_counter()
        for number in range(times):
            call(number)
        spent = (time.perf_counter() - started) / times
        torch.cuda.synchronize()
        return spent


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches in this run, per second."""

    bf16_ops: float
    int8_ops: float
    bytes: float
    int8_from: str

    def limit(self, size: tuple[int, int, int], int8: bool) -> tuple[float, str]:
        """The least seconds of a layer, and whether operations or bytes set it. x and y are bfloat16."""
        m, k, n = size
        by_ops = 2 * m * k * n / (self.int8_ops if int8 else self.bf16_ops)
        by_bytes = (2 * m * k + (1 if int8 else 2) * n * k + 2 * m * n) / self.bytes
        return max(by_ops, by_bytes), "operations" if by_ops > by_bytes else "bytes"


def measure_ceilings(clock: Clock, device: torch.device) -> Ceilings:
    """A bfloat16 and an int8 product of 8192 cubed, and a copy of 1 GiB."""
    side = CEILING_SIDE
    a, b = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in range(2))
    q, w = (torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[int], object]] = {
        "bf16": lambda i: a @ b,
        "copy": lambda i: target.copy_(source),
    }
    try:
        torch._int_mm(q, w.T)
        calls["int8"] = lambda i: torch._int_mm(q, w.T)
    except RuntimeError as error:
        print(f"torch._int_mm cannot run here: {error}", file=sys.stderr)
    middle = {name: statistics.median(s) for name, s in clock.seconds(calls, 20).items()}
    ops = 2 * side**3
    bf16 = ops / middle["bf16"]
    int8 = ops / middle["int8"] if "int8" in middle else 0.0
    # cuBLAS may run int8 far below the hardware; twice bfloat16 is what tensor cores since Ampere do at least
    best, source_of = max((2 * bf16, "twice the bfloat16 product"), (int8, "torch._int_mm"))
    return Ceilings(bf16, best, 2 * 2**30 / middle["copy"], source_of)


def try_method(build: Callable[[Case], Forward], case: Case) -> tuple[Forward | None, Reply]:
    """A method on one case: the call, and its error or why it is not timed."""
    try:
        forward = build(case)
        error = case.error(forward(case.x))
    except Exception as failure:  # noqa: BLE001  whatever a peer raises is its result here
        return None, {"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
    if not error <= LIMIT:
        return None, {"error": error, "refused": f"error {error:.4f}, the limit is {LIMIT:g}"}
    return forward, {"error": error}


def tune_tiles(clock: Clock, case: Case) -> tuple[Any, list[Reply]]:
    """Every candidate tile of our product alone; the fastest one, and what each gave."""
    product = ours.triton_product(case)
    tiles = {str(tile): tile for tile in ours.triton_tiles(case)}
    calls, records = {}, []
    for name, tile in tiles.items():
        forward, record = try_method(lambda _, tile=tile: lambda x: product(tile), case)
        records.append({"tile": name, **record})
        if forward is not None:
            calls[name] = lambda i, tile=tile: product(tile)
    times = {name: statistics.median(s) for name, s in clock.seconds(calls, 10).items()} if calls else {}
    m, k, n = case.x.shape[0], *reversed(case.weight.shape)
    for record in records:
        if record["tile"] in times:
            record |= {
                "us": 1e6 * times[record["tile"]],
                "tops": 2 * m * k * n / times[record["tile"]] / 1e12,
            }
    best = min(times, key=times.__getitem__) if times else None
    return tiles.get(best), sorted(records, key=lambda r: r.get("us", float("inf")))


def lora_builders(rank: int) -> dict[str, Callable[[Case], Forward]]:
    """The branch beside our layer, in the kernels and as two products."""
    return {
        f"int8run triton, LoRA r{rank}": partial(int8run_triton, branch=ours.with_branch),
        f"int8run triton, naive LoRA r{rank}": partial(int8run_triton, branch=methods.make_naive_lora),
    }


def measure_size(
    clock: Clock, top: Ceilings, size: tuple[int, int, int], args: argparse.Namespace, device: torch.device
) -> Reply:
    """All methods, the tiles and the LoRA branches on one size."""
    torch._dynamo.reset()
    case = make_case(*size, device=device, dtype=DTYPE)
    wanted = lambda name: name == BASE or not args.only or any(word in name for word in args.only)  # noqa: E731
    report: Reply = {}
    builders = {name: (build, case) for name, build in METHODS.items() if wanted(name)}
    if not args.no_tune and wanted("int8run triton, best tile"):
        try:
            tile, report["tiles"] = tune_tiles(clock, case)
            builders["int8run triton, best tile"] = (partial(int8run_triton, tile=tile), case)
        except (ImportError, NotImplementedError) as error:
            print(f"no tiles to try: {error}", file=sys.stderr)
    for rank in RANKS:
        with_lora = make_case(*size, rank=rank, device=device, dtype=DTYPE)
        builders |= {name: (build, with_lora) for name, build in lora_builders(rank).items() if wanted(name)}
    forwards, records = {}, {}
    for name, (build, its_case) in builders.items():
        forward, records[name] = try_method(build, its_case)
        if forward is not None:
            forwards[name] = forward
    inputs = [case.x, *(torch.randn_like(case.x) for _ in range(INPUTS - 1))]
    calls = {
        name: (lambda i, forward=forward: forward(inputs[i % INPUTS])) for name, forward in forwards.items()
    }
    times = clock.seconds(calls, args.rounds)
    for name, seconds in times.items():
        low, middle, high = compute_quartiles([b / s for b, s in zip(times[BASE], seconds, strict=True)])
        least, by = top.limit(size, int8=name != BASE)
        records[name] |= {
            "us": 1e6 * statistics.median(seconds),
            "ratio": {"low": low, "median": middle, "high": high},
            "tops": 2 * size[0] * size[1] * size[2] / statistics.median(seconds) / 1e12,
            "limit_share": least / statistics.median(seconds),
            "limited_by": by,
            "launch_us": 1e6 * clock.launch_seconds(calls[name]),
        }
    plain = "int8run triton"
    for name in times:
        if name.startswith(f"{plain}, ") and plain in times:
            low, middle, high = compute_quartiles(
                [s / p - 1 for p, s in zip(times[plain], times[name], strict=True)]
            )
            records[name]["extra"] = {"low": low, "median": middle, "high": high}
    return report | {"methods": records}


def show_size(shapes: Sequence[LayerShape], report: Reply) -> str:
    """The tables of one size."""
    rows, notes = [], []
    for name, r in report["methods"].items():
        if "us" in r:
            q = r["ratio"]
            extra = f"{100 * r['extra']['median']:+.1f} %" if "extra" in r else ""
            rows.append(
                [
                    name,
                    f"{r['us']:.1f}",
                    f"{q['median']:.2f} [{q['low']:.2f}–{q['high']:.2f}]",
                    f"{r['tops']:.0f}",
                    f"{100 * r['limit_share']:.0f} % of {r['limited_by']}",
                    f"{r['launch_us']:.0f}",
                    f"{r['error']:.4f}",
                    extra,
                ]
            )
        notes += [f"refused, not timed: {name} – {r['refused']}"] if "refused" in r else []
        notes += [f"cannot run: {name} – {r['failed']}"] if "failed" in r else []
    places = "; ".join(f"{s.model} {s.name} x{s.calls}" for s in shapes)
    header = [
        "method",
        "µs",
        "cuBLAS time / time",
        "TOPS",
        "of the measured limit",
        "launch µs",
        "rel. error",
        "over int8run triton",
    ]
    lines = [f"## {'x'.join(map(str, shapes[0].size))}: {places}", "", format_table(header, rows), "", *notes]
    tiles = [r for r in report.get("tiles", []) if "us" in r]
    lines += [f"tile: {r['tile']} {r['us']:.1f} µs, {r['tops']:.0f} TOPS" for r in tiles[:5]]
    return "\n".join(lines)


def show_steps(
    models: Mapping[str, Sequence[LayerShape]], sizes: Mapping[tuple[int, int, int], Reply]
) -> str:
    """Milliseconds of all Linears with more than one row in one step.

    A method that misses one layer has no sum.
    """
    names = list(dict.fromkeys(name for report in sizes.values() for name in report["methods"]))
    rows = []
    for name in names:
        cells = []
        for shapes in models.values():
            found = [(s.calls, sizes[s.size]["methods"]) for s in shapes if s.m > 1]
            if all("us" in of_size.get(name, {}) for _, of_size in found):
                own, base = (sum(calls * of_size[n]["us"] for calls, of_size in found) for n in (name, BASE))
                cells.append(f"{own / 1000:.1f} ({base / own:.2f}x)")
            else:
                cells.append("–")
        rows.append([name, *cells])
    return format_table(["ms of all Linears with more than one row, one step", *models], rows)


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        print(
            "this benchmark needs a CUDA GPU; on a CPU run experiments/linear_bench/bench.py", file=sys.stderr
        )
        sys.exit(BackendError.exit_code)
    if not args.no_gate:
        run_gate()
    device = torch.device("cuda")
    report = collect_facts(device)
    clock = Clock(device)
    top = measure_ceilings(clock, device)
    print(
        f"{report['gpu']}, torch {report['versions']['torch']}, triton {report['versions']['triton']}, "
        f"{report['date']}"
    )
    print(
        f"measured ceilings: bf16 {top.bf16_ops / 1e12:.0f} TFLOPS, int8 {top.int8_ops / 1e12:.0f} TOPS "
        f"({top.int8_from}), copy {top.bytes / 1e12:.2f} TB/s\n"
    )
    models = {name: MODELS[name]() for name in args.models}
    by_size: dict[tuple[int, int, int], list[LayerShape]] = {}
    for shape in (s for shapes in models.values() for s in shapes):
        by_size.setdefault(shape.size, []).append(shape)
    sizes: dict[tuple[int, int, int], Reply] = {}
    for size, shapes in by_size.items():
        sizes[size] = measure_size(clock, top, size, args, device)
        print(f"{show_size(shapes, sizes[size])}\n", flush=True)
        saved = [{"layers": [asdict(s) for s in by_size[done]], **found} for done, found in sizes.items()]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report | {"ceilings": asdict(top), "sizes": saved}, indent=1) + "\n")
    print(f"{show_steps(models, sizes)}\n\nwritten to {args.json}")


if __name__ == "__main__":
    main()
