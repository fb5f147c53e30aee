"""The record of a job: what it leaves in its output folder.

Written first, and read by everything else: trackers, resume, the report, the table of a sweep. Knows none of
them.
"""

import csv
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import FileError
from int8run.tracking.process_identity import describe_process, is_process_gone
from int8run.tracking.setting_names import hash_text, shorten_overrides

log = logging.getLogger(__name__)
STATUS, RESULTS = "status.json", "metrics.json"
# of metrics.json: 1 since it says its own model, recipe and environment; files of earlier versions have none
RESULTS_SCHEMA = 1
EARLIER_ATTEMPTS = "earlier_attempts"  # of a sweep's jobs that ran again; a folder in that of the sweep
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
KILLED_MESSAGE = "the process ended without an error message: killed, out of memory, or the machine went down"
TEXT_KEYS = ("prompt", "negative_prompt", "key")  # of metrics.json: a prompt may be `nan` and is not a number
OBJECTS = ("params", "tracking")  # of status.json: names with values
# Settings that only decide how a job is shown and kept, and do not change its result.
UNHASHED_SETTINGS = ("resume", "sync", "progress", "tracker", "cache")


@dataclass(frozen=True)
class Record:
    """One job as its output folder describes it.

    Args:
        folder: of the job.
        status: the content of status.json. The other files are read when they are first used.
    """

    folder: Path
    status: Mapping[str, Any]

    @property
    def state(self) -> str:
        """RUNNING, FINISHED, FAILED or KILLED."""
        return str(self.status["state"])

    @property
    def error(self) -> str | None:
        """Why it failed, in one line."""
        return self.status.get("error")

    @property
    def name(self) -> str:
        """The overrides that differ from the defaults, as on the command line."""
        return str(self.status["name"])

    @property
    def label(self) -> str:
        """A short name for a job of a sweep: `strength=0.5 convrot`.

        The values of options stand alone, without their group, unless two have the same value.
        """
        if self.sweep is None:
            return self.name
        overrides = self.name.split(" ")
        if not all("=" in override for override in overrides):
            return self.name  # a value has a space in it
        return shorten_overrides(overrides)

    @property
    def overrides(self) -> list[str]:
        """The overrides of the command line."""
        return list(self.status["overrides"])

    @property
    def params(self) -> dict[str, str]:
        """All settings, flat: options by their group, values by their dotted key."""
        return dict(self.status["params"])

    @property
    def sweep(self) -> str | None:
        """The id of the sweep; None outside one."""
        return self.status.get("sweep")

    @property
    def number(self) -> int:
        """Number in the sweep; 0 outside one."""
        return int(self.status.get("number") or 0)

    @property
    def config_hash(self) -> str:
        """Equal for jobs whose results must be equal; see `hash_config`."""
        return str(self.status["config_hash"])

    @property
    def build_key(self) -> str:
        """Equal for jobs that use the same built model."""
        return str(self.status["build_key"])

    @property
    def objective(self) -> str:
        """The metric that the best job is chosen by."""
        return str(self.status["objective"])

    @property
    def started(self) -> float:
        """Unix time in seconds."""
        return float(self.status["started"])

    @property
    def ended(self) -> float | None:
        """Unix time in seconds; None while it runs, and when it was killed."""
        return self.status.get("ended")

    @property
    def jobs_at_once(self) -> int:
        """How many jobs shared the machine."""
        return int(self.status.get("jobs_at_once") or 1)

    @property
    def tracking(self) -> Mapping[str, Any]:
        """Where the tracker keeps it: store, experiment, run_id, uploaded; empty without a tracker."""
        return self.status.get("tracking") or {}

    @property
    def run_id(self) -> str | None:
        """The tracker's id of the run."""
        return self.tracking.get("run_id")

    @property
    def uploaded(self) -> bool:
        """Whether the tracker has everything that the folder holds."""
        return bool(self.tracking.get("uploaded"))

    @property
    def warnings(self) -> list[str]:
        """The warnings that the job gave."""
        return list(self.status.get("warnings") or [])

    @cached_property
    def _measured(self) -> dict[str, Any]:
        """The content of metrics.json; empty when it is missing or damaged."""
        path = self.folder / RESULTS
        if not path.is_file():
            return {}
        measured = read_object(path, json.loads)
        schema = measured.get("schema", 0)
        if schema not in range(RESULTS_SCHEMA + 1):
            log.warning("%s is ignored: %s", path, describe_other_schema(schema))
            return {}
        return dict(restore_numbers(measured))

    def _get_measured(self, name: str) -> dict[str, Any]:
        """An object of metrics.json; empty where it is missing or none."""
        found = self._measured.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def metrics(self) -> dict[str, float]:
        """Final values by name."""
        return self._get_measured("metrics")

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """What the samples say of each metric: interval, median, worst samples; empty of earlier versions."""
        found = self._get_measured("statistics").get("metrics")
        return found if isinstance(found, dict) else {}

    @property
    def noise_floor(self) -> dict[str, Any]:
        """What the float model was compared with itself by, and the tests; empty where it was not."""
        return self._get_measured("noise_floor")

    @property
    def series(self) -> dict[str, list[float]]:
        """One value per step or frame, by name."""
        return self._get_measured("series")

    @property
    def rounded(self) -> dict[str, dict[str, Any]]:
        """By setting: what was `asked`, and what the pipeline `generated` in its place."""
        return self._get_measured("rounded")

    @property
    def images(self) -> list[dict[str, Any]]:
        """Prompt, seed, files and quality of every generated image or video."""
        images = self._measured.get("images")
        return images if isinstance(images, list) else []

    @cached_property
    def layers(self) -> list[dict[str, str]]:
        """Rows of layers.csv."""
        path = self.folder / "layers.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Facts about the machine and the versions of libraries."""
        path = self.folder / "environment.json"
        return read_object(path, json.loads) if path.is_file() else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved settings."""
        path = self.folder / "config.yaml"
        return read_object(path, yaml.safe_load) if path.is_file() else {}


def read_object(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a JSON or YAML file holds; empty, with a warning, when it is damaged or holds something else.

    Args:
        path: of the file.
        parse: its text.
    """
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        log.warning("%s is damaged and is ignored: %s", path, " ".join(str(error).split()))
        return {}
    if not isinstance(found, dict):
        log.warning("%s is damaged and is ignored: it holds no names with values", path)
        return {}
    return found


