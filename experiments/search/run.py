"""A search of the tiny model: its front with and without each ingredient, its cost, its recipe reproduced.

    python experiments/search/run.py [OVERRIDE ...] [--trials 36] [--out experiments/search]

Runs `int8run task=search` once, with at most that many runs and two to confirm, then the recipe it found.
Writes front.png, front.csv and summary.json; `--work FOLDER` keeps the folder of the search itself.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from int8run.search.front import find_front
from int8run.search.trials import Trial, describe_differences
from int8run.tracking.run_record import Record, find_records

# with the backend named, no layer is chosen by a time, so that the recipe makes the same images again
OVERRIDES = ["quality_db=40", "tracker=none", "backend=cpu", "int8.only_if_faster=false"]
OVERRIDES += ["task.space.rounding=null", "task.space.kept.choices.fewest_bits=null"]
COLUMNS = ("trial", "recipe", "reason", "state", "psnr_db", "predicted_db", "ms", "predicted_ms", "mb")
RUN = [sys.executable, "-m", "int8run.cli"]


def run_search(folder: Path, overrides: Sequence[str], trials: int) -> dict[str, Any]:
    """Search, and return what search.json holds. A quality that nothing meets is a result, too."""
    words = ["task=search", *overrides, f"task.n_trials={trials}", "hydra.run.dir=search"]
    print("int8run", " ".join(words), flush=True)
    ended = subprocess.run([*RUN, *words], cwd=folder, check=False)
    if ended.returncode not in (0, 2):
        sys.exit(f"the search ended with {ended.returncode}")
    facts: dict[str, Any] = json.loads((folder / "search" / "search.json").read_text(encoding="utf-8"))
    return facts


def reproduce(folder: Path, overrides: Sequence[str], confirmed: int) -> str:
    """Run the recipe by itself; how many of its images are those of the search's confirmation, bit by bit.

    Args:
        folder: that the search ran in.
        overrides: of the search.
        confirmed: number of the run that confirmed the winner.
    """
    judging = [word for word in overrides if not word.startswith(("task", "quality_db"))]
    words = ["recipe=search/recipe.yaml", *judging, "hydra.run.dir=again"]
    print("int8run", " ".join(words), flush=True)
    subprocess.run([*RUN, *words], cwd=folder, check=True)
    (record,) = find_records(folder / "again")
    earlier = folder / "search" / "trials" / str(confirmed)
    files = [sample["file"] for sample in record.images]
    equal = sum(read_pixels(earlier / file) == read_pixels(record.folder / file) for file in files)
    return f"{equal} of {len(files)}"


def read_pixels(path: Path) -> bytes:
    """The pixels of an image, without what is written beside them."""
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def make_fronts(trials: Sequence[Trial], base: Mapping[str, Any]) -> dict[str, list[Trial]]:
    """The front of all trials, and that of those without each ingredient, by name."""
    fronts = {"everything": find_front(trials, "seconds")}
    for name, value in base.items():
        without = [trial for trial in trials if trial.params.get(name) == value]
        fronts[f"without {name}"] = find_front(without, "seconds")
    return fronts


def draw(fronts: Mapping[str, Sequence[Trial]], trials: Sequence[Trial], path: Path) -> None:
    """Quality against time per image: a dot for each trial, a step line for each front."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    measured = [trial.measured for trial in trials if trial.measured is not None]
    axes.plot(
        [1e3 * one.seconds for one in measured], [one.quality_db for one in measured], "o", color="0.75"
    )
    for number, (name, front) in enumerate(fronts.items()):
        points = [(1e3 * t.measured.seconds, t.measured.quality_db) for t in front if t.measured is not None]
        axes.step(
            [x for x, _ in points],
            [y for _, y in points],
            where="post",
            marker=".",
            linewidth=2.5 if number == 0 else 1.2,
            linestyle="-" if number == 0 else "--",
            label=name,
        )
    axes.set_xlabel("time per image, ms")
    axes.set_ylabel("PSNR to the float model with all its steps, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def write_table(trials: Sequence[Trial], base: Mapping[str, Any], path: Path) -> None:
    """A row for each trial: recipe, measured and predicted numbers."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for trial in trials:
            row: dict[str, object] = {
                "trial": trial.number,
                "recipe": describe_differences(trial.params, base),
                "reason": trial.reason,
                "state": trial.state,
            }
            if trial.measured is not None:
                row["psnr_db"] = f"{trial.measured.quality_db:.3f}"
                row["ms"] = f"{1e3 * trial.measured.seconds:.2f}"
                row["mb"] = f"{trial.measured.bytes / 1e6:.2f}"
            if trial.predicted is not None:
                row["predicted_db"] = f"{trial.predicted.quality_db:.3f}"
                row["predicted_ms"] = f"{1e3 * trial.predicted.seconds:.2f}"
            writer.writerow(row)


def summarize(facts: Mapping[str, Any], records: Sequence[Record], reproduced: str) -> dict[str, object]:
    """What the search found and cost, and whether its recipe makes the same images by itself."""
    ended = [record for record in records if record.ended is not None]
    seconds = [float(record.ended or 0) - record.started for record in ended]
    confirmed = facts["confirmed"]["psnrs_db"] if facts["confirmed"] else []
    return {
        "winner": facts["winner"],
        "is_met": facts["is_met"],
        "runs": len(records),
        "failed": facts["failed"],
        "seconds_of_all_runs": round(sum(seconds), 1),
        "seconds_of_a_run": round(statistics.median(seconds), 2),
        "predictions": facts["predictions"],
        "confirmed_db": statistics.fmean(confirmed) if confirmed else None,
        "identical_images": reproduced,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help=f"of the search; default: {' '.join(OVERRIDES)}")
    parser.add_argument("--trials", type=int, default=36)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--work", type=Path, help="folder of the search; default: one that is removed")
    arguments = parser.parse_args()
    overrides = arguments.overrides or OVERRIDES
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        facts = run_search(work, overrides, arguments.trials)
        reproduced = reproduce(work, overrides, len(facts["trials"]))
        records = find_records(work / "search" / "trials")
        trials = [Trial.from_json(trial) for trial in facts["trials"]]
    base = trials[0].params
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(make_fronts(trials, base), trials, arguments.out / "front.png")
    write_table(trials, base, arguments.out / "front.csv")
    summary = summarize(facts, records, reproduced)
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
