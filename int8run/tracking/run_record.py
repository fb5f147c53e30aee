"""What a job leaves in its output folder, written first and read by everything else: tracker, resume, report, the table of a sweep."""

import csv
import errno
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml

from int8run.errors import FileError

log = logging.getLogger(__name__)
STATUS = "status.json"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
KILLED_MESSAGE = "the process ended without a word: killed, out of memory, or the machine went down"
LOGIN = re.compile(r"://[^/@\s]*@")
TEXT_KEYS = ("prompt", "key")  # of metrics.json: a prompt may be the word that stands for a number
# settings that say where and how a job is kept, and change nothing about its result
UNHASHED_SETTINGS = ("resume", "sync", "progress", "tracker", "cache")


@dataclass(frozen=True)
class Record:
    """One job as its output folder tells it. `status` is status.json; the other files are read when they are asked for."""

    folder: Path
    status: Mapping[str, Any]

    @property
    def state(self) -> str:
        """RUNNING, FINISHED, FAILED or KILLED."""
        return self.status["state"]

    @property
    def error(self) -> str | None:
        """Why it failed, in one line."""
        return self.status.get("error")

    @property
    def name(self) -> str:
        """What differs from the defaults, in the words of the command line."""
        return self.status["name"]

    @property
    def label(self) -> str:
        """The name of a sweep's job in as few letters as may be: `strength=0.5 convrot`. An option says what it is without its group."""
        if self.sweep is None:
            return self.name
        words = [word.lstrip("+").partition("=") for word in self.name.split(" ")]
        short = [
            f"{key.rpartition('.')[2]}={value}" if "." in key or not value or len(words) == 1 else value
            for key, _, value in words
        ]
        return " ".join(short) if all(separator for _, separator, _ in words) else self.name

    @property
    def overrides(self) -> list[str]:
        """The command line's words."""
        return list(self.status["overrides"])

    @property
    def params(self) -> dict[str, str]:
        """Settings, flat: options by group, values by their key."""
        return dict(self.status["params"])

    @property
    def sweep(self) -> str | None:
        """Identity of the sweep."""
        return self.status.get("sweep")

    @property
    def number(self) -> int:
        """Number in the sweep; 0 outside one."""
        return int(self.status.get("number") or 0)

    @property
    def config_hash(self) -> str:
        """Equal where the settings that decide a result are equal."""
        return self.status["config_hash"]

    @property
    def build_key(self) -> str:
        """Equal where the built model is."""
        return self.status["build_key"]

    @property
    def objective(self) -> str:
        """The metric that judges the job."""
        return self.status["objective"]

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
        """Where the tracker has it: store, experiment, run_id, uploaded; empty when nowhere."""
        return self.status.get("tracking") or {}

    @property
    def run_id(self) -> str | None:
        """The tracker's name of it."""
        return self.tracking.get("run_id")

    @property
    def uploaded(self) -> bool:
        """Whether the tracker has everything."""
        return bool(self.tracking.get("uploaded"))

    @property
    def warnings(self) -> list[str]:
        """What the job warned of."""
        return list(self.status.get("warnings") or [])

    @cached_property
    def _measured(self) -> dict[str, Any]:
        path = self.folder / "metrics.json"
        try:
            return restore_numbers(json.loads(path.read_text())) if path.is_file() else {}
        except ValueError as error:
            log.warning("%s is damaged and left out: %s", path, error)
            return {}

    @property
    def metrics(self) -> dict[str, float]:
        """Final values by name."""
        return self._measured.get("metrics", {})

    @property
    def series(self) -> dict[str, list[float]]:
        """One value per step or frame, by name."""
        return self._measured.get("series", {})

    @property
    def images(self) -> list[dict[str, Any]]:
        """Prompt, seed, files and quality of every drawing."""
        return self._measured.get("images", [])

    @cached_property
    def layers(self) -> list[dict[str, str]]:
        """Rows of layers.csv."""
        path = self.folder / "layers.csv"
        return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Machine and versions."""
        path = self.folder / "environment.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved settings."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text()) if path.is_file() else {}


def restore_numbers(value: Any) -> Any:
    """JSON with its words for non-finite numbers turned back into numbers."""
    if isinstance(value, dict):
        return {k: v if k in TEXT_KEYS else restore_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restore_numbers(v) for v in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def read_record(folder: Path) -> Record:
    """The record in a folder; a job that says it runs, and whose process on this machine is gone, was killed.

    Raises:
        FileError: when there is none, or it is damaged.
    """
    path = folder / STATUS
    try:
        status = json.loads(path.read_text())
        if status["state"] == RUNNING and is_process_gone(
            status["host"], status["pid"], status["process_started"]
        ):
            status |= {"state": KILLED, "error": KILLED_MESSAGE}
        return Record(folder, status)
    except FileNotFoundError:
        raise FileError(f"{folder} holds no {STATUS}: no job of int8run wrote it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error!r}") from error


def find_records(folder: Path) -> list[Record]:
    """Every record in a folder and below it, by number and start. The copies in MLflow's own folders are none: `<run>/artifacts/`.

    One that is damaged is left out, with a warning: it is no reason to lose the others.
    """
    found = []
    for path in folder.rglob(STATUS):
        record = try_read_record(path.parent) if path.parent.name != "artifacts" else None
        if record is not None:
            found.append(record)
    return sorted(found, key=lambda r: (r.number, r.started))


def try_read_record(folder: Path) -> Record | None:
    """The record in a folder, if there is one that can be read."""
    if not (folder / STATUS).is_file():
        return None
    try:
        return read_record(folder)
    except FileError as error:
        log.warning("%s; it is left out", error)
        return None


def hash_config(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal where the settings that decide a result are.

    Args:
        settings: the resolved config.
    """
    deciding = {key: value for key, value in settings.items() if key not in UNHASHED_SETTINGS}
    return hash_text(json.dumps(deciding, sort_keys=True, default=str))


