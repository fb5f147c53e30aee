"""Records of the jobs of a sweep."""

import json
from pathlib import Path

from int8run.tracking.run_record import Record, end_record, start_record

JOB_METRICS = {
    "quality/psnr_db": 55.14,
    "speed/ratio_vs_float": 2.4,
    "speed/step_ms_p50": 7.1,
    "memory/denoiser_bytes": 28e6,
    "quality/latent_rel_err": 0.0093,
}


def write_job(
    folder: Path,
    number: int,
    overrides: str,
    state: str = "FINISHED",
    warnings: tuple[str, ...] = (),
    **metrics: float,
) -> Record:
    """The record of a job that has ended."""
    identity = {
        "task": "run",
        "params": {},
        "choices": {},
        "config_hash": "c",
        "build_key": "b",
        "objective": "quality/psnr_db",
        "sweep": "s",
        "number": number,
        "name": overrides,
        "overrides": overrides.split(),
    }
    started = start_record(folder / str(number), identity)
    (started.folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    error = None if state == "FINISHED" else "broken on purpose"
    return end_record(started, state, error, warnings)
