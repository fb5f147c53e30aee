"""MLflow: an SQLite database in the working folder, or the server that the user names.

The modules `mlflow_*` and `retry` are the only ones that import mlflow. Everything goes through a client: the
fluent functions would be shorter, but they keep the address in the process and export it to the environment,
where the next job of a sweep would find it. mlflow takes two seconds and 125 MB to import, so it is imported
by a run and not by its settings: task=quantize has no use for it.
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
from int8run.tracking.mlflow_dashboard import build_view_state, find_varying_params
from int8run.tracking.mlflow_payload import (
    MAX_ERROR_LENGTH,
    build_tag_filter,
    to_milliseconds,
    truncate,
)
from int8run.tracking.mlflow_view_tag import build_view_link, make_view_key, write_view
from int8run.tracking.process_identity import describe_process, is_process_gone
from int8run.tracking.retry import ping, translate_errors, with_retries
from int8run.tracking.run_record import KILLED, KILLED_MESSAGE, RUNNING, Record, read_record, update_record
from int8run.tracking.secrets import remove_login
from int8run.utils.paths import check_path, expand_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

log = logging.getLogger(__name__)

SQLITE_PREFIX = "sqlite:///"
LOCAL_SERVER = "http://127.0.0.1:5000"  # of `mlflow server`
BUSY_TIMEOUT_S = 10.0  # how long another program may keep the database for itself
LOCK_TIMEOUT_S = 120  # how long another command may take to create the same database


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

    # -- the store -------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The tracking URI; that of a file is absolute."""
        uri = self.uri or f"{SQLITE_PREFIX}{expand_path(self.folder) / 'mlflow.db'}"
        if not uri.startswith(SQLITE_PREFIX):
            return uri
        return f"{SQLITE_PREFIX}{Path(uri.removeprefix(SQLITE_PREFIX)).absolute()}"

    @property
    def store(self) -> str:
        """The tracking URI without a password, for people and records."""
        return remove_login(self.address)

    @property
    def database(self) -> Path | None:
        """The SQLite file; None for other stores."""
        if not self.address.startswith(SQLITE_PREFIX):
            return None
        return Path(self.address.removeprefix(SQLITE_PREFIX).partition("?")[0])

    @property
    def is_server(self) -> bool:
        """Whether the store is a server that is reached over HTTP."""
        return self.address.startswith(("http://", "https://"))

    @property
    def artifact_location(self) -> str | None:
        """Where the files of runs go: beside a database; None: the server decides."""
        if self.is_server:
            return None
        folder = expand_path(self.folder).absolute()
        if self.database is not None:
            folder = self.database.parent
        experiment_folder = re.sub(r"[^\w. -]", "_", self.experiment)
        return (folder / "mlartifacts" / experiment_folder).as_uri()

    def get_location(self) -> dict[str, str]:
        """Store and experiment."""
        return {"store": self.store, "experiment": self.experiment}

    def get_view_hint(self) -> str | None:
        """The server's address, or the command that serves the database."""
        if self.is_server:
            return self.store
        return f"mlflow server --backend-store-uri {shlex.quote(self.store)}"

    # -- what a tracker does ---------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create database and experiment where they are missing; close runs of this machine that have died.

        Raises:
            ConfigError: the experiment was deleted, or the address can never work.
            TrackingError: no answer.
        """
        host = describe_process()["host"]
        condition = f"attributes.status = 'RUNNING' and {build_tag_filter('host', host)}"
        with self.open_client(checks_settings=True) as (client, experiment_id):
            for run in search_runs(client, experiment_id, condition):
                if has_died(run, host):
                    close_run(client, run, KILLED, KILLED_MESSAGE)

    def start_run(self, record: Record) -> str:
        """A new run with the settings of a job."""
        with self.open_client() as (client, experiment_id):
            return mlflow_upload.create_run(client, experiment_id, record)

    def upload_record(self, record: Record) -> str:
        """Params, metrics, images, tables, prompts and files of the record; then the run ends."""
        is_ours = self.get_location().items() <= dict(record.tracking).items()
        known_id = record.run_id if is_ours else None
        with self.open_client() as (client, experiment_id):
            run = mlflow_upload.find_or_create_run(client, experiment_id, record, known_id)
            mlflow_upload.upload_record(client, run, record)
            run_id: str = run.info.run_id
            return run_id

    def find_finished(self, hashes: Iterable[str]) -> dict[str, str]:
        """The newest finished run of each config that has one."""
        newest = {}
        with self.open_client() as (client, experiment_id):
            for config_hash in hashes:
                tag_filter = build_tag_filter("config_hash", config_hash)
                condition = f"attributes.status = 'FINISHED' and {tag_filter}"
                runs = search_runs(client, experiment_id, condition)
                if runs:
                    newest[config_hash] = runs[-1].info.run_id
        return newest

    def find_running(self, sweep: str) -> dict[str, int]:
        """Open runs of a sweep."""
        condition = f"attributes.status = 'RUNNING' and {build_tag_filter('sweep', sweep)}"
        with self.open_client() as (client, experiment_id):
            runs = search_runs(client, experiment_id, condition)
        return {run.info.run_id: int(run.data.tags.get("number", 0)) for run in runs}

    def end_run(self, run_id: str, state: str, error: str) -> None:
        """End a run that is still open."""
        with self.open_client() as (client, _):
            run = client.get_run(run_id)
            if run.info.status == RUNNING:
                close_run(client, run, state, error)

    def find_sweep_runs(self, sweep: str) -> list[str]:
        """All runs of a sweep, the oldest first."""
        with self.open_client() as (client, experiment_id):
            runs = search_runs(client, experiment_id, build_tag_filter("sweep", sweep))
        return [run.info.run_id for run in runs]

    def download_run(self, run_id: str, folder: Path) -> None:
        """The files, and a record that knows its run."""
        with self.open_client() as (client, _):
            mlflow_upload.download_files(client, run_id, folder)
        tracking = {**self.get_location(), "run_id": run_id, "uploaded": True}
        update_record(read_record(folder), tracking=tracking)

    def share_sweep(self, sweep: str, records: Sequence[Record]) -> str | None:
        """Write the sweep's dashboard into the experiment."""
        image_keys: dict[str, None] = {}
        metrics: dict[str, None] = {}
        for record in records:
            image_keys |= dict.fromkeys(mlflow_payload.find_image_files(record))
            metrics |= dict.fromkeys([*record.metrics, *record.series])
        params = find_varying_params(record.params for record in records)
        state = build_view_state(params, metrics, list(image_keys), sweep)
        key = make_view_key(sweep)
        with self.open_client() as (client, experiment_id):
            num_left_out = with_retries(write_view, client, experiment_id, key, state)
        if num_left_out:
            log.info(
                "The dashboard's image grid has room for %d of %d images of each run",
                len(image_keys) - num_left_out,
                len(image_keys),
            )
        if self.is_server:
            return build_view_link(self.store, experiment_id, key)
        link = build_view_link(LOCAL_SERVER, experiment_id, key)
        return f"{self.get_view_hint()}\n          then open {link}"

    def attach_file(self, run_id: str, path: Path) -> None:
        """Keep a file as an artifact."""
        with self.open_client() as (client, _):
            with_retries(client.log_artifact, run_id, str(path))

    # -- the connection --------------------------------------------------------------------------------------

    @contextmanager
    def open_client(self, *, checks_settings: bool = False) -> Iterator[tuple["MlflowClient", str]]:
        """A client and the id of the experiment, which is created where it is missing.

        Args:
            checks_settings: see `translate_errors`.

        Raises:
            ConfigError, TrackingError: in place of the errors of the `with` block.
        """
        with translate_errors(self.store, checks_settings=checks_settings):
            self.check_address()
            if self.is_server:
                ping(self.address)
            with self.lock_database():
                client, experiment_id = self.connect()
            yield client, experiment_id

    def check_address(self) -> None:
        """Refuse addresses that keep nothing.

        Raises:
            ConfigError: with the address and what to use instead.
        """
        is_uri = "://" in self.address or self.address.startswith("databricks")
        is_folder = self.address.startswith("file:") or not is_uri
        if is_folder:
            raise ConfigError(
                f"tracker.uri={self.store} is a folder, and MLflow no longer keeps runs in folders; use "
                f"{SQLITE_PREFIX}/absolute/path/mlflow.db, http://HOST:PORT, or null for mlflow.db in "
                "tracker.folder"
            )
        is_in_memory = self.address in ("sqlite://", SQLITE_PREFIX) or ":memory:" in self.address
        if is_in_memory:
            raise ConfigError(
                f"tracker.uri={self.store} keeps its runs in memory, where they end with the command; use "
                "sqlite:////path/mlflow.db"
            )
        has_special_letters = "%" in self.address or "?" in self.address
        if self.uri is None and has_special_letters:
            raise ConfigError(
                f"{self.database} has % or ? in its path, which are special in MLflow's addresses; run in "
                "another folder, or set tracker.folder=FOLDER"
            )
        if self.database is not None:
            check_path(self.database)
            self.check_encoding(self.database)
            # SQLite waits for ever for what a pipe will say
            if self.database.exists() and not self.database.is_file():
                raise ConfigError(
                    f"tracker.uri={self.store} is a folder, a pipe or a device; name a file, which may be new"
                )

    def check_encoding(self, database: Path) -> None:
        """Raise ConfigError for a database whose path is not UTF-8: SQLite cannot open it."""
        try:
            str(database).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{database} has a name that is not UTF-8, and SQLite opens no such file; run in another "
                "folder, or set tracker.folder=FOLDER"
            ) from None

    @contextmanager
    def lock_database(self) -> Iterator[None]:
        """Keep other processes out while a database is opened: two that create its tables damage it."""
        from filelock import FileLock

        if self.database is None:
            yield
            return
        self.database.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{self.database}.lock")
        lock.touch()  # in a folder that cannot be written to, FileLock would wait for nobody
        with FileLock(lock, timeout=LOCK_TIMEOUT_S, poll_interval=0.01):
            yield

    def connect(self) -> tuple["MlflowClient", str]:
        """See `open_client`."""
        from mlflow import MlflowClient

        is_new = self.database is not None and not self.database.exists()
        self.try_database()
        client = MlflowClient(self.address)
        experiment = client.get_experiment_by_name(self.experiment)
        if is_new:
            self.allow_concurrent_writers()
        if experiment is None:
            experiment = self.create_experiment(client)
        if experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"the MLflow experiment {self.experiment!r} is deleted; restore it or set "
                "tracker.experiment=<new name>"
            )
        return client, experiment.experiment_id

    def try_database(self) -> None:
        """Write nothing into the database, to see whether that works: mlflow would try for minutes.

        Raises:
            sqlite3.Error: it cannot be opened or written, is another file, or is locked all the time.
        """
        if self.database is None:
            return
        with closing(sqlite3.connect(str(self.database), timeout=BUSY_TIMEOUT_S)) as connection:
            connection.execute("begin immediate")
            connection.rollback()

    def allow_concurrent_writers(self) -> None:
        """Let the database be read and written at once. Without it, a second writer waits seconds.

        The mode stays in the file.
        """
        with closing(sqlite3.connect(str(self.database))) as connection:
            connection.execute("pragma journal_mode=WAL")

    def create_experiment(self, client: "MlflowClient") -> "Experiment":
        """Create the experiment, or take the one that another command created at the same time."""
        from mlflow.exceptions import MlflowException

        # Without the tag the page opens on its view for language models, which has no metric columns.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            client.create_experiment(self.experiment, self.artifact_location, tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return client.get_experiment_by_name(self.experiment)


def has_died(run: "Run", host: str) -> bool:
    """Whether the process of an open run is gone; False where the run does not name its process.

    Args:
        run: of this machine.
        host: name of this machine.
    """
    tags = run.data.tags
    pid, started = tags.get("pid"), tags.get("process_started")
    if not pid or not started:
        return False
    return is_process_gone(host, int(pid), float(started), tags.get("process_since_boot"))


def search_runs(client: "MlflowClient", experiment_id: str, condition: str) -> list["Run"]:
    """Runs of an experiment, the oldest first.

    Args:
        client: of the store.
        experiment_id: to search.
        condition: in MLflow's filter language.
    """
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
    """End a run in place of its process.

    Args:
        client: of the store.
        run: to end.
        state: that it ends in.
        error: why.
    """
    with_retries(client.set_tag, run.info.run_id, "error", truncate(error, MAX_ERROR_LENGTH))
    with_retries(client.set_terminated, run.info.run_id, state, to_milliseconds(time.time()))
