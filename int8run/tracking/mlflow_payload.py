"""What of a job's output folder becomes what of an MLflow run. Repeating any of it changes nothing."""

import csv
import getpass
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from int8run.tracking.run_record import Record

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric

log = logging.getLogger(__name__)
MAX_PARAM_LENGTH = 500  # characters that every MLflow server takes
MAX_ERROR_LENGTH = 5000
SMALL_COPY_SUFFIX = "+compressed.webp"  # how the name of MLflow's small copy of a picture ends
KEPT_SUFFIXES = {".yaml", ".json", ".csv", ".png", ".log"}  # files at the top of the folder
TABLE_FILES = {
    "layers.json": "layers.csv",
    "text_encoders.json": "text_encoders.csv",
}  # for MLflow's page -> our file


def to_milliseconds(seconds: float) -> int:
    """A time as MLflow wants it."""
    return int(seconds * 1000)


def get_timestamp(record: Record) -> int:
    """The time of everything that a record holds: always the same, so that the store knows what it has already."""
    return to_milliseconds(record.ended or record.started)


def sanitize_name(name: str) -> str:
    """A name with the letters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:250]


def truncate(text: str, length: int) -> str:
    """A text of at most so many characters; `…` shows that it was longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def build_params(record: Record) -> dict[str, str]:
    """Settings."""
    return {
        sanitize_name(name): truncate(str(value), MAX_PARAM_LENGTH) for name, value in record.params.items()
    }


def identify_record(record: Record) -> str:
    """Equal for all uploads of one job, and for no two jobs."""
    return f"{record.status.get('host')}/{record.status.get('pid')}/{record.started:.6f}/{record.number}"


def build_start_tags(record: Record) -> dict[str, str]:
    """What is known when a job starts."""
    names = ("sweep", "config_hash", "build_key", "task", "number", "host", "pid", "process_started")
    known = {name: str(record.status[name]) for name in names if record.status.get(name) is not None}
    return {
        **known,
        "record": identify_record(record),
        "mlflow.source.name": "int8run",
        "mlflow.source.type": "LOCAL",
        **build_user_tag(),
    }


def build_user_tag() -> dict[str, str]:
    """Who runs this, where the machine knows."""
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError, ImportError):  # a container whose user has no name
        return {}


def build_end_tags(record: Record) -> dict[str, str]:
    """What is known when a job has ended."""
    tags = {}
    git = record.environment.get("git")
    if git:
        tags["git"] = str(git)
        tags["mlflow.source.git.commit"] = re.sub(r"^.*-g(?=[0-9a-f]+$)", "", str(git).removesuffix("-dirty"))
    if find_image_files(record):
        tags["mlflow.loggedImages"] = "True"  # as log_image does, which may have been cut off before
    if has_failed(record):
        tags["error"] = truncate(record.error or record.state, MAX_ERROR_LENGTH)
    return tags


def has_failed(record: Record) -> bool:
    """Whether there is an error to tell."""
    return record.state in ("FAILED", "KILLED")


def build_metrics(record: Record) -> list["Metric"]:
    """Final values at step 0, one value per step or frame of the series, and the machine's load with its own times."""
    from mlflow.entities import Metric

    now = get_timestamp(record)
    found = [Metric(sanitize_name(name), value, now, 0) for name, value in record.metrics.items()]
    for name, values in record.series.items():
        found += [Metric(sanitize_name(name), value, now, step) for step, value in enumerate(values)]
    for step, row in enumerate(read_csv_rows(record.folder / "system.csv")):
        at = to_milliseconds(float(row.pop("time")))
        found += [
            Metric(sanitize_name(f"system/{name}"), float(value), at, step)
            for name, value in row.items()
            if value
        ]
    return found


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file that are whole; none when it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        # a process that was killed leaves half a line
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


def find_image_files(record: Record) -> dict[str, Path]:
    """Pictures for the image grid by key; of a video its stills. Equal prompts and seeds have equal keys in all runs."""
    named = [name for drawn in record.images for name in drawn.get("stills") or [drawn["file"]]]
    paths = [record.folder / name for name in named if name.endswith(".png")]
    return {f"sample/{re.sub(r'[^a-zA-Z0-9_. -]', '_', path.stem)}": path for path in paths if path.is_file()}


def find_logged_images(names: Iterable[str]) -> dict[str, str | None]:
    """Pictures of the image grid that a run has by key, from the names of its files: None for one that is whole, else the name of the large
    copy. MLflow writes a small one after it, and a server may go away between the two.
    """
    known = {Path(name).name for name in names}
    return {
        stem.split("+")[0].replace("~", "/"): None if stem + SMALL_COPY_SUFFIX in known else stem
        for stem in (name.removesuffix(".png") for name in sorted(known) if name.endswith(".png"))
    }


def open_image(path: Path) -> Image.Image | None:
    """A picture, or None where a full disk left a part of it."""
    try:
        with Image.open(path) as opened:
            opened.load()
            return opened
    except (OSError, SyntaxError) as error:  # PIL's word for a damaged PNG
        log.warning("%s is no picture and is not uploaded: %s", path, error)
        return None


def list_artifacts(record: Record) -> Iterator[tuple[Path, str | None]]:
    """Files to keep as they are, each with the folder that it goes to. MLflow's own pictures are in `images`, so ours go to `samples`."""
    yield from (
        (path, None)
        for path in sorted(record.folder.iterdir())
        if path.suffix in KEPT_SUFFIXES and path.is_file()
    )
    folder = record.folder / "images"
    if folder.is_dir():
        yield from (
            (path, "samples") for path in sorted(folder.iterdir()) if path.suffix in (".png", ".webp")
        )


def build_tables(record: Record) -> dict[str, dict[str, Any]]:
    """Tables for MLflow's page, by file name, as `MlflowClient.log_table` writes them; that one adds rows to those it finds."""
    found = {name: read_csv_rows(record.folder / file) for name, file in TABLE_FILES.items()}
    return {name: build_table(lines) for name, lines in found.items() if lines}


def build_table(lines: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Rows as pandas writes them with orient="split"."""
    return {
        "columns": list(lines[0]),
        "data": [[parse_cell(value) for value in line.values()] for line in lines],
    }


def parse_cell(text: str) -> str | float | bool | None:
    """A value of a CSV file: numbers sort as numbers then."""
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text):
        return float(text) if re.search(r"[.e]", text) else int(text)
    return text or None


def build_table_tag(names: Iterable[str]) -> dict[str, str]:
    """The tag by which MLflow's page finds tables."""
    listed = [{"path": name, "type": "table"} for name in names]
    return {"mlflow.loggedArtifacts": json.dumps(listed)} if listed else {}


def build_dataset(record: Record) -> "DatasetInput | None":
    """The prompts; None when the job ended before they were read."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    settings = record.config.get("prompts") or {}
    prompts = list(dict.fromkeys(drawn["prompt"] for drawn in record.images)) or list(
        settings.get("prompts") or []
    )
    if not prompts:
        return None
    name = str(record.params.get("prompts", "prompts"))
    told = Dataset(
        name=truncate(name, 500),
        digest=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        source_type="local",
        source=json.dumps({"uri": str(settings.get("path") or f"prompts={name}")}),
        schema=json.dumps({"mlflow_colspec": [{"name": "prompt", "type": "string", "required": True}]}),
        profile=json.dumps({"num_rows": len(prompts), "prompts": prompts[:1000]}, ensure_ascii=False),
    )
    return DatasetInput(told, [InputTag("mlflow.data.context", "prompts")])
