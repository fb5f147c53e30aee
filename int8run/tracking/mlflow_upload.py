"""Bring a record into an MLflow run. Each step may be repeated, and so may all of them after an interruption."""

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
    from mlflow.entities import Run

T = TypeVar("T")
SMALL_COPY_PX = 256  # longest side of MLflow's small copies
METRICS_PER_CALL, ITEMS_PER_CALL = 1000, 100  # MLflow's limits of one call


def create_run(client: "MlflowClient", experiment_id: str, record: Record) -> str:
    """A new run of a job that starts."""
    tags = mlflow_payload.build_start_tags(record)
    run = with_retries(
        lambda: client.create_run(experiment_id, to_milliseconds(record.started), tags, record.label)
    )
    log_params(client, run, record)
    return run.info.run_id


def find_or_create_run(
    client: "MlflowClient", experiment_id: str, record: Record, run_id: str | None
) -> "Run":
    """The run of a record: the one that it names, else one that an interrupted upload left, else a new one."""
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment_id:
                return run
    known = client.search_runs([experiment_id], f"tags.record = '{mlflow_payload.identify_record(record)}'")
    return known[0] if known else client.get_run(create_run(client, experiment_id, record))


def upload_record(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Everything that the folder holds, and the end of the run last: a finished run is whole."""
    steps = (log_params, log_metrics, log_files, log_images, log_tables, log_prompts, log_tags, end_run)
    for step in steps:
        with_retries(step, client, run, record)


def log_params(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Those that the run does not have."""
    from mlflow.entities import Param

    missing = [
        Param(name, value)
        for name, value in mlflow_payload.build_params(record).items()
        if name not in run.data.params
    ]
    for some in split_batches(missing, ITEMS_PER_CALL):
        client.log_batch(run.info.run_id, params=some)


def log_metrics(client: "MlflowClient", run: "Run", record: Record) -> None:
    """All of them: the store knows those that it has by their times."""
    for some in split_batches(mlflow_payload.build_metrics(record), METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics=some)


def log_files(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Files as they are, over those of the same name."""
    for path, folder in mlflow_payload.list_artifacts(record):
        client.log_artifact(run.info.run_id, str(path), folder)


def log_images(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Pictures for the image grid, at step 0, where its cards begin; not those that it has: MLflow would keep both."""
    wanted = mlflow_payload.find_image_files(record)
    there = (
        mlflow_payload.find_logged_images(
            file.path for file in client.list_artifacts(run.info.run_id, "images")
        )
        if wanted
        else {}
    )
    for key, path in wanted.items():
        large = there.get(key, "")
        picture = mlflow_payload.open_image(path) if large is not None else None
        if picture is None:
            continue
        if large:
            log_small_copy(client, run, picture, large)
        else:
            client.log_image(
                run.info.run_id, picture, key=key, step=0, timestamp=mlflow_payload.get_timestamp(record)
            )


def log_small_copy(client: "MlflowClient", run: "Run", picture: Image, large: str) -> None:
    """The second half of `log_image`, which was cut off after the first."""
    picture.thumbnail((SMALL_COPY_PX, SMALL_COPY_PX))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, large + mlflow_payload.SMALL_COPY_SUFFIX)
        picture.save(path)
        client.log_artifact(run.info.run_id, str(path), "images")


def log_tables(client: "MlflowClient", run: "Run", record: Record) -> None:
    """Layers of the denoiser and of the text encoders."""
    tables = mlflow_payload.build_tables(record)
    for name, table in tables.items():
        client.log_dict(run.info.run_id, table, name)


def log_prompts(client: "MlflowClient", run: "Run", record: Record) -> None:
    """The prompts as the run's dataset; the store knows one that it has."""
    dataset = mlflow_payload.build_dataset(record)
    if dataset is not None:
        client.log_inputs(run.info.run_id, [dataset])


def log_tags(client: "MlflowClient", run: "Run", record: Record) -> None:
    """What is known when a job has ended. An error that another process thought of, which saw this one silent, is taken back."""
    from mlflow.entities import RunTag

    tags = mlflow_payload.build_end_tags(record) | mlflow_payload.build_table_tag(
        mlflow_payload.build_tables(record)
    )
    new = {name: value for name, value in tags.items() if run.data.tags.get(name) != value}
    if new:
        client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in new.items()])
    if "error" in run.data.tags and not mlflow_payload.has_failed(record):
        client.delete_tag(run.info.run_id, "error")


def end_run(client: "MlflowClient", run: "Run", record: Record) -> None:
    """The run ends as the record did, at that time."""
    if record.state != RUNNING:
        client.set_terminated(
            run.info.run_id, record.state, to_milliseconds(record.ended or get_last_write_time(record.folder))
        )


def get_last_write_time(folder: Path) -> float:
    """When a job that was killed last wrote a file."""
    return max(path.stat().st_mtime for path in folder.iterdir())


def download_files(client: "MlflowClient", run_id: str, folder: Path) -> None:
    """The files of `log_files`, where they were in the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for file in client.list_artifacts(run_id):
            name = Path(file.path).name
            if (
                not file.is_dir
                and Path(name).suffix in mlflow_payload.KEPT_SUFFIXES
                and name not in mlflow_payload.TABLE_FILES
            ):
                Path(client.download_artifacts(run_id, file.path, place)).replace(folder / name)
        if any(file.is_dir and file.path == "samples" for file in client.list_artifacts(run_id)):
            pictures = Path(client.download_artifacts(run_id, "samples", place))
            (folder / "images").mkdir(exist_ok=True)
            for path in pictures.iterdir():
                path.replace(folder / "images" / path.name)


def split_batches(things: Sequence[T], size: int) -> Iterator[list[T]]:
    """A sequence in lists of at most `size`."""
    for start in range(0, len(things), size):
        yield list(things[start : start + size])
