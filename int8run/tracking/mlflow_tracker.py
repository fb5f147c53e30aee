"""MLflow: SQLite in the working folder, or the server that the user names. This folder is the only place that imports mlflow.

Everything goes through a client. The fluent functions would be shorter, but they keep the address in the process and export it to the
environment, where the next job of a sweep would find it. mlflow takes two seconds and 125 MB to import, so it is imported by a run and not
by its settings: task=quantize has no use for it.
"""

import logging
import re
import shlex
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from int8run.errors import ConfigError
from int8run.tracking import mlflow_payload, mlflow_upload
from int8run.tracking.mlflow_dashboard import (
    build_view_link,
    build_view_state,
    find_varying_params,
    write_view,
)
from int8run.tracking.mlflow_payload import MAX_ERROR_LENGTH, to_milliseconds, truncate
from int8run.tracking.retry import ping, translate_errors, with_retries
from int8run.tracking.run_record import (
    KILLED,
    KILLED_MESSAGE,
    RUNNING,
    Record,
    describe_process,
    is_process_gone,
    read_record,
    remove_login,
    update_record,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
SQLITE_PREFIX = "sqlite:///"
LOCAL_SERVER = "http://127.0.0.1:5000"  # of `mlflow server`
LOCK_TIMEOUT_S = 120  # how long another command may take to make the same database


@dataclass(frozen=True)
class MlflowTracker:
    """One flat run per job.

    Args:
        uri: tracking server or database; None: `<folder>/mlflow.db`.
        experiment: name of the experiment.
        folder: where the database and the artifacts go when `uri` is None; taken as an absolute path.
    """

    uri: str | None = None
    experiment: str = "int8run"
    folder: str = "."

    @property
    def address(self) -> str:
        """The tracking URI; that of a file is absolute."""
        uri = self.uri or f"{SQLITE_PREFIX}{Path(self.folder) / 'mlflow.db'}"
        return (
            f"{SQLITE_PREFIX}{Path(uri.removeprefix(SQLITE_PREFIX)).absolute()}"
            if uri.startswith(SQLITE_PREFIX)
            else uri
        )

    @property
    def store(self) -> str:
        """The tracking URI without a password, for people and records."""
        return remove_login(self.address)

    @property
    def database(self) -> Path | None:
        """The SQLite file, when there is one."""
        return (
            Path(self.address.removeprefix(SQLITE_PREFIX).partition("?")[0])
            if self.address.startswith(SQLITE_PREFIX)
            else None
        )

    @property
    def is_server(self) -> bool:
        """Whether a server is asked over HTTP."""
        return self.address.startswith(("http://", "https://"))

    def get_location(self) -> dict[str, str]:
        """Store and experiment."""
        return {"store": self.store, "experiment": self.experiment}

    def prepare(self) -> None:
        """Create database and experiment where they are missing; runs of this machine whose process is gone become KILLED.

        Raises:
            ConfigError: the experiment was deleted, or the address can never work.
            TrackingError: no answer.
        """
        with self.opened(user=True) as (client, experiment_id):
            host = describe_process()["host"]
            for run in search_runs(
                client, experiment_id, f"attributes.status = 'RUNNING' and tags.host = '{host}'"
            ):
                pid, started = (run.data.tags.get(name) for name in ("pid", "process_started"))
                if pid and started and is_process_gone(host, int(pid), float(started)):
                    close_run(client, run, KILLED, KILLED_MESSAGE)

    def start_run(self, record: Record) -> str:
        """A new run with the settings of a job."""
        with self.opened() as (client, experiment_id):
            return mlflow_upload.create_run(client, experiment_id, record)

    def upload_record(self, record: Record) -> str:
        """Params, metrics, pictures, tables, prompts and files of the record; then the run ends."""
        known = record.run_id if {**record.tracking, **self.get_location()} == dict(record.tracking) else None
        with self.opened() as (client, experiment_id):
            run = mlflow_upload.find_or_create_run(client, experiment_id, record, known)
            mlflow_upload.upload_record(client, run, record)
            return run.info.run_id

    def find_finished(self, hashes: Iterable[str]) -> dict[str, str]:
        """The newest run of each config that has one."""
        with self.opened() as (client, experiment_id):
            runs = {
                digest: search_runs(
                    client, experiment_id, f"attributes.status = 'FINISHED' and tags.config_hash = '{digest}'"
                )
                for digest in hashes
            }
        return {digest: known[-1].info.run_id for digest, known in runs.items() if known}

    def find_running(self, sweep: str) -> dict[str, int]:
        """Open runs."""
        with self.opened() as (client, experiment_id):
            runs = search_runs(
                client, experiment_id, f"attributes.status = 'RUNNING' and tags.sweep = '{sweep}'"
            )
        return {run.info.run_id: int(run.data.tags.get("number", 0)) for run in runs}

    def end_run(self, run_id: str, state: str, error: str) -> None:
        """End a run that is still open."""
        with self.opened() as (client, _):
            run = client.get_run(run_id)
            if run.info.status == RUNNING:
                close_run(client, run, state, error)

    def find_sweep_runs(self, sweep: str) -> list[str]:
        """The oldest first."""
        with self.opened() as (client, experiment_id):
            return [run.info.run_id for run in search_runs(client, experiment_id, f"tags.sweep = '{sweep}'")]

    def download_run(self, run_id: str, folder: Path) -> None:
        """The files, and a record that knows its run."""
        with self.opened() as (client, _):
            mlflow_upload.download_files(client, run_id, folder)
        update_record(
            read_record(folder), tracking={**self.get_location(), "run_id": run_id, "uploaded": True}
        )

    def share_sweep(self, sweep: str, records: Sequence[Record]) -> str | None:
        """Write the sweep's view into the experiment."""
        keys = dict.fromkeys(key for record in records for key in mlflow_payload.find_image_files(record))
        names = dict.fromkeys(name for record in records for name in [*record.metrics, *record.series])
        state = build_view_state(
            find_varying_params(record.params for record in records), names, list(keys), sweep
        )
        with self.opened() as (client, experiment_id):
            left_out = with_retries(write_view, client, experiment_id, sweep, state)
        if left_out:
            log.info(
                "the dashboard's grid has room for %d of %d pictures of each run",
                len(keys) - left_out,
                len(keys),
            )
        link = build_view_link(self.store if self.is_server else LOCAL_SERVER, experiment_id, sweep)
        return link if self.is_server else f"{self.get_view_hint()}\n          then open {link}"

    def attach_file(self, run_id: str, path: Path) -> None:
        """An artifact."""
        with self.opened() as (client, _):
            with_retries(client.log_artifact, run_id, str(path))

    def get_view_hint(self) -> str | None:
        """The server's address, or the command that serves the database."""
        return (
            self.store if self.is_server else f"mlflow server --backend-store-uri {shlex.quote(self.store)}"
        )

    @contextmanager
    def opened(self, user: bool = False) -> Iterator[tuple["MlflowClient", str]]:
        """A client and the experiment's id, both made where they are missing. The block's errors become ours.

        Args:
            user: see `answering`.
        """
        with translate_errors(self.store, user):
            self.check()
            if self.is_server:
                ping(self.address)
            with self.alone():
                client, experiment_id = self.connect()
            yield client, experiment_id

    def check(self) -> None:
        """Refuse addresses that keep nothing.

        Raises:
            ConfigError: naming what is wrong with it.
        """
        if self.address.startswith("file:") or (
            "://" not in self.address and not self.address.startswith("databricks")
        ):
            raise ConfigError(
                f"tracker.uri={self.store} is a folder, in which MLflow keeps no runs any more; choose {SQLITE_PREFIX}/absolute/path/mlflow.db, "
                "http://HOST:PORT, or null: mlflow.db in tracker.folder"
            )
        if self.address in ("sqlite://", SQLITE_PREFIX) or ":memory:" in self.address:
            raise ConfigError(
                f"tracker.uri={self.store} keeps its runs in memory, and they end with the command; choose sqlite:////path/mlflow.db"
            )
        if self.uri is None and set("%?") & set(self.address):
            raise ConfigError(
                f"{self.database} has % or ? in its path, which MLflow takes for signs of its own; run in another folder, or set "
                "tracker.folder=FOLDER"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out while a database is opened: two that make its tables at once destroy it."""
        from filelock import FileLock

        if self.database is None:
            yield
            return
        self.database.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{self.database}.lock")
        lock.touch()  # where nothing can be written FileLock would wait for nobody
        with FileLock(lock, timeout=LOCK_TIMEOUT_S, poll_interval=0.01):
            yield

    def connect(self) -> tuple["MlflowClient", str]:
        """See `opened`."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        new = self.database is not None and not self.database.exists()
        client = MlflowClient(self.address)
        experiment = client.get_experiment_by_name(self.experiment)
        if new:
            # readers and writers at once: without it a second writer waits seconds; the mode stays in the file
            with closing(sqlite3.connect(str(self.database))) as connection:
                connection.execute("pragma journal_mode=WAL")
        if experiment is None:
            try:
                # without the tag the page opens on its view for language models, where no metric column exists
                tags = {"mlflow.experimentKind": "custom_model_development"}
                return client, client.create_experiment(self.experiment, self.artifacts, tags)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(self.experiment)  # another command was faster
        if experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"the MLflow experiment {self.experiment!r} is deleted; restore it or set tracker.experiment=<new name>"
            )
        return client, experiment.experiment_id

    @property
    def artifacts(self) -> str | None:
        """Where files go: beside a database, else where the server says."""
        if self.is_server:
            return None
        beside = self.database.parent if self.database else Path(self.folder).absolute()
        return (beside / "mlartifacts" / re.sub(r"[^\w. -]", "_", self.experiment)).as_uri()


def search_runs(client: "MlflowClient", experiment_id: str, condition: str) -> list["Run"]:
    """Runs of an experiment, the oldest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], condition, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def close_run(client: "MlflowClient", run: "Run", state: str, error: str) -> None:
    """End a run in place of its process."""
    with_retries(client.set_tag, run.info.run_id, "error", truncate(error, MAX_ERROR_LENGTH))
    with_retries(client.set_terminated, run.info.run_id, state, to_milliseconds(time.time()))
