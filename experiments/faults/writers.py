"""Several processes log into one new SQLite file at once; afterwards every run must be complete.

    python experiments/faults/writers.py [--processes 8] [--runs 20] [--images 6] [--uri URI]

Prints how long a run takes to log (begin and upload), and fails unless all runs are there, each once, with
everything.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from int8run.tracking.mlflow_tracker import MlflowTracker
from int8run.tracking.process_identity import describe_process
from int8run.tracking.run_record import FINISHED, Record, read_record

# what each run has
METRICS, STEPS, LAYERS, SETTINGS = 60, 30, 150, 90
EXPERIMENT = "writers"


def write_job(folder: Path, number: int, n_images: int) -> Record:
    """Write what a run of the tiny model leaves."""
    (folder / "images").mkdir(parents=True)
    results = {
        "metrics": {f"quality/m{i}": i + number / 1000 for i in range(METRICS)},
        "series": {"series/step_ms": [float(step) for step in range(STEPS)]},
        "images": [write_image_pair(folder, index) for index in range(n_images)],
    }
    layers = [f"layer.{i},{40 + i / 7:.4g}\n" for i in range(LAYERS)]
    (folder / "layers.csv").write_text("name,weight_sqnr_db\n" + "".join(layers))
    (folder / "metrics.json").write_text(json.dumps(results))
    (folder / "status.json").write_text(json.dumps(make_status(number)))
    return read_record(folder)


def write_image_pair(folder: Path, index: int) -> dict[str, Any]:
    """Write an image of INT8 and one of the baseline, both noise. Returns their entry of metrics.json."""
    key = f"{index:03d}_noise_s0"
    files = {"file": f"images/{key}.png", "float": f"images/{key}_float.png"}
    for file in files.values():
        Image.effect_noise((64, 64), 50).convert("RGB").save(folder / file)
    return {"key": key, "prompt": f"noise {index}", "seed": 0, **files}


def make_status(number: int) -> dict[str, Any]:
    """The status.json of a finished job."""
    now = time.time()
    return {
        "state": FINISHED,
        "error": None,
        "task": "run",
        "name": f"seed={number}",
        "overrides": [f"seed={number}"],
        "choices": {},
        "params": {f"setting.{i}": str(i) for i in range(SETTINGS)},
        "sweep": EXPERIMENT,
        "number": number,
        "config_hash": f"{number:016x}",
        "build_key": "0" * 16,
        "objective": "quality/m0",
        "started": now - 1,
        "ended": now,
        "jobs_at_once": 1,
        "tracking": None,
        **describe_process(),
    }


def write_runs(arguments: argparse.Namespace, folder: Path, process: int) -> None:
    """The work of one process: prepare the store as a command does, then log its runs."""
    tracker = MlflowTracker(arguments.uri, folder=str(folder), experiment=EXPERIMENT)
    tracker.prepare()
    seconds = []
    for index in range(arguments.runs):
        number = process * arguments.runs + index
        record = write_job(folder / "jobs" / str(number), number, arguments.images)
        began = time.monotonic()
        run_id = tracker.start_run(record)
        tracking = {**tracker.get_location(), "run_id": run_id}
        tracker.upload_record(Record(record.folder, {**record.status, "tracking": tracking}))
        seconds.append(time.monotonic() - began)
    (folder / f"seconds{process}.json").write_text(json.dumps(seconds))


def find_problems(tracker: MlflowTracker, arguments: argparse.Namespace) -> list[str]:
    """What is missing or doubled, a line each."""
    client = MlflowClient(tracker.address)
    expected = {
        "state": FINISHED,
        "params": SETTINGS,
        "metrics": METRICS + 1,
        "inputs": 1,
        "steps": STEPS,
        "images": 2 * arguments.images,
        "files": 2 * arguments.images,
        "table": 6,
    }
    problems = []
    numbers = []
    for run_id in tracker.find_sweep_runs(EXPERIMENT):
        run = client.get_run(run_id)
        number = int(run.data.tags["number"])
        numbers.append(number)
        found = count_contents(client, run)
        if found != expected:
            problems.append(f"run {number}: {found}")
    if sorted(numbers) != list(range(arguments.processes * arguments.runs)):
        problems.append(f"{len(numbers)} runs: {sorted(numbers)}")
    return problems


def count_contents(client: MlflowClient, run: Run) -> dict[str, object]:
    """How much of each thing a run has."""
    run_id = run.info.run_id
    return {
        "state": run.info.status,
        "params": len(run.data.params),
        "metrics": len(run.data.metrics),
        "inputs": len(run.inputs.dataset_inputs),
        "steps": len(client.get_metric_history(run_id, "series/step_ms")),
        "images": len(client.list_artifacts(run_id, "images")),
        "files": len(client.list_artifacts(run_id, "samples")),
        "table": len(client.list_artifacts(run_id)),
    }


def run_writers(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Let all processes write at once, and print how long that took. Returns a line for each that failed."""
    context = multiprocessing.get_context("spawn")
    writers = []
    for process in range(arguments.processes):
        writers.append(context.Process(target=write_runs, args=(arguments, folder, process)))
    began = time.monotonic()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    print_times(folder, arguments.processes, time.monotonic() - began)

    failed = []
    for process, writer in enumerate(writers):
        if writer.exitcode:
            failed.append(f"process {process} ended with {writer.exitcode}")
    return failed


def print_times(folder: Path, n_processes: int, total_s: float) -> None:
    """Print the time of all runs, and of one."""
    seconds = []
    for file in folder.glob("seconds*.json"):
        seconds += json.loads(file.read_text())
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{len(seconds)} runs of {n_processes} processes in {total_s:.0f} s, {machine}")
    if seconds:
        print(f"to log one run: median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s")


def parse_arguments() -> argparse.Namespace:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=20, help="of each process")
    parser.add_argument("--images", type=int, default=6, help="of each run")
    parser.add_argument("--uri", help="another store than a new SQLite file")
    return parser.parse_args()


def main() -> int:
    """Exit code 1 when anything is missing or doubled."""
    arguments = parse_arguments()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        problems = run_writers(arguments, folder)
        tracker = MlflowTracker(arguments.uri, folder=temporary, experiment=EXPERIMENT)
        problems += find_problems(tracker, arguments)
    print("\n".join(problems) or "all complete, each once")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
