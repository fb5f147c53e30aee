"""A whole FluxTransformer2DModel with random weights on a CPU: every variant side by side with eager float32.

    python experiments/model_bench/bench.py                    # the mid size, one thread, CPU time
    python experiments/model_bench/bench.py --size big --threads 2
    python experiments/model_bench/bench.py --profile --only "int8run vnni"

The tests of kernels and backends run first. A variant whose output is too far from float32 is refused and
not timed.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from variants import VARIANTS  # isort: skip  # first: it adds linear_bench to the path
from sidebyside import Process, Reply, collect_facts, compute_quartiles, format_table, run_cycles, run_gate

BASE = "fp32 eager"
SLOT_SECONDS = 0.5
CYCLES = range(5, 16)
LIMIT = 0.02
TOGETHER = 8  # variants that are in memory at a time, beside the base
SIZES = ("tiny", "mid", "big")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument(
        "--layers",
        choices=("family", "blocks"),
        default="family",
        help="which Linears become INT8, in every variant",
    )
    parser.add_argument("--threads", type=int, default=1, help="1: process CPU time; more: wall time")
    parser.add_argument("--seconds", type=float, default=600, help="at least 5 cycles are run")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="variants with one of these words in their name"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also print the operators with the most self time"
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/model_bench.json"))
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    return parser.parse_args()


def format_rows(said: dict[str, Reply]) -> list[list[str]]:
    """The table, one row per timed variant."""
    found = []
    for name, record in said.items():
        if "ms" in record:
            r = record.get("ratio", {"low": 1, "median": 1, "high": 1})
            speed = f"{r['median']:.2f} [{r['low']:.2f}–{r['high']:.2f}]" if name != BASE else "1"
            found.append(
                [
                    name,
                    f"{record['ms']:.1f}",
                    speed,
                    f"{record['error']:.4f}",
                    f"{record['setup_seconds']:.0f}",
                ]
            )
    return found


def run_batch(
    names: Sequence[str], request: Reply, threads: int, budget: float, profiled: bool
) -> dict[str, Reply]:
    """Set up the base and some variants, measure them interleaved, and end their processes.

    All at once would not fit in memory.
    """
    processes = {n: Process(Path(__file__).with_name("worker.py"), threads, VARIANTS[n].env) for n in names}
    live: dict[str, Process] = {}
    said: dict[str, Reply] = {}
    try:
        for name, process in processes.items():
            said[name] = process.ask("set up", variant=name, **request)
            if "failed" not in said[name] and said[name]["error"] <= LIMIT:
                live[name] = process
            elif "failed" not in said[name]:
                said[name]["refused"] = f"output error {said[name]['error']:.4f}, the limit is {LIMIT:g}"
                process.ask("release")
            print(f"{name}: {said[name]}", flush=True)
        measured = run_cycles(live, [(n, BASE) for n in names if n != BASE], SLOT_SECONDS, budget, CYCLES)
        for name, reason in measured.stopped.items():
            said[name]["failed"] = reason
        for name, seconds in measured.seconds.items():
            said[name]["ms"] = 1000 * compute_quartiles(seconds)[1]
        for (name, _), ratios in measured.ratios.items():
            said[name]["ratio"] = dict(zip(("low", "median", "high"), compute_quartiles(ratios), strict=True))
        for name in live if profiled else ():
            said[name] |= live[name].ask("profile")
    finally:
        for process in processes.values():
            process.close()
    return said


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if not args.no_gate:
        run_gate()
    report = collect_facts(torch.device("cpu"))
    how = "process CPU time" if args.threads == 1 else "wall time"
    print(
        f"{report['cpu']}, {args.threads} thread(s), {how}, torch {report['versions']['torch']}, "
        f"{report['date']}",
        flush=True,
    )
    names = [n for n in VARIANTS if n != BASE and (not args.only or any(word in n for word in args.only))]
    batches = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)] or [[]]
    said: dict[str, Reply] = {}
    with tempfile.TemporaryDirectory() as folder:
        request = {"size": args.size, "layers": args.layers, "reference": str(Path(folder, "reference.pt"))}
        for batch in batches:
            said |= run_batch(
                [BASE, *batch], request, args.threads, args.seconds / len(batches), args.profile
            )
    columns = ["variant", "ms", "fp32 eager time / time [quartiles]", "output error", "set-up s"]
    print(f"\n{format_table(columns, format_rows(said))}\n")
    for kind, title in (("refused", "refused, not timed"), ("failed", "cannot run")):
        for name, record in said.items():
            if kind in record:
                print(f"{title}: {name} – {record[kind]}")
    for name, record in said.items():
        for operator, share, count in record.get("operators", []):
            print(f"{name}: {100 * share:5.1f} %  {operator} x{count}")
    settings = {"clock": how, "size": args.size, "layers": args.layers}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report | settings | {"variants": said}, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
