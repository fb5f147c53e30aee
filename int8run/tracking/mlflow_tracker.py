"""MLflow: SQLite in the working folder, or the server that the user names. The only file that imports mlflow."""

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import Metric, ViewType
from PIL.Image import Image

from int8run.errors import ConfigError


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

    def prepare(self) -> None:
        """Create database and experiment, once, before jobs write: tables made by several processes at once are lost."""
        mlflow.set_tracking_uri(self.store)
        try:
            client = mlflow.MlflowClient()
            known = client.search_experiments(view_type=ViewType.ALL, filter_string=f"name = '{self.experiment}'")
        except mlflow.exceptions.MlflowException as error:
            raise ConfigError(f"tracker.uri={self.store} does not answer: {error}; tracker=none runs without") from error
        if known and known[0].lifecycle_stage == "deleted":
            raise ConfigError(f"the MLflow experiment {self.experiment!r} is deleted; restore it or set tracker.experiment=<new name>")
        if not known:
            local = self.uri is None
            place = (Path(self.folder).absolute() / "mlartifacts" / self.experiment).as_uri() if local else None
            experiment_id = client.create_experiment(self.experiment, artifact_location=place)
            # without it the page opens on its view for language models, where no metric column exists
            client.set_experiment_tag(experiment_id, "mlflow.experimentKind", "custom_model_development")
        if self.store.startswith("sqlite:///"):
            # readers and writers at once: without it a second writer waits seconds; the mode stays in the file
            with sqlite3.connect(self.store.removeprefix("sqlite:///")) as connection:
                connection.execute("pragma journal_mode=WAL")

    @contextmanager
    def start(self, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> Iterator[None]:
        """Open a run; an error marks it FAILED, with the message as tag `error`."""
        self.prepare()
        mlflow.set_experiment(self.experiment)
        with mlflow.start_run(run_name=name, tags=dict(tags)):
            mlflow.log_params(dict(params))
            try:
                yield
            except BaseException as error:
                mlflow.set_tag("error", str(error)[:5000] or type(error).__name__)
                raise

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        mlflow.log_metrics(dict(metrics))

    def log_series(self, name: str, values: Sequence[float]) -> None:
        now = int(time.time() * 1000)
        points = [Metric(name, value, now, step) for step, value in enumerate(values)]
        mlflow.MlflowClient().log_batch(mlflow.active_run().info.run_id, metrics=points)

    def log_image(self, key: str, image: Image, step: int) -> None:
        mlflow.log_image(image, key=key, step=step)

    def log_file(self, path: Path) -> None:
        mlflow.log_artifact(str(path))

    def where(self) -> str | None:
        if self.uri and self.uri.startswith("http"):
            return self.uri
        return f"mlflow server --backend-store-uri {self.store}"
