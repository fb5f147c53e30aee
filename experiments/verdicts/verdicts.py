"""Which differences between methods are real, and how many prompts it takes to see each of them.

Reads the jobs of a sweep over the same prompts and seeds.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from int8run.metrics.interval_settings import IntervalSettings
from int8run.metrics.intervals import POWER, Difference, Interval, bound_means, compare_pairs
from int8run.report.differences import collect_sample_psnrs
from int8run.report.noise_floor_text import describe_noise_floors
from int8run.report.ranking import Candidate
from int8run.report.runs import Run, name_runs
from int8run.tracking.run_record import FINISHED, find_records

SETTINGS = IntervalSettings()
DRAWS = 500
SIZES = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100)
PSNR = "quality/psnr_db"


def main() -> None:
    """Print the tables, and write them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path, help="folder of a sweep: multirun/<date>/<time>")
    parser.add_argument("--out", type=Path, help="folder for methods.csv and pairs.csv")
    parser.add_argument("--draws", type=int, default=DRAWS, help="subsets of each size that are drawn")
    arguments = parser.parse_args()
    runs = [run for run in name_runs(find_records(arguments.sweep)) if run.record.state == FINISHED]
    methods = [describe_method(run) for run in runs]
    pairs = compare_all(runs, arguments.draws)
    for rows in (methods, pairs):
        print_table(rows)
    for run in runs:
        for line in describe_noise_floors(run.record.noise_floor, run.record.metrics, run.record.statistics):
            print(f"{run.name}: {line}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(methods, arguments.out / "methods.csv")
        write_csv(pairs, arguments.out / "pairs.csv")


def describe_method(run: Run) -> dict[str, Any]:
    """One row: mean, interval, median and worst sample of a run's PSNR, and its SSIM and latent error."""
    metrics = run.record.metrics
    psnrs = [sample["psnr_db"] for sample in run.record.images]
    return {
        "method": run.label,
        "prompts": len(psnrs),
        "PSNR dB": f"{metrics[PSNR]:.2f}",
        "interval": format_limits(metrics.get(f"{PSNR}_low"), metrics.get(f"{PSNR}_high")),
        "median": f"{metrics[f'{PSNR}_median']:.2f}",
        "worst": f"{min(psnrs):.1f}",
        "latent error %": f"{100 * metrics['quality/latent_rel_err']:.3f}",
        "float to itself dB": format_number(metrics.get("quality/noise_floor_db")),
        "float in another dtype dB": format_number(metrics.get("quality/dtype_floor_db")),
    }


def compare_all(runs: Sequence[Run], draws: int) -> list[dict[str, Any]]:
    """A row for each pair of methods: difference, interval, and how many prompts the verdict needs."""
    psnrs = {run.label: collect_sample_psnrs(Candidate(run.name, (run,))) for run in runs}
    rows = []
    for (first, of_first), (second, of_second) in itertools.combinations(psnrs.items(), 2):
        shared = [key for key in of_first if key in of_second]
        values = [of_first[key] for key in shared], [of_second[key] for key in shared]
        difference = compare_pairs(*values, SETTINGS)
        gaps = np.subtract(*values)
        rows.append(
            {
                "first": first,
                "second": second,
                "difference dB": f"{difference.mean:+.3f}",
                "interval": format_interval(difference.interval),
                "told apart": describe_sign(difference),
                "deviation dB": f"{gaps.std(ddof=1):.3f}",
                "prompts by formula": format_needed(count_by_formula(gaps)),
                "prompts by drawing": format_needed(count_by_drawing(gaps, draws)),
                "unpaired": format_needed(count_unpaired(*values)),
            }
        )
    return rows


def count_by_formula(gaps: np.ndarray) -> float:
    """Prompts for a power of 0.8 by the normal approximation that the report uses."""
    return (get_quantiles() * gaps.std(ddof=1) / gaps.mean()) ** 2 if gaps.mean() else math.inf


def count_unpaired(first: Sequence[float], second: Sequence[float]) -> float:
    """The same where each method had prompts of its own: what pairing saves."""
    variance = np.var(first, ddof=1) + np.var(second, ddof=1)
    gap = float(np.mean(first) - np.mean(second))
    return float(get_quantiles() ** 2 * variance / gap**2) if gap else math.inf


def get_quantiles() -> float:
    """Sum of the quantiles of the level and of the power."""
    return float(stats.norm.ppf((1 + SETTINGS.level) / 2) + stats.norm.ppf(POWER))


def count_by_drawing(gaps: np.ndarray, draws: int) -> float:
    """The fewest prompts of SIZES whose subsets tell the pair apart in POWER of the draws; infinite: none.

    Subsets are drawn without replacement, so that large ones are alike, and the share is less sure there.
    """
    rng = np.random.default_rng(0)
    sign = np.sign(gaps.mean())
    quick = IntervalSettings(resamples=999)
    for size in SIZES:
        if size > len(gaps):
            break
        chosen = np.stack([rng.permutation(len(gaps))[:size] for _ in range(draws)])
        low, high = bound_means(gaps[chosen], quick)
        found = (low > 0) if sign > 0 else (high < 0)
        if found.mean() >= POWER:
            return size
    return math.inf


def describe_sign(difference: Difference) -> str:
    """Whether the interval leaves out zero."""
    if difference.sign == 0:
        return "no"
    return "yes, the first is closer" if difference.sign > 0 else "yes, the second is closer"


def format_limits(low: float | None, high: float | None) -> str:
    """`[58.2, 58.9]`; empty without limits."""
    if low is None or high is None:
        return ""
    return f"[{low:.2f}, {high:.2f}]"


def format_interval(interval: Interval | None) -> str:
    """`[+0.61, +0.79]`; empty without an interval."""
    return "" if interval is None else f"[{interval.low:+.3f}, {interval.high:+.3f}]"


def format_number(value: float | None) -> str:
    """With two decimals; `identical` for an infinite PSNR, empty where nothing was measured."""
    if value is None:
        return ""
    return "identical" if math.isinf(value) else f"{value:.2f}"


def format_needed(count: float) -> str:
    """A number of prompts, rounded up; a dash for more than ten thousand."""
    return f"{math.ceil(count)}" if count <= 10_000 else "–"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table of Markdown."""
    if not rows:
        return
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    print()


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV; nothing without rows."""
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
