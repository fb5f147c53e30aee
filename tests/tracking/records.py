"""Output folders as a job leaves them, without a job, and what MLflow has of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from PIL import Image

from int8run.tracking.mlflow_tracker import MlflowTracker
from int8run.tracking.process_identity import describe_process
from int8run.tracking.run_record import FINISHED, Record, read_record

PROMPTS = ("fox", "red apple")


def make_record(
    folder: Path, number: int = 0, state: str = FINISHED, files: bool = True, **status: Any
) -> Record:
    """A small record.

    Args:
        files: whether the job got as far as to write what it measured.
        status: what is different in status.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "state": state,
        "error": None,
        "task": "run",
        "name": f"lora.strength={number}",
        "overrides": [f"lora.strength={number}"],
        "choices": {"model": "tiny"},
        "params": {"model": "tiny", "prompts": "tiny", "lora.strength": str(number)},
        "sweep": "sweep-a",
        "number": number,
        "config_hash": f"{number:016x}",
        "build_key": "b" * 16,
        "objective": "quality/psnr_db",
        "started": 1790000000.25 + 10 * number,
        "ended": 1790000005.5 + 10 * number,
        "jobs_at_once": 1,
        "tracking": None,
        **describe_process(),
    }
    (folder / "status.json").write_text(json.dumps({**facts, **status}))
    (folder / "config.yaml").write_text(f"prompts:\n  prompts: {list(PROMPTS)}\n")
    (folder / "int8run.log").write_text("a line\n")
    if files:
        write_results(folder)
    return read_record(folder)


def write_results(folder: Path) -> None:
    """Measurements, images, tables."""
    (folder / "images").mkdir(exist_ok=True)
    images = []
    for i, prompt in enumerate(PROMPTS):
        key = f"{i:03d}_{prompt.replace(' ', '-')}_s0"
        names = {"file": f"images/{key}.png", "float": f"images/{key}_float.png"}
        for shade, name in enumerate(names.values()):
            Image.new("RGB", (8, 8), (60 * i, 90 * shade, 200)).save(folder / name)
        images.append({"key": key, "prompt": prompt, "seed": 0, **names})
    Image.new("RGB", (16, 16)).save(folder / "grid.png")
    measured = {
        "metrics": {"quality/psnr_db": "inf", "speed/step_ms_p50": 2.5, "quality/ssim": "nan"},
        "series": {"series/step_ms": [3.0, 2.0], "series/latent_rel_err": [0.0, 0.5, 0.25]},
        "images": images,
    }
    (folder / "metrics.json").write_text(json.dumps(measured))
    (folder / "layers.csv").write_text(
        "name,in_features,quantized,why_not,weight_sqnr_db\na.b,8,true,,41.5\nc,16,false,small,\n"
    )
    (folder / "environment.json").write_text(json.dumps({"git": "8664a31abcde-dirty"}))
    (folder / "system.csv").write_text(
        "time,cpu_percent,gpu_percent\n1790000001.5,50.0,\n1790000002.5,75.0,\n1790000003.5,7"
    )


def with_run_id(record: Record, place: Mapping[str, str], run_id: str) -> Record:
    """The record as a job keeps it once a tracker has opened its run."""
    return Record(
        record.folder, {**record.status, "tracking": {**place, "run_id": run_id, "uploaded": False}}
    )


def make_client(tracker: MlflowTracker) -> mlflow.MlflowClient:
    """A client of the tracker's store."""
    return mlflow.MlflowClient(tracker.address)


def list_runs(tracker: MlflowTracker) -> list[mlflow.entities.Run]:
    """Runs of its experiment, the oldest first."""
    client = make_client(tracker)
    return client.search_runs(
        [client.get_experiment_by_name(tracker.experiment).experiment_id],
        order_by=["attributes.start_time ASC"],
    )


def read_contents(tracker: MlflowTracker, run_id: str) -> dict[str, object]:
    """Everything that a run has, to be compared."""
    client = make_client(tracker)
    run = client.get_run(run_id)
    images = [file.path for file in client.list_artifacts(run_id, "images")]
    histories = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    return {
        "params": run.data.params,
        "history": {
            name: sorted((m.step, m.timestamp, repr(m.value)) for m in values)
            for name, values in histories.items()
        },
        "tags": {
            name: value for name, value in run.data.tags.items() if name not in ("record", "mlflow.runName")
        },
        "images": sorted((name.split("+")[0], Path(name).suffix) for name in images),
        "files": sorted(
            file.path for folder in (None, "samples") for file in client.list_artifacts(run_id, folder)
        ),
        "inputs": [
            (i.dataset.name, i.dataset.digest, [(t.key, t.value) for t in i.tags])
            for i in run.inputs.dataset_inputs
        ],
        "end": (run.info.status, run.info.end_time),
    }
