"""What must be left of a sweep: each job once in its folder, and once and whole in MLflow.

Called by the faults after they did their harm. A check that fails raises LostError with what was found.
"""

from collections.abc import Mapping
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from sandbox import Sandbox, check_that

from int8run.jobs.manifest import read_manifest
from int8run.tracking import mlflow_payload
from int8run.tracking.run_record import FINISHED, KILLED, Record, find_records

EXPERIMENT = "int8run"


def check_states(sandbox: Sandbox, expected: Mapping[int, str]) -> list[Record]:
    """The sweep's folder holds these jobs and no others.

    Args:
        sandbox: the folder above the sweep's.
        expected: the state of each job, by its number.

    Returns:
        the jobs.
    """
    jobs = find_records(sandbox.sweep)
    found = {job.number: job.state for job in jobs}
    each_once = len(jobs) == len(expected)
    check_that(
        each_once and found == dict(expected),
        f"jobs in the folder: {[(job.number, job.state) for job in jobs]}",
    )
    return jobs


def check_all_finished(sandbox: Sandbox, count: int) -> list[Record]:
    """The sweep's folder holds so many jobs, all of them finished."""
    return check_states(sandbox, dict.fromkeys(range(count), FINISHED))


def find_runs(store: str, sweep: str) -> list[Run]:
    """The runs of a sweep in MLflow."""
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    return list(client.search_runs([experiment.experiment_id], f"tags.sweep = '{sweep}'"))


def check_tracked(sandbox: Sandbox, store: str, killed: int = 0) -> None:
    """MLflow has each job of the folder once and whole, and besides them so many runs that were KILLED."""
    sweep = read_manifest(sandbox.sweep)
    assert sweep is not None
    jobs = find_records(sandbox.sweep)
    runs = {run.info.run_id: run for run in find_runs(store, sweep.id)}
    job_run_ids = {job.run_id for job in jobs}

    check_that(len({job.config_hash for job in jobs}) == len(jobs), "two folders hold the same job")
    all_known = job_run_ids <= set(runs)
    all_uploaded = all(job.uploaded for job in jobs)
    check_that(all_known and all_uploaded, "a job of the folder is not in MLflow")
    others = [run.info.status for run_id, run in runs.items() if run_id not in job_run_ids]
    check_that(others == [KILLED] * killed, f"other runs in MLflow: {others}")

    client = MlflowClient(store)
    for job in jobs:
        check_whole(client, runs[str(job.run_id)], job)
    finding = f"MLflow: {len(jobs)} whole, each once"
    if killed:
        finding += f", and {killed} KILLED"
    sandbox.findings.append(finding)


def check_whole(client: MlflowClient, run: Run, job: Record) -> None:
    """A run of MLflow has everything that the job's folder has."""
    name = f"{job.name}: "
    check_that(run.info.status == job.state, f"{name}{run.info.status} in MLflow, {job.state} in the folder")
    settings = mlflow_payload.build_params(job)
    check_that(settings.items() <= run.data.params.items(), f"{name}settings are missing")
    check_values(client, run, job)
    check_files(client, run, job)
    if job.state != FINISHED:
        error = run.data.tags["error"]
        check_that(job.error in error, f"{name}MLflow says {error!r}, the folder {job.error!r}")


def check_values(client: MlflowClient, run: Run, job: Record) -> None:
    """A run of MLflow has each metric, and each value of each series."""
    expected = {mlflow_payload.sanitize_name(key) for key in [*job.metrics, *job.series]}
    missing = expected - set(run.data.metrics)
    check_that(not missing, f"{job.name}: metrics are missing: {missing}")
    for key, values in job.series.items():
        history = client.get_metric_history(run.info.run_id, key)
        check_that(len(history) == len(values), f"{job.name}: {key} has not {len(values)} values")


def check_files(client: MlflowClient, run: Run, job: Record) -> None:
    """A run of MLflow has each image, as a file and in the grid of images, and each other file."""
    name = f"{job.name}: "
    run_id = run.info.run_id

    in_folder = sorted(path.name for path in (job.folder / "images").glob("*"))
    in_mlflow = []
    if in_folder:
        in_mlflow = sorted(Path(file.path).name for file in client.list_artifacts(run_id, "samples"))
    check_that(in_folder == in_mlflow, f"{name}images in the folder {in_folder}, in MLflow {in_mlflow}")

    n_shown = len(client.list_artifacts(run_id, "images")) if job.images else 0
    n_expected = 2 * len(mlflow_payload.find_image_files(job))
    check_that(n_shown == n_expected, f"{name}{n_shown} files in the grid of images")

    expected_files = {path.name for path, folder in mlflow_payload.list_artifacts(job) if folder is None}
    files = {Path(file.path).name for file in client.list_artifacts(run_id)}
    check_that(expected_files <= files, f"{name}files are missing: {files}")


def find_processes(sandbox: Sandbox) -> list[psutil.Process]:
    """Processes that still work in the sandbox's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(sandbox.folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended meanwhile, or belongs to another user
            continue
    return found
