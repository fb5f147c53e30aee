"""What of a run's output folder becomes what of an MLflow run: names, values, tags, tables, images and files.

Pure translation: `mlflow_upload` sends it. The same folder always gives the same payload, so that an upload
may be repeated and MLflow knows what it has already.
"""

import csv
import getpass
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyascii import anyascii
from PIL import Image

from int8run.tracking.run_record import FAILED, KILLED, Record
from int8run.tracking.setting_names import hash_text, shorten_value

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric

log = logging.getLogger(__name__)

# What every MLflow server takes, in characters.
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 500
MAX_ERROR_LENGTH = 5000
MAX_PROMPTS = 1000  # of the dataset's profile
MAX_PROMPT_LENGTH = 5000  # of each of them
FORBIDDEN_CHARACTERS = re.compile(r"[^\w\-. :/]", flags=re.ASCII)

SMALL_COPY_SUFFIX = "+compressed.webp"  # how the name of MLflow's small copy of an image ends
KEPT_SUFFIXES = {".yaml", ".json", ".csv", ".png", ".log"}  # of files at the top of the folder
SAMPLES = "samples"  # the folder of our images in a run: MLflow's own are in `images`
INPUTS = "inputs"  # the folder of the files that samples began with, in the run and here
# MLflow's -> ours
TABLE_FILES = {
    "layers.json": "layers.csv",
    "text_encoders.json": "text_encoders.csv",
    "vae.json": "vae.csv",
}

START_TAGS = (
    "sweep",
    "config_hash",
    "build_key",
    "task",
    "number",
    "host",
    "pid",
    "process_started",
    "process_since_boot",
)
INTEGER_OR_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?")


# -- times, names and texts ----------------------------------------------------------------------------------


def to_milliseconds(seconds: float) -> int:
    """A Unix time as MLflow keeps it."""
    return int(seconds * 1000)


def get_timestamp(record: Record) -> int:
    """The time of everything that a record holds, in milliseconds.

    Always the same, so that the store knows what it has already.
    """
    return to_milliseconds(record.ended or record.started)


