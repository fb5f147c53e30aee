"""INT8 linear layers on a CPU, float in and float out: every method side by side with the float32 layer.

    python experiments/linear_bench/bench.py                 # one thread, CPU time
    python experiments/linear_bench/bench.py --threads 2     # wall time, for a quiet machine

The tests of kernels and backends run first. A method whose error is above its limit is refused and not timed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from methods import METHODS
from sidebyside import (
    Measured,
    Process,
    Reply,
    collect_facts,
    compute_quartiles,
    format_table,
    run_cycles,
    run_gate,
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
SLOT_SECONDS = 0.1
CYCLES = range(5, 41)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="1: process CPU time; more: wall time")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="as MxKxN")
    parser.add_argument("--seconds", type=float, default=180, help="per shape; at least 5 cycles are run")
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
    said: dict[str, Reply] = {}
    for name, process in processes.items():
        said[name] = process.ask("set up", method=name, shape=shape)
        if "failed" in said[name]:
            continue
        if said[name]["error"] <= METHODS[name].limit:
            live[name] = process
        else:
            said[name]["refused"] = f"error {said[name]['error']:.4f}, its limit is {METHODS[name].limit:g}"
            process.ask("release")
    return live, said


def summarize(said: dict[str, Reply], measured: Measured, shape: Sequence[int]) -> dict[str, Reply]:
    """One record per method of one shape."""
    m, k, n = shape
    for name, reason in measured.stopped.items():
        said[name]["failed"] = reason
    for name, seconds in measured.seconds.items():
        middle = compute_quartiles(seconds)[1]
        said[name] |= {"ms": 1000 * middle, "gops": 2 * m * k * n / middle / 1e9}
    for (name, base), ratios in measured.ratios.items():
        said[name].setdefault("ratio", {})[base] = dict(
            zip(("low", "median", "high"), compute_quartiles(ratios), strict=True)
        )
    return said


def format_tables(results: Mapping[str, Mapping[str, Reply]]) -> str:
    """The ratio table, the table of differences, and what was not timed."""
    shapes, names = list(results), list(next(iter(results.values())))
    main, extra = [], []
    for name in names:
        records = [results[shape][name] for shape in shapes]
        if any("ms" in r for r in records):
            errors = [r["error"] for r in records if "error" in r]
            cells = [format_ratio(r, name) for r in records]
            main.append([name, *cells, f"{min(errors):.4f}–{max(errors):.4f}"])
        against = METHODS[name].against
        if any(against in r.get("ratio", {}) for r in records):
            extra.append(
                [
                    name,
                    against,
                    *(
                        format_difference(r["ratio"][against]) if against in r.get("ratio", {}) else "–"
                        for r in records
                    ),
                ]
            )
    lines = [format_table(["fp32 time / method time [quartiles] (GOP/s)", *shapes, "rel. error"], main)]
    if extra:
        lines += ["", format_table(["extra time", "against", *shapes], extra)]
    for kind, title in (("refused", "refused, not timed"), ("failed", "cannot run")):
        found = {
            name: [f"{s}: {results[s][name][kind]}" for s in shapes if kind in results[s][name]]
            for name in names
        }
        lines += [f"\n{title}: {name} – {'; '.join(whys)}" for name, whys in found.items() if whys]
    return "\n".join(lines)


def format_ratio(record: Reply, name: str) -> str:
    """A cell of the ratio table."""
    if "ms" not in record:
        return "refused" if "refused" in record else "–"
    if name == BASE:
        return f"1 ({record['gops']:.0f})"
    r = record["ratio"][BASE]
    return f"{r['median']:.2f} [{r['low']:.2f}–{r['high']:.2f}] ({record['gops']:.0f})"


def format_difference(ratio: Mapping[str, float]) -> str:
    """A cell of the table of differences: time over the base's time, less one."""
    low, middle, high = (f"{100 * (1 / ratio[q] - 1):+.1f}" for q in ("high", "median", "low"))
    return f"{middle} % [{low}–{high}]"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if not args.no_gate:
        run_gate()
    names = [n for n in METHODS if n == BASE or not args.only or any(word in n for word in args.only)]
    report = collect_facts(torch.device("cpu"))
    how = "process CPU time" if args.threads == 1 else "wall time"
    print(
        f"{report['cpu']}, {args.threads} thread(s), {how}, torch {report['versions']['torch']}, "
        f"{report['date']}",
        flush=True,
    )
    pairs = [(n, base) for n in names for base in (BASE, METHODS[n].against) if n != BASE and base]
    processes = {
        n: Process(Path(__file__).with_name("worker.py"), args.threads, METHODS[n].env) for n in names
    }
    results: dict[str, dict[str, Reply]] = {}
    try:
        for text in args.shapes:
            shape = [int(side) for side in text.split("x")]
            live, said = set_up(processes, shape)
            results[text] = summarize(
                said, run_cycles(live, pairs, SLOT_SECONDS, args.seconds, CYCLES), shape
            )
            print(f"\n{format_tables({text: results[text]})}", flush=True)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report | {"clock": how, "shapes": results}, indent=1) + "\n")
    finally:
        for process in processes.values():
            process.close()
    if len(results) > 1:
        print(f"\nall shapes\n\n{format_tables(results)}")
    print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    main()
