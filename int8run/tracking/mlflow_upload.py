"""Send a record to an MLflow run, and bring its files back.

Each step may be repeated, and so may all of them after an interruption: nothing is logged twice. Called by
`MlflowTracker`; `mlflow_payload` decides what is sent.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL.Image import Image

from int8run.tracking import mlflow_payload
from int8run.tracking.mlflow_payload import to_milliseconds
from int8run.tracking.retry import with_retries
from int8run.tracking.run_record import RUNNING, Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import FileInfo, Run

T = TypeVar("T")

SMALL_COPY_PX = 256  # longest side of MLflow's small copies
# folders of a run -> those of the output folder
DOWNLOADED_FOLDERS = {mlflow_payload.SAMPLES: "images", mlflow_payload.INPUTS: mlflow_payload.INPUTS}
METRICS_PER_CALL, ITEMS_PER_CALL = 1000, 100  # MLflow's limits


# -- runs ----------------------------------------------------------------------------------------------------


def create_run(client: "MlflowClient", experiment_id: str, record: Record) -> str:
    """Open a run for a job that starts.

    Returns:
        Its id.
    """
    start = to_milliseconds(record.started)
    tags = mlflow_payload.build_start_tags(record)
    run = with_retries(client.create_run, experiment_id, start, tags, mlflow_payload.name_run(record))
    log_params(client, run, record)
    run_id: str = run.info.run_id
    return run_id


def find_or_create_run(
    client: "MlflowClient", experiment_id: str, record: Record, run_id: str | None
) -> "Run":
    """The run of a record: the one that it names, else one that an interrupted upload left, else a new one.

    Args:
        client: of the store.
        experiment_id: that the run belongs to.
        record: of the job.
        run_id: the run that the record names in this store.
    """
    if run_id is not None:
        named = find_run(client, experiment_id, run_id)
        if named is not None:
            return named
    condition = mlflow_payload.build_tag_filter("record", mlflow_payload.identify_record(record))
    known = client.search_runs([experiment_id], condition)
    if known:
        return known[0]
    return client.get_run(create_run(client, experiment_id, record))


def find_run(client: "MlflowClient", experiment_id: str, run_id: str) -> "Run | None":
    """An active run of the experiment; None when it is unknown, deleted or belongs to another one."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    is_ours = run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment_id
    return run if is_ours else None


def upload_record(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log everything that the folder holds.

    The run ends last, so that a finished run is complete.
    """
    steps = (
        log_params,
        log_metrics,
        log_files,
        log_images,
        log_tables,
        log_prompts,
        log_tags,
        end_run,
    )
    for step in steps:
        with_retries(step, client, run, record)


def end_run(client: "MlflowClient", run: "Run", record: Record) -> None:
    """End the run as the record ended, at that time."""
    if record.state == RUNNING:
        return
    ended = record.ended or get_last_write_time(record.folder)
    client.set_terminated(run.info.run_id, record.state, to_milliseconds(ended))


def get_last_write_time(folder: Path) -> float:
    """When a job that was killed last wrote a file, as Unix time in seconds."""
    return max(path.stat().st_mtime for path in folder.iterdir())


# -- what a run holds ----------------------------------------------------------------------------------------


def log_params(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log the params that the run does not have: MLflow refuses to change one."""
    from mlflow.entities import Param

    params = mlflow_payload.build_params(record)
    missing = [Param(name, value) for name, value in params.items() if name not in run.data.params]
    for batch in split_batches(missing, ITEMS_PER_CALL):
        client.log_batch(run.info.run_id, params=batch)


def log_metrics(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log all metrics: the store recognizes those that it has by their times."""
    for batch in split_batches(mlflow_payload.build_metrics(record), METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics=batch)


def log_files(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log files as they are, in place of those of the same name."""
    for path, folder in mlflow_payload.list_artifacts(record):
        client.log_artifact(run.info.run_id, str(path), folder)


def log_images(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log the images for the image grid, at step 0, where its charts begin.

    Those that the run has are skipped: MLflow would keep both.
    """
    files = mlflow_payload.find_image_files(record)
    if not files:
        return
    logged_files = client.list_artifacts(run.info.run_id, "images")
    logged = mlflow_payload.find_logged_images(file.path for file in logged_files)
    for key, path in files.items():
        is_complete = key in logged and logged[key] is None
        if is_complete:
            continue
        image = mlflow_payload.open_image(path)
        if image is None:
            continue
        large_copy = logged.get(key)
        if large_copy:
            log_small_copy(client, run, image, large_copy)
        else:
            timestamp = mlflow_payload.get_timestamp(record)
            client.log_image(run.info.run_id, image, key=key, step=0, timestamp=timestamp)


def log_small_copy(client: "MlflowClient", run: "Run", image: Image, large_copy: str) -> None:
    """Complete a `log_image` that was interrupted after its first half.

    Args:
        client: of the store.
        run: that has the large copy.
        image: to shrink.
        large_copy: name of the file that is there, without its ending.
    """
    image.thumbnail((SMALL_COPY_PX, SMALL_COPY_PX))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, large_copy + mlflow_payload.SMALL_COPY_SUFFIX)
        image.save(path)
        client.log_artifact(run.info.run_id, str(path), "images")


def log_tables(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log the layers of the denoiser and of the text encoders."""
    for name, table in mlflow_payload.build_tables(record).items():
        client.log_dict(run.info.run_id, table, name)


def log_prompts(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log the prompts as the run's dataset; the store recognizes one that it has."""
    dataset = mlflow_payload.build_dataset(record)
    if dataset is not None:
        client.log_inputs(run.info.run_id, [dataset])


def log_tags(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Log what is known when a job has ended.

    Another process may have taken this job for killed and written an error: it is removed.
    """
    from mlflow.entities import RunTag

    tables = mlflow_payload.build_tables(record)
    tags = mlflow_payload.build_end_tags(record) | mlflow_payload.build_table_tag(tables)
    new = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
    if new:
        client.log_batch(run.info.run_id, tags=new)
    if "error" in run.data.tags and not mlflow_payload.has_failed(record):
        client.delete_tag(run.info.run_id, "error")


# -- the way back --------------------------------------------------------------------------------------------


def download_files(client: "MlflowClient", run_id: str, folder: Path) -> None:
    """Download the files of `log_files` to where they were in the output folder.

    Args:
        client: of the store.
        run_id: of the run.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for artifact in client.list_artifacts(run_id):
            name = Path(artifact.path).name
            if is_kept_file(artifact):
                Path(client.download_artifacts(run_id, name, temporary)).replace(folder / name)
            elif artifact.is_dir and artifact.path in DOWNLOADED_FOLDERS:
                files = Path(client.download_artifacts(run_id, artifact.path, temporary))
                move_files(files, folder / DOWNLOADED_FOLDERS[artifact.path])


def is_kept_file(artifact: "FileInfo") -> bool:
    """Whether a file of a run is one of `log_files`, and no table that was made for MLflow's page."""
    path = Path(artifact.path)
    is_ours = path.suffix in mlflow_payload.KEPT_SUFFIXES and path.name not in mlflow_payload.TABLE_FILES
    return is_ours and not artifact.is_dir


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another one, which is made where it is missing."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        path.replace(target / path.name)


def split_batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """A sequence in lists of at most `size`."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
