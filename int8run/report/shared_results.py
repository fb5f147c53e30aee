"""Results of other people and machines: metrics.json files, read with distrust, for the atlas.

`atlas` groups them. A file says what it measured by itself; one of an earlier version needs status.json and
environment.json beside it, as a run leaves them.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.errors import FileError
from int8run.report.plausibility import Doubt, find_doubts
from int8run.report.runs import describe_environment
from int8run.tracking.run_record import (
    EARLIER_ATTEMPTS,
    RESULTS,
    RESULTS_SCHEMA,
    STATUS,
    describe_other_schema,
    restore_numbers,
)
from int8run.utils.plurals import count_noun
from int8run.utils.untrusted_json import parse_untrusted_json

log = logging.getLogger(__name__)
ENVIRONMENT = "environment.json"
MAX_FILE_BYTES = 100_000_000
MAX_TEXT_LENGTH = 200
UNKNOWN_DEVICE = "unknown device"
# settings of an earlier version that make a recipe
RECIPE_PARAMS = ("outlier", "rounding", "backend")


@dataclass(frozen=True)
class SharedResult:
    """One result.

    Args:
        path: of its metrics.json.
        model: name of the checkpoint.
        recipe: how it became INT8, and how it ran, in a few words.
        device: that it ran on.
        metrics: by their names; what cannot be true is left out.
        num_samples: whose images were compared.
        version: of int8run that measured.
    """

    path: Path
    model: str
    recipe: str
    device: str
    metrics: Mapping[str, float]
    num_samples: int
    version: str


@dataclass(frozen=True)
class LeftOut:
    """A number, or a whole file, that is not shown.

    Args:
        path: of the file.
        metric: and its value; empty for a whole file.
        reason: why.
    """

    path: Path
    metric: str
    reason: str


@dataclass(frozen=True)
class ResultCollection:
    """All results of some files.

    Args:
        results: that can be shown.
        left_out: what is not, and why.
    """

    results: Sequence[SharedResult]
    left_out: Sequence[LeftOut]


class UnusableResultError(Exception):
    """A file whose result cannot be shown; the message says why."""


def collect_results(paths: Sequence[Path]) -> ResultCollection:
    """Read every result in some files and folders, each content once.

    Raises:
        FileError: a path is not there, or no result is in any.
    """
    results: list[SharedResult] = []
    left_out: list[LeftOut] = []
    seen: dict[str, Path] = {}
    for file in find_result_files(paths):
        try:
            content, digest = read_content(file)
            if digest in seen:
                raise UnusableResultError(f"it is a copy of {seen[digest]}")
            seen[digest] = file
            result, doubts = read_result(file, content)
        except UnusableResultError as error:
            left_out.append(LeftOut(file, "", str(error)))
            continue
        results.append(result)
        for doubt in doubts:
            left_out.append(LeftOut(file, f"{shorten(doubt.metric)}={str(doubt.value)[:40]}", doubt.reason))
    for item in left_out:
        log.warning("%s %s is left out: %s", item.path, item.metric or "(the whole file)", item.reason)
    if not results:
        raise FileError(
            f"task.atlas: none of {count_noun(len(seen) + len(left_out), 'file')} has a result that can be "
            f"shown; give folders of runs, or their {RESULTS}"
        )
    return ResultCollection(results, left_out)


def find_result_files(paths: Sequence[Path]) -> list[Path]:
    """The metrics.json files that are named, and those in folders that are named, in order.

    Raises:
        FileError: a path is not there.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob(RESULTS))
            files |= {file: None for file in found if EARLIER_ATTEMPTS not in file.relative_to(path).parts}
        elif path.is_file():
            files[path] = None
        else:
            raise FileError(
                f"task.atlas: {path} is neither a file nor a folder (looked for {path.absolute()})"
            )
    return list(files)


def read_content(path: Path) -> tuple[Mapping[str, Any], str]:
    """The JSON object of a metrics.json, and a hash of what it says, however it is written.

    Raises:
        UnusableResultError: it is no such file.
    """
    content = read_json(path, "it")
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise UnusableResultError("it is no metrics.json of int8run")
    text = json.dumps(content, sort_keys=True)
    return content, hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path, name: str) -> Any:
    """What a JSON file of somebody else holds.

    Args:
        path: of the file.
        name: what an error calls it.

    Raises:
        UnusableResultError: it cannot be read, is too large, or is no JSON.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnusableResultError(f"{name} is larger than {MAX_FILE_BYTES / 1e6:g} MB")
        return restore_numbers(parse_untrusted_json(path.read_bytes()))
    except OSError as error:
        raise UnusableResultError(f"{name} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UnusableResultError(f"{name} {error}") from error


def read_result(path: Path, content: Mapping[str, Any]) -> tuple[SharedResult, list[Doubt]]:
    """One result, and its numbers that cannot be true.

    Raises:
        UnusableResultError: of another schema, or without what it takes to compare it.
    """
    schema = content.get("schema", 0)
    if type(schema) is not int or not 0 <= schema <= RESULTS_SCHEMA:
        raise UnusableResultError(describe_other_schema(schema))
    if schema == 0:
        content = {**content, **read_earlier_facts(path)}
    model, recipe, environment = content.get("model"), content.get("recipe"), content.get("environment")
    if not isinstance(model, str) or not isinstance(recipe, dict) or not isinstance(environment, dict):
        raise UnusableResultError("it does not say its model, its recipe and its environment")
    doubts = find_doubts(content["metrics"])
    doubted = {doubt.metric for doubt in doubts}
    images = content.get("images")
    result = SharedResult(
        path=path,
        model=shorten(model),
        recipe=shorten(" · ".join(str(value) for value in recipe.values())),
        device=shorten(describe_environment(environment) or UNKNOWN_DEVICE),
        metrics={name: value for name, value in content["metrics"].items() if name not in doubted},
        num_samples=len(images) if isinstance(images, list) else 0,
        version=shorten(str(content.get("int8run", "an earlier version"))),
    )
    return result, doubts


def read_earlier_facts(path: Path) -> dict[str, Any]:
    """Model, recipe and environment of a result of an earlier version, from the files beside it.

    Raises:
        UnusableResultError: they are not there.
    """
    status_path, environment_path = path.with_name(STATUS), path.with_name(ENVIRONMENT)
    status = read_json(status_path, STATUS) if status_path.is_file() else {}
    params = status.get("params") if isinstance(status, dict) else None
    if not isinstance(params, dict) or status.get("task") != "run":
        raise UnusableResultError(
            f"it is of an earlier version, which wrote model and recipe into {STATUS}: keep it in the folder "
            "of its run"
        )
    return {
        "model": params.get("model", "unknown model"),
        "recipe": {name: params[name] for name in RECIPE_PARAMS if name in params},
        "environment": read_json(environment_path, ENVIRONMENT) if environment_path.is_file() else {},
    }


def shorten(text: str) -> str:
    """A text of somebody else, no longer than a cell has room for."""
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[: MAX_TEXT_LENGTH - 1]}…"
