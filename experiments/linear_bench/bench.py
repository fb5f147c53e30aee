"""INT8 linear layers on a CPU, float in and float out: every method side by side with the float32 layer.

    python experiments/linear_bench/bench.py                       # one thread, CPU time
    python experiments/linear_bench/bench.py --table instructions  # float dtypes, our kernels on each set
    python experiments/linear_bench/bench.py --threads 2           # wall time, for a quiet machine

The tests of kernels and backends run first. A method whose error is above its limit is refused and not timed.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from methods import METHODS, SETS, TABLES
from peak import measure_peaks
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

SHAPES = (
    "256x768x768",
    "1024x1024x4096",
    "1024x4096x1024",
    "512x3072x12288",
    "4096x3072x3072",
    "1x3072x18432",
)
BASE = "fp32"
MISSING = "–"
SLOT_SECONDS = 0.1
CYCLES = range(5, 41)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="1: process CPU time; more: wall time")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="as MxKxN")
    parser.add_argument("--seconds", type=float, default=180, help="per shape; at least 5 cycles are run")
    parser.add_argument(
        "--table",
        choices=TABLES,
        default="all",
        help="instructions: float dtypes and our kernels on each instruction set; peers: other programs",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="methods with one of these words in their name"
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/linear_bench.json"))
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    return parser.parse_args()


def set_up(
    processes: Mapping[str, Process], shape: Sequence[int]
) -> tuple[dict[str, Process], dict[str, Reply]]:
    """Build every method for one shape; those that may be timed, and what each said."""
    live: dict[str, Process] = {}
    records: dict[str, Reply] = {}
    for name, process in processes.items():
        record = records[name] = process.ask("set up", method=name, shape=shape)
        if "failed" in record:
            continue
        limit = METHODS[name].limit
        if record["error"] <= limit:
            live[name] = process
            continue
        record["refused"] = f"error {record['error']:.4f}, its limit is {limit:g}"
        process.ask("release")
    return live, records


def add_times(records: dict[str, Reply], measured: Measured, shape: Sequence[int]) -> None:
    """Write what was measured of one shape into the records of its methods."""
    m, k, n = shape
    for name, reason in measured.stopped.items():
        records[name]["failed"] = reason
    for name, seconds in measured.seconds.items():
        median = compute_quartiles(seconds).median
        records[name] |= {"ms": 1000 * median, "gops": 2 * m * k * n / median / 1e9}
    for (name, base), ratios in measured.ratios.items():
        records[name].setdefault("ratio", {})[base] = asdict(compute_quartiles(ratios))


def format_tables(results: Mapping[str, Mapping[str, Reply]]) -> str:
    """The ratio table, the table of differences, and what was not timed.

    Args:
        results: by shape and method.
    """
    shapes = list(results)
    names = list(next(iter(results.values())))
    ratio_rows, difference_rows = [], []
    for name in names:
        records = [results[shape][name] for shape in shapes]
        if any("ms" in record for record in records):
            ratio_rows.append(make_ratio_row(name, records))
        against = METHODS[name].against
        differences = [format_difference(record, against) for record in records]
        if any(cell != MISSING for cell in differences):
            difference_rows.append([name, str(against), *differences])
    head = ["fp32 time / method time [quartiles] (GOP/s)", *shapes, "rel. error"]
    parts = [format_table(head, ratio_rows)]
    if difference_rows:
        parts += ["", format_table(["extra time", "against", *shapes], difference_rows)]
    for name in names:
        parts += list_untimed(name, {shape: results[shape][name] for shape in shapes})
    return "\n".join(parts)


def format_shares(results: Mapping[str, Mapping[str, Reply]], peaks: Mapping[str, float]) -> str:
    """The table of what a whole layer reaches of the most that its instruction set gives.

    Args:
        results: by shape and method.
        peaks: GOP/s by instruction set.
    """
    rows = []
    for instructions, peak in peaks.items():
        records = [results[shape][SETS[instructions]] for shape in results]
        rows.append([instructions, f"{peak:.0f}", *(format_share(record, peak) for record in records)])
    return format_table(["instructions", "GOP/s at most", *results], rows)


def format_share(record: Reply, peak: float) -> str:
    """A cell of that table."""
    if "gops" not in record:
        return MISSING
    return f"{100 * record['gops'] / peak:.0f} %"


def make_ratio_row(name: str, records: Sequence[Reply]) -> list[str]:
    """A method's row of the ratio table."""
    errors = [record["error"] for record in records if "error" in record]
    cells = [format_ratio(record, name) for record in records]
    return [name, *cells, f"{min(errors):.4f}–{max(errors):.4f}"]


def list_untimed(name: str, records: Mapping[str, Reply]) -> list[str]:
    """Why a method was not timed, and at which shapes; no lines where it was."""
    lines = []
    for key, title in (("refused", "refused, not timed"), ("failed", "cannot run")):
        reasons = [f"{shape}: {record[key]}" for shape, record in records.items() if key in record]
        if reasons:
            lines.append(f"\n{title}: {name} – {'; '.join(reasons)}")
    return lines


def format_ratio(record: Reply, name: str) -> str:
    """A cell of the ratio table."""
    if "ms" not in record:
        return "refused" if "refused" in record else MISSING
    if name == BASE:
        return f"1 ({record['gops']:.0f})"
    return f"{Quartiles(**record['ratio'][BASE])} ({record['gops']:.0f})"


def format_difference(record: Reply, base: str | None) -> str:
    """A cell of the table of differences: time over the base's time, less one."""
    ratio = record.get("ratio", {}).get(base)
    if ratio is None:
        return MISSING
    low, middle, high = (f"{100 * (1 / ratio[quartile] - 1):+.1f}" for quartile in ("high", "median", "low"))
    return f"{middle} % [{low}–{high}]"


def list_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which methods are compared: each with float32, some with another one besides."""
    pairs = []
    for name in names:
        if name == BASE:
            continue
        pairs.append((name, BASE))
        against = METHODS[name].against
        if against is not None:
            pairs.append((name, against))
    return pairs


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if not args.no_gate:
        run_gate()
    report = collect_facts(torch.device("cpu"))
    clock = "process CPU time" if args.threads == 1 else "wall time"
    print(f"{describe_machine(report)}, {args.threads} thread(s), {clock}", flush=True)
    names = [name for name in TABLES[args.table] if name == BASE or is_wanted(name, args.only)]
    pairs = list_pairs(names)
    worker = Path(__file__).with_name("worker.py")
    processes = {name: Process(worker, args.threads, METHODS[name].env) for name in names}
    results: dict[str, dict[str, Reply]] = {}
    try:
        for text in args.shapes:
            shape = [int(side) for side in text.split("x")]
            live, records = set_up(processes, shape)
            measured = run_cycles(live, pairs, Budget(SLOT_SECONDS, args.seconds, CYCLES))
            add_times(records, measured, shape)
            results[text] = records
            print(f"\n{format_tables({text: records})}", flush=True)
            write_report(args.json, report | {"clock": clock, "shapes": results})
    finally:
        for process in processes.values():
            process.close()
    if len(results) > 1:
        print(f"\nall shapes\n\n{format_tables(results)}")
    own_sets = [instructions for instructions, name in SETS.items() if name in names]
    if own_sets and args.threads == 1:  # with more, the clock of the CPU is another one
        peaks = measure_peaks(own_sets)
        print(f"\n{format_shares(results, peaks)}")
        write_report(args.json, report | {"clock": clock, "shapes": results, "peaks": peaks})
    print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    main()