def describe_other_schema(schema: object) -> str:
    """Why a metrics.json of another version cannot be used, and what to do."""
    return (
        f"its schema is {schema}, and this version of int8run reads up to {RESULTS_SCHEMA}; use the version "
        "that wrote it, or a later one"
    )


def restore_numbers(value: Any) -> Any:
    """JSON with the strings for non-finite numbers turned back into numbers."""
    if isinstance(value, list):
        return [restore_numbers(item) for item in value]
    if isinstance(value, dict):
        restored = {}
        for key, item in value.items():
            restored[key] = item if key in TEXT_KEYS else restore_numbers(item)
        return restored
    if value in ("inf", "-inf", "nan"):
        return float(value)
    return value


def read_record(folder: Path) -> Record:
    """Read the record in a folder.

    A job that is marked as running, and whose process on this machine is gone, was killed.

    Raises:
        FileError: when there is no record, or it is damaged.
    """
    path = folder / STATUS
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        check_objects(status)
        was_killed = status["state"] == RUNNING and is_writer_gone(status)
    except FileNotFoundError:
        raise FileError(f"{folder} holds no {STATUS}: no job of int8run wrote it") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error!r}") from error
    if was_killed:
        status |= {"state": KILLED, "error": KILLED_MESSAGE}
    return Record(folder, status)


def check_objects(status: object) -> None:
    """Raise ValueError for a status.json with a list or a text where names with values belong."""
    if not isinstance(status, dict):
        raise ValueError("it holds no names with values")
    for name in OBJECTS:
        if not isinstance(status.get(name) or {}, dict):
            raise ValueError(f"{name} holds no names with values")


def is_writer_gone(status: Mapping[str, Any]) -> bool:
    """Whether the process that a status.json names has ended."""
    return is_process_gone(
        host=status["host"],
        pid=status["pid"],
        started=status["process_started"],
        since_boot=status.get("process_since_boot"),
    )


def find_records(folder: Path) -> list[Record]:
    """Every record in a folder and below it, by number and start.

    Copies in MLflow's own folders, `<run>/artifacts/`, do not count, nor do attempts of jobs that ran again.
    A damaged record is skipped with a warning, so that the others can be used.
    """
    folders = []
    for path in folder.rglob(STATUS):
        is_earlier = EARLIER_ATTEMPTS in path.relative_to(folder).parts
        if path.parent.name != "artifacts" and not is_earlier:
            folders.append(path.parent)
    found = []
    for job_folder in folders:
        record = try_read_record(job_folder)
        if record is not None:
            found.append(record)
    return sorted(found, key=lambda record: (record.number, record.started))


def try_read_record(folder: Path) -> Record | None:
    """The record in a folder; None, with a warning, when it is damaged, and None when there is none."""
    if not (folder / STATUS).is_file():
        return None
    try:
        return read_record(folder)
    except FileError as error:
        log.warning("%s; it is ignored", error)
        return None


def hash_config(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal for equal settings, apart from UNHASHED_SETTINGS.

    Args:
        settings: the resolved config.
    """
    hashed = {key: value for key, value in settings.items() if key not in UNHASHED_SETTINGS}
    return hash_text(json.dumps(hashed, sort_keys=True, default=str))


def start_record(folder: Path, identity: Mapping[str, Any]) -> Record:
    """Write that a job runs from now on, in this process. An earlier status.json of the folder is replaced.

    Args:
        folder: of the job; made where it is missing.
        identity: what status.json says about the job itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return write_status(create_record(folder, identity))


def create_record(folder: Path, identity: Mapping[str, Any], **changes: Any) -> Record:
    """A record of a job that starts in this process. Nothing is written.

    Args:
        folder: of the job.
        identity: what status.json says about the job itself.
        changes: fields with other values than those of a job that starts.
    """
    progress = {"state": RUNNING, "error": None, "started": time.time(), "ended": None, "tracking": None}
    return Record(folder, {**identity, **describe_process(), **progress, **changes})


def end_record(record: Record, state: str, error: str | None = None, warnings: Sequence[str] = ()) -> Record:
    """Write how a job ended.

    Args:
        record: of the job.
        state: FINISHED, FAILED or KILLED.
        error: why it failed, in one line.
        warnings: that it gave.
    """
    # the clock may have been set back meanwhile
    ended = max(time.time(), record.started)
    return update_record(record, state=state, error=error, warnings=list(warnings), ended=ended)


def update_record(record: Record, **changes: Any) -> Record:
    """Write a record with some changed fields."""
    return write_status(Record(record.folder, {**record.status, **changes}))


def write_status(record: Record) -> Record:
    """Write status.json whole or not at all; on a full disk in place of the old one, whose space it takes."""
    path = record.folder / STATUS
    text = json.dumps(record.status, indent=2) + "\n"
    unfinished = path.with_suffix(f".{os.getpid()}.new")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno != errno.ENOSPC or not path.exists():
            raise
        unfinished.unlink(missing_ok=True)
        with path.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()
    return record