def sanitize_name(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return FORBIDDEN_CHARACTERS.sub("_", name)[:MAX_NAME_LENGTH]


def truncate(text: str, max_length: int) -> str:
    """A text of at most so many characters; `…` shows that it was longer."""
    text = make_storable(text)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def make_storable(text: str) -> str:
    """A text that every database keeps: zeros and the bytes of a name that is not UTF-8 are spelled out."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def make_unique_names(names: Iterable[str]) -> dict[str, str]:
    """Names as MLflow takes them, by our own.

    One that would be the same as an earlier one, or too long, ends with a hash.
    """
    unique: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        sanitized = sanitize_name(name)
        if sanitized in taken or len(name) > MAX_NAME_LENGTH:
            sanitized = f"{sanitized[: MAX_NAME_LENGTH - 9]}-{hash_text(name)[:8]}"
        unique[name] = sanitized
        taken.add(sanitized)
    return unique


def build_tag_filter(name: str, value: str) -> str:
    """The condition of MLflow's filter language that a tag has a value, whatever quotes are in it."""
    if "'" not in value:
        return f"tags.{name} = '{value}'"
    if '"' not in value:
        return f'tags.{name} = "{value}"'
    # neither kind can be escaped in this language; `_` stands for any one character
    return "tags.{} LIKE '{}'".format(name, value.replace("'", "_"))


def identify_record(record: Record) -> str:
    """A text that is equal for all uploads of one job, and for no two jobs."""
    return f"{record.status.get('host')}/{record.status.get('pid')}/{record.started:.6f}/{record.number}"


# -- params and tags -----------------------------------------------------------------------------------------


def build_params(record: Record) -> dict[str, str]:
    """The settings; a long value is its beginning and a hash, and config.yaml has it whole."""
    params = record.params
    names = make_unique_names(params)
    return {
        names[name]: shorten_value(make_storable(str(value)), MAX_PARAM_LENGTH)
        for name, value in params.items()
    }


def name_run(record: Record) -> str:
    """The name of a run, no longer than every store takes."""
    return shorten_value(make_storable(record.label), MAX_NAME_LENGTH)


def build_start_tags(record: Record) -> dict[str, str]:
    """What is known when a job starts."""
    known = {}
    for name in START_TAGS:
        value = record.status.get(name)
        if value is not None:
            known[name] = str(value)
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
        # `v1.0-5-g8664a31abcde-dirty` -> `8664a31abcde`
        tags["mlflow.source.git.commit"] = re.sub(r"^.*-g(?=[0-9a-f]+$)", "", str(git).removesuffix("-dirty"))
    if find_image_files(record):
        tags["mlflow.loggedImages"] = "True"  # log_image sets it, too, unless it was interrupted before
    if has_failed(record):
        tags["error"] = truncate(record.error or record.state, MAX_ERROR_LENGTH)
    return tags


def has_failed(record: Record) -> bool:
    """Whether a job ended with an error."""
    return record.state in (FAILED, KILLED)


# -- metrics -------------------------------------------------------------------------------------------------


def build_metrics(record: Record) -> list["Metric"]:
    """Final values at step 0, series by step or frame, and the machine's load with its own times."""
    from mlflow.entities import Metric

    now = get_timestamp(record)
    metrics = []
    for name, value in record.metrics.items():
        metrics.append(Metric(sanitize_name(name), value, now, 0))
    for name, values in record.series.items():
        for step, value in enumerate(values):
            metrics.append(Metric(sanitize_name(name), value, now, step))
    for step, row in enumerate(read_csv_rows(record.folder / "system.csv")):
        timestamp = to_milliseconds(float(row.pop("time")))
        for name, text in row.items():
            if text:
                metrics.append(Metric(sanitize_name(f"system/{name}"), float(text), timestamp, step))
    return metrics


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a CSV file; none when there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A process that was killed may have left a part of a line.
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


# -- images --------------------------------------------------------------------------------------------------


def find_image_files(record: Record) -> dict[str, Path]:
    """The images for MLflow's image grid, by key; of a video its stills.

    Equal prompts and seeds have equal keys in all runs. MLflow takes ASCII letters alone. A row of the grid
    is a key and a column a run: what a sample began with stands in the rows above it, each input once.
    """
    files = {}
    for sample in record.images:
        for position, name in enumerate(sample.get("stills") or [sample["file"]]):
            for input_name in list_input_images(sample, position):
                path = record.folder / input_name
                if path.is_file():
                    files[f"input/{make_image_key(path.stem.removeprefix('input_'))}"] = path
            path = record.folder / name
            if name.endswith(".png") and path.is_file():
                files[f"sample/{make_image_key(path.stem)}"] = path
    return files


def list_input_images(sample: Mapping[str, Any], still: int) -> list[str]:
    """The images of a sample's inputs that belong beside one of its stills, below the output folder.

    Args:
        sample: an entry of metrics.json; those of earlier versions have no inputs.
        still: its position among the stills; 0 for an image.
    """
    names: list[str] = []
    for entry in sample.get("inputs") or []:
        images = entry.get("images") or []
        # those of a video have one for each still, any other one stands beside all
        names += images[still : still + 1] or images[-1:]
    return names


def make_image_key(name: str) -> str:
    """The name of an image as MLflow takes it: `000_狐狸_s0` -> `000_HuLi_s0`."""
    return re.sub(r"[^a-zA-Z0-9_. -]", "_", anyascii(name))


def find_logged_images(paths: Iterable[str]) -> dict[str, str | None]:
    """The images that a run has in its image grid.

    MLflow writes a large and then a small copy of each image, and a server may go away between the two.

    Args:
        paths: of the files in the run's image folder.

    Returns:
        By key: None for a complete image, else the name of the large copy, without its ending.
    """
    names = {Path(path).name for path in paths}
    logged: dict[str, str | None] = {}
    for name in sorted(names):
        if not name.endswith(".png"):
            continue
        large_copy = name.removesuffix(".png")
        key = large_copy.split("+")[0].replace("~", "/")
        is_complete = large_copy + SMALL_COPY_SUFFIX in names
        logged[key] = None if is_complete else large_copy
    return logged


def open_image(path: Path) -> Image.Image | None:
    """Read an image; None, with a warning, where it is damaged, for example by a full disk."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        log.warning("%s is not an image and is not uploaded: %s", path, error)
        return None


# -- files and tables ----------------------------------------------------------------------------------------


def list_artifacts(record: Record) -> Iterator[tuple[Path, str | None]]:
    """The files to keep as they are, each with its folder in the run; None: at the top."""
    for path in sorted(record.folder.iterdir()):
        if path.suffix in KEPT_SUFFIXES and path.is_file():
            yield path, None
    for path in sorted(record.folder.glob("images/*")):
        if path.suffix in (".png", ".webp"):
            yield path, SAMPLES
    for path in sorted(record.folder.glob(f"{INPUTS}/*")):
        if path.is_file():
            yield path, INPUTS


def build_tables(record: Record) -> dict[str, dict[str, Any]]:
    """The tables for MLflow's page, by file name, as `MlflowClient.log_table` writes them.

    `log_table` itself would add rows to those that it finds.
    """
    rows_by_name = {name: read_csv_rows(record.folder / file) for name, file in TABLE_FILES.items()}
    return {name: build_table(rows) for name, rows in rows_by_name.items() if rows}


def build_table(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Rows as pandas writes them with orient="split"."""
    return {
        "columns": list(rows[0]),
        "data": [[parse_cell(text) for text in row.values()] for row in rows],
    }


def parse_cell(text: str) -> str | float | bool | None:
    """A value of a CSV file with its type, so that MLflow's page sorts numbers as numbers."""
    if text in ("true", "false"):
        return text == "true"
    if INTEGER_OR_FLOAT.fullmatch(text):
        return float(text) if re.search(r"[.e]", text) else int(text)
    return text or None


def build_table_tag(names: Iterable[str]) -> dict[str, str]:
    """The tag by which MLflow's page finds tables."""
    tables = [{"path": name, "type": "table"} for name in names]
    return {"mlflow.loggedArtifacts": json.dumps(tables)} if tables else {}


# -- prompts -------------------------------------------------------------------------------------------------


def build_dataset(record: Record) -> "DatasetInput | None":
    """The prompts as MLflow's dataset of a run; None when the job ended before they were read."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    prompts = list_prompts(record)
    if not prompts:
        return None
    name = str(record.params.get("prompts", "prompts"))
    source = get_prompt_settings(record).get("path") or f"prompts={name}"
    listed = [truncate(text, MAX_PROMPT_LENGTH) for text in prompts[:MAX_PROMPTS]]
    columns = [{"name": "prompt", "type": "string", "required": True}]
    dataset = Dataset(
        name=truncate(name, MAX_PARAM_LENGTH),
        digest=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        source_type="local",
        source=json.dumps({"uri": str(source)}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": len(prompts), "prompts": listed}, ensure_ascii=False),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "prompts")])


def list_prompts(record: Record) -> list[str]:
    """The prompts that images were generated for, else those of the settings; each once."""
    generated = list(dict.fromkeys(sample["prompt"] for sample in record.images))
    return generated or list(get_prompt_settings(record).get("prompts") or [])


def get_prompt_settings(record: Record) -> Mapping[str, Any]:
    """The settings below `prompts`."""
    return record.config.get("prompts") or {}
