r"""What each step cache skips, and what of the loss is INT8's and what its own, on the tiny model.

    python experiments/step_caches/measure.py --out experiments/step_caches/results
    python experiments/step_caches/measure.py --prompts banana owl --caches first_block --out out

A sweep for each cache, so that the model is built once for all its jobs; the table comes out at the end.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# of each cache the setting that is varied, from careful to bold, and others that it is varied with
GRIDS: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "first_block": ("threshold", ("0.03", "0.05", "0.1", "0.2"), ()),
    "seacache": ("threshold", ("0.1", "0.25", "0.5"), ("cache_steps.power=2",)),
    "magcache": ("threshold", ("0.03", "0.06", "0.2"), ()),
    "taylorseer": ("interval", ("2", "3", "5"), ()),
    "pab": ("spatial", ("2", "3"), ()),
    "fastercache": ("interval", ("2", "3"), ()),
}
COLUMNS = {
    "cache": "cache_steps=",
    "speed/steps_skipped_share": "steps skipped",
    "cache/macs_skipped_share": "multiply-adds saved",
    "cache/int8_psnr_db": "INT8 alone, dB",
    "cache/psnr_to_int8_db": "the cache alone, dB",
    "quality/psnr_db": "both, dB",
    "cache/float_psnr_db": "float + cache, dB",
    "cache/int8_ratio": "INT8 alone, ×",
    "cache/ratio_vs_int8": "the cache alone, ×",
    "speed/ratio_vs_float": "both, ×",
    "cache/float_ratio": "float + cache, ×",
}
SHARES = ("speed/steps_skipped_share", "cache/macs_skipped_share")


def run_sweep(cache: str, words: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Run a cache with each value of its setting; its rows.

    Args:
        cache: the option of `cache_steps=`.
        words: further settings of all jobs.
        out: folder of the sweep.
    """
    setting, values, others = GRIDS[cache]
    command = [
        *(sys.executable, "-m", "int8run", "-m", f"cache_steps={cache}", "cache_steps.models=both"),
        f"cache_steps.{setting}={','.join(values)}",
        *others,
        *("tracker=none", "progress=false", f"hydra.sweep.dir={out}"),
        *words,
    ]
    subprocess.run(command, check=True)
    rows = []
    for number, value in enumerate(values):
        metrics = json.loads((out / str(number) / "metrics.json").read_text())["metrics"]
        rows.append({**metrics, "cache": f"{cache} {setting}={value}"})
    return rows


def write_table(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the rows as CSV."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(COLUMNS), extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(format_cell(name, row.get(name)) for name in COLUMNS) + " |")
    return "\n".join(lines)


def format_cell(name: str, value: Any) -> str:
    """A number of the table: shares in percent, the others with one or two decimals."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return f"`{value}`"
    if name in SHARES:
        return f"{100 * value:.0f} %"
    return f"{value:.1f}" if name.endswith("_db") else f"{value:.2f}"


def main() -> None:
    """Measure, write `step_caches.csv`, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--caches", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--prompts", nargs="+", help="in place of the default ones")
    parser.add_argument("--words", nargs="*", default=[], help="further settings of int8run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table and of the sweeps")
    options = parser.parse_args()
    words = list(options.words)
    if options.prompts:
        words.append(f"prompts.prompts=[{','.join(options.prompts)}]")
    rows = []
    for cache in options.caches:
        rows += run_sweep(cache, words, options.out / "sweeps" / cache)
    write_table(rows, options.out / "step_caches.csv")
    print(format_table(rows))


if __name__ == "__main__":
    main()
