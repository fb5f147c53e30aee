"""Several processes log into one new SQLite file at once; afterwards every run must be complete.

    python experiments/faults/writers.py [--processes 8] [--runs 20] [--pictures 6] [--uri URI]

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

from PIL import Image

from int8run.tracking.mlflow_tracker import MlflowTracker
from int8run.tracking.process_identity import describe_process
from int8run.tracking.run_record import FINISHED, Record, read_record

METRICS, STEPS, LAYERS = 60, 30, 150


def write_job(folder: Path, number: int, pictures: int) -> Record:
    """What a run of the tiny model leaves."""
    (folder / "images").mkdir(parents=True)
    images = []
    for n in range(pictures):
        names = {
            name: f"images/{n:03d}_noise_s0{tail}.png" for name, tail in (("file", ""), ("float", "_float"))
        }
        for name in names.values():
            Image.effect_noise((64, 64), 50).convert("RGB").save(folder / name)
        images.append({"key": f"{n:03d}_noise_s0", "prompt": f"noise {n}", "seed": 0, **names})
    values = {
        "metrics": {f"quality/m{i}": i + number / 1000 for i in range(METRICS)},
        "series": {"series/step_ms": [float(i) for i in range(STEPS)]},
        "images": images,
    }
    now = time.time()
    status = {
        "state": FINISHED,
        "error": None,
        "task": "run",
        "name": f"seed={number}",
        "overrides": [f"seed={number}"],
        "choices": {},
        "params": {f"setting.{i}": str(i) for i in range(90)},
        "sweep": "writers",
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
    (folder / "layers.csv").write_text(
        "name,weight_sqnr_db\n" + "".join(f"layer.{i},{40 + i / 7:.4g}\n" for i in range(LAYERS))
    )
    (folder / "metrics.json").write_text(json.dumps(values))
    (folder / "status.json").write_text(json.dumps(status))
    return read_record(folder)


def write_runs(arguments: argparse.Namespace, folder: Path, process: int) -> None:
    """One process: prepares the store as a command does, then logs its runs."""
    tracker = MlflowTracker(arguments.uri, folder=str(folder), experiment="writers")
    tracker.prepare()
    seconds = []
    for n in range(arguments.runs):
        number = process * arguments.runs + n
        record = write_job(folder / "jobs" / str(number), number, arguments.pictures)
        begun = time.monotonic()
        run_id = tracker.start_run(record)
        tracker.upload_record(
            Record(record.folder, {**record.status, "tracking": {**tracker.get_location(), "run_id": run_id}})
        )
        seconds.append(time.monotonic() - begun)
    (folder / f"seconds{process}.json").write_text(json.dumps(seconds))


def find_problems(tracker: MlflowTracker, arguments: argparse.Namespace) -> list[str]:
    """What is missing or doubled."""
    from mlflow import MlflowClient

    client = MlflowClient(tracker.address)
    wrong = []
    numbers = []
    for run_id in tracker.find_sweep_runs("writers"):
        run = client.get_run(run_id)
        numbers.append(int(run.data.tags["number"]))
        found = {
            "state": run.info.status,
            "params": len(run.data.params),
            "metrics": len(run.data.metrics),
            "inputs": len(run.inputs.dataset_inputs),
            "steps": len(client.get_metric_history(run_id, "series/step_ms")),
            "pictures": len(client.list_artifacts(run_id, "images")),
            "files": len(client.list_artifacts(run_id, "samples")),
            "table": len(client.list_artifacts(run_id)),
        }
        wanted = {
            "state": FINISHED,
            "params": 90,
            "metrics": METRICS + 1,
            "inputs": 1,
            "steps": STEPS,
            "pictures": 2 * arguments.pictures,
            "files": 2 * arguments.pictures,
            "table": 6,
        }
        if found != wanted:
            wrong.append(f"run {numbers[-1]}: {found}")
    if sorted(numbers) != list(range(arguments.processes * arguments.runs)):
        wrong.append(f"{len(numbers)} runs: {sorted(numbers)}")
    return wrong


def main() -> int:
    """Exit code 1 when anything is missing or doubled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=20, help="of each process")
    parser.add_argument("--pictures", type=int, default=6, help="of each run")
    parser.add_argument("--uri", help="another store than a new SQLite file")
    arguments = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=write_runs, args=(arguments, folder, i))
            for i in range(arguments.processes)
        ]
        begun = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = time.monotonic() - begun
        seconds = sorted(s for path in folder.glob("seconds*.json") for s in json.loads(path.read_text()))
        machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{len(seconds)} runs of {arguments.processes} processes in {took:.0f} s, {machine}")
        if seconds:
            print(f"to log one run: median {statistics.median(seconds):.2f} s, slowest {seconds[-1]:.2f} s")
        wrong = [f"process {i} ended with {w.exitcode}" for i, w in enumerate(workers) if w.exitcode]
        wrong += find_problems(MlflowTracker(arguments.uri, folder=place, experiment="writers"), arguments)
    print("\n".join(wrong) or "all complete, each once")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
