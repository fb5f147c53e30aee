"""A whole FluxTransformer2DModel with random weights on a CPU: every variant side by side with eager float32.

    python experiments/model_bench/bench.py                    # the mid size, one thread, CPU time
    python experiments/model_bench/bench.py --table instructions   # float dtypes, our kernels on each set
    python experiments/model_bench/bench.py --size big --threads 2
    python experiments/model_bench/bench.py --profile --only "int8run cpu"

The tests of kernels and backends run first. A variant whose output is too far from float32 is refused and
not timed.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from variants import TABLES, VARIANTS  # isort: skip  # first: it adds linear_bench to the path
from sidebyside import (
    Budget,
    Measured,
    Process,
    Quartiles,
    Reply,
    collect_facts,
    compute_quartiles,
    describe_machine,
    format_table,
    is_wanted,
    run_cycles,
    run_gate,
    write_report,
)

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
        "--table",
        choices=TABLES,
        default="all",
        help="instructions: float dtypes and our kernels on each instruction set; peers: other programs",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="variants with one of these words in their name"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also print the operators with the most self time"
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/model_bench.json"))
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    return parser.parse_args()


def format_rows(records: Mapping[str, Reply]) -> list[list[str]]:
    """The table, one row per timed variant."""
    rows = []
    for name, record in records.items():
        if "ms" not in record:
            continue
        speed = "1" if name == BASE else str(Quartiles(**record["ratio"]))
        times = [f"{record['ms']:.1f}", speed]
        rows.append([name, *times, f"{record['error']:.4f}", f"{record['setup_seconds']:.0f}"])
    return rows


@dataclass(frozen=True)
class Plan:
    """How each batch of variants is measured.

    Args:
        request: what a worker is told besides its variant.
        threads: of each process.
        budget: slots and cycles of one batch.
        profiled: also list the operators with the most self time.
    """

    request: Reply
    threads: int
    budget: Budget
    profiled: bool


def run_batch(names: Sequence[str], plan: Plan) -> dict[str, Reply]:
    """Set up the base and some variants, measure them interleaved, and end their processes.

    All at once would not fit in memory.
    """
    worker = Path(__file__).with_name("worker.py")
    processes = {name: Process(worker, plan.threads, VARIANTS[name].env) for name in names}
    try:
        live, records = set_up(processes, plan.request)
        measured = run_cycles(live, [(name, BASE) for name in names if name != BASE], plan.budget)
        add_times(records, measured)
        if plan.profiled:
            for name, process in live.items():
                records[name] |= process.ask("profile")
    finally:
        for process in processes.values():
            process.close()
    return records


def set_up(processes: Mapping[str, Process], request: Reply) -> tuple[dict[str, Process], dict[str, Reply]]:
    """Build every variant; those that may be timed, and what each said."""
    live: dict[str, Process] = {}
    records: dict[str, Reply] = {}
    for name, process in processes.items():
        record = records[name] = process.ask("set up", variant=name, **request)
        print(f"{name}: {record}", flush=True)
        if "failed" in record:
            continue
        if record["error"] <= LIMIT:
            live[name] = process
            continue
        record["refused"] = f"output error {record['error']:.4f}, the limit is {LIMIT:g}"
        process.ask("release")
    return live, records


def add_times(records: dict[str, Reply], measured: Measured) -> None:
    """Write what was measured into the records of the variants."""
    for name, reason in measured.stopped.items():
        records[name]["failed"] = reason
    for name, seconds in measured.seconds.items():
        records[name]["ms"] = 1000 * compute_quartiles(seconds).median
    for (name, _), ratios in measured.ratios.items():
        records[name]["ratio"] = asdict(compute_quartiles(ratios))


def print_results(records: Mapping[str, Reply]) -> None:
    """The table, what was not timed, and the operators where they were asked for."""
    columns = ["variant", "ms", "fp32 eager time / time [quartiles]", "output error", "set-up s"]
    print(f"\n{format_table(columns, format_rows(records))}\n")
    for name, record in records.items():
        if "refused" in record:
            print(f"refused, not timed: {name} – {record['refused']}")
        if "failed" in record:
            print(f"cannot run: {name} – {record['failed']}")
    for name, record in records.items():
        for operator, share, count in record.get("operators", []):
            print(f"{name}: {100 * share:5.1f} %  {operator} x{count}")


def split_batches(names: Sequence[str]) -> list[Sequence[str]]:
    """The variants that are in memory together; without any variant one batch of the base alone."""
    if not names:
        return [[]]
    return [names[start : start + TOGETHER] for start in range(0, len(names), TOGETHER)]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if not args.no_gate:
        run_gate()
    report = collect_facts(torch.device("cpu"))
    clock = "process CPU time" if args.threads == 1 else "wall time"
    print(f"{describe_machine(report)}, {args.threads} thread(s), {clock}", flush=True)
    names = [name for name in TABLES[args.table] if name != BASE and is_wanted(name, args.only)]
    batches = split_batches(names)
    budget = Budget(SLOT_SECONDS, args.seconds / len(batches), CYCLES)
    settings = {"size": args.size, "layers": args.layers}
    records: dict[str, Reply] = {}
    with tempfile.TemporaryDirectory() as folder:
        request = settings | {"reference": str(Path(folder, "reference.pt"))}
        plan = Plan(request, args.threads, budget, profiled=args.profile)
        for batch in batches:
            records |= run_batch([BASE, *batch], plan)
    print_results(records)
    write_report(args.json, report | {"clock": clock} | settings | {"variants": records})
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