def split_override(word: str) -> tuple[str, str]:
    """`+a.b=1` -> (`a.b`, `1`): a word of the command line."""
    key, _, value = word.lstrip("+~").partition("=")
    return key, value


def find_varying_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that do not have the same value in all mappings, in the order of their first appearance.

    A key that only some of them have varies. A sweep's table, the report and the dashboard all ask this.

    Args:
        settings: of each run, by key.
    """
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({values.get(key) for values in settings}) > 1]


def remove_login(text: str) -> str:
    """An address, or a text with some, without user and password."""
    return LOGIN.sub("://", text)


def hash_text(text: str) -> str:
    """16 hexadecimal digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_process() -> dict[str, Any]:
    """Who writes a record, so that others can tell whether it is still there."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
    }


def is_process_gone(host: str, pid: int, started: float) -> bool:
    """Whether a process of this machine has ended; of another machine nothing is known, and the answer is no."""
    if host != socket.gethostname():
        return False
    try:
        return (
            abs(psutil.Process(pid).create_time() - started) > 1
        )  # the number may belong to another one by now
    except psutil.NoSuchProcess:
        return True


def start_record(folder: Path, identity: Mapping[str, Any]) -> Record:
    """Write that a job runs, in this process, from now on. What an earlier try of it left in status.json is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_status(create_record(folder, identity))


def create_record(folder: Path, identity: Mapping[str, Any], **changes: Any) -> Record:
    """A record of a job that starts in this process; nothing is written."""
    ends = {"state": RUNNING, "error": None, "started": time.time(), "ended": None, "tracking": None}
    return Record(folder, {**identity, **describe_process(), **ends, **changes})


def end_record(record: Record, state: str, error: str | None = None, warnings: Sequence[str] = ()) -> Record:
    """Write how a job ended."""
    return update_record(record, state=state, error=error, warnings=list(warnings), ended=time.time())


def update_record(record: Record, **changes: Any) -> Record:
    """Write a record with some changes."""
    return write_status(Record(record.folder, {**record.status, **changes}))


def write_status(record: Record) -> Record:
    """Write status.json whole or not at all; on a full disk into the old one's place, which has room."""
    path = record.folder / STATUS
    text = json.dumps(record.status, indent=2) + "\n"
    new = path.with_suffix(f".{os.getpid()}.new")
    try:
        new.write_text(text)
        os.replace(new, path)
    except OSError as error:
        if error.errno != errno.ENOSPC or not path.exists():
            raise
        new.unlink(missing_ok=True)
        with path.open("r+") as file:
            file.write(text)
            file.truncate()
    return record
