"""MLflow: SQLite in the working folder, or the server that the user names. The only file that imports mlflow.

Everything goes through a client that belongs to one run. The fluent functions would be shorter, but they keep the address
in the process and export it to the environment, where the next job of a sweep would find it. mlflow takes a second and 125 MB to import,
so it is imported by a run and not by its settings: task=quantize has no use for it.
"""

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from int8run.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient


class MlflowRun:
    """One open MLflow run."""

    def __init__(self, client: "MlflowClient", run_id: str):
        self.client, self.run_id = client, run_id

    def log_params(self, params: Mapping[str, str]) -> None:
        """Settings, all in one call."""
        from mlflow.entities import Param

        self.client.log_batch(self.run_id, params=[Param(name, value) for name, value in params.items()])

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Final values, all in one call."""
        from mlflow.entities import Metric

        now = milliseconds()
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, 0) for name, value in metrics.items()])

    def log_series(self, name: str, values: Sequence[float]) -> None:
        """One value per step, all in one call."""
        from mlflow.entities import Metric

        now = milliseconds()
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for step, value in enumerate(values)])

    def log_image(self, key: str, image: Image) -> None:
        """A picture for the image grid, at step 0, where its cards begin."""
        self.client.log_image(self.run_id, image, key=key, step=0)

    def log_file(self, path: Path) -> None:
        """An artifact."""
        self.client.log_artifact(self.run_id, str(path))


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
    def store(self) -> str:
        """The tracking URI, absolute."""
        return self.uri or f"sqlite:///{Path(self.folder).absolute() / 'mlflow.db'}"

    def prepare(self) -> tuple["MlflowClient", str]:
        """Create database and experiment where they are missing.

        Returns:
            a client and the experiment's id.

        Raises:
            ConfigError: when the store does not answer, or the experiment was deleted.
        """
        from mlflow import MlflowClient
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(self.store)
            known = client.search_experiments(view_type=ViewType.ALL, filter_string=f"name = '{self.experiment}'")
        except (MlflowException, OSError) as error:
            raise ConfigError(f"tracker.uri={self.store} does not answer: {error}; tracker=none runs without") from error
        if known and known[0].lifecycle_stage == "deleted":
            raise ConfigError(f"the MLflow experiment {self.experiment!r} is deleted; restore it or set tracker.experiment=<new name>")
        if known:
            return client, known[0].experiment_id
        place = (Path(self.folder).absolute() / "mlartifacts" / self.experiment).as_uri() if self.uri is None else None
        experiment_id = client.create_experiment(self.experiment, artifact_location=place)
        # without it the page opens on its view for language models, where no metric column exists
        client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        if self.store.startswith("sqlite:///"):
            # readers and writers at once: without it a second writer waits seconds; the mode stays in the file
            with sqlite3.connect(self.store.removeprefix("sqlite:///")) as connection:
                connection.execute("pragma journal_mode=WAL")
        return client, experiment_id

    @contextmanager
    def start(self, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> Iterator[MlflowRun]:
        """Open a run; an error marks it FAILED, with the message as tag `error`, an interruption KILLED."""
        from mlflow.entities import RunStatus

        client, experiment_id = self.prepare()
        run = MlflowRun(client, client.create_run(experiment_id, tags=dict(tags), run_name=name).info.run_id)
        status = RunStatus.FINISHED
        try:
            run.log_params(params)
            yield run
        except BaseException as error:
            status = RunStatus.KILLED if isinstance(error, KeyboardInterrupt) else RunStatus.FAILED
            client.set_tag(run.run_id, "error", str(error)[:5000] or type(error).__name__)
            raise
        finally:
            client.set_terminated(run.run_id, RunStatus.to_string(status))

    def where(self) -> str | None:
        """The server's address, or the command that serves the database."""
        if self.uri and self.uri.startswith("http"):
            return self.uri
        return f"mlflow server --backend-store-uri {self.store}"


def milliseconds() -> int:
    """The time as MLflow wants it."""
    return int(time.time() * 1000)
