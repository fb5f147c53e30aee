"""Whether the files that settings name are here: asked once all are checked, before a model is loaded.

Knows paths alone. What may be on the hub is left to the code that downloads it, and what is in a file to the
code that reads it.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from int8run.errors import FileError
from int8run.generate.prompt_row import read_files
from int8run.generate.sample_inputs import INPUT_COLUMNS
from int8run.lora.find import find_lora
from int8run.models.resolve_weights import READ_SUFFIXES, is_local
from int8run.utils.paths import check_readable, expand_path, to_local_path


def check_named_files(settings: Mapping[str, Any]) -> None:
    """Check that the files and folders are there that the settings of a job name.

    Args:
        settings: the composed config as plain containers, whose values are checked.

    Raises:
        FileError: for the first one that is missing.
        LoraError: for a LoRA.
    """
    task = str(settings["task"]["_target_"]).rpartition(".")[2]
    for check in CHECKS_OF_TASKS.get(task, ()):
        check(settings)


def check_prompt_file(settings: Mapping[str, Any]) -> None:
    """Raise FileError where the file of prompts, or an input of all prompts, is missing."""
    prompts = settings["prompts"]
    location = prompts.get("path")
    if location:
        check_readable("prompts.path", to_local_path(str(location)), takes_folder=False)
    for column in INPUT_COLUMNS:
        value = prompts.get(column)
        if value is not None:
            for file in read_files(value, f"prompts.{column}", Path()):
                check_readable(file.place, file.path, takes_folder=False)


def check_lora_files(settings: Mapping[str, Any]) -> None:
    """Raise LoraError where a LoRA is neither here nor can be on the hub."""
    lora_dir = settings.get("lora_dir")
    if lora_dir is not None:
        lora_dir = expand_path(str(lora_dir))
    for adapter in settings["lora"].get("adapters") or ():
        location = adapter.get("path")
        if not adapter.get("enabled", True) or adapter.get("weight_name") is not None:
            continue
        # of a mapping the model's base chooses an entry, which is not known yet
        if isinstance(location, str) and location:
            find_lora(location, None, lora_dir)


def check_model_files(settings: Mapping[str, Any]) -> None:
    """Raise FileError where a model, or a part of it, is named by a path that is not there."""
    model = settings["model"]
    location = model.get("location")
    files = location.values() if isinstance(location, Mapping) else [location]
    for file in files:
        check_location("model.location", file)
    check_location("model.base", model.get("base"))
    for name, part in (model.get("parts") or {}).items():
        check_location(f"model.parts.{name}", part)


def check_location(key: str, location: object) -> None:
    """Raise FileError for a path that is not there; what may be a hub id passes.

    Args:
        key: the setting.
        location: a path, a hub id, or a file on the hub; None passes.
    """
    if not isinstance(location, str) or not location:
        return
    path = to_local_path(location)
    is_file = path.suffix.lower() in READ_SUFFIXES
    # on the hub a model is org/name, and a file org/name/file
    least_parts = 3 if is_file else 2
    may_be_on_hub = not is_local(location) and len(location.split("/")) >= least_parts
    if may_be_on_hub and not os.path.lexists(path):
        return
    if not is_missing(path):
        check_readable(key, path)
        return
    named = f"{key}={location}"
    if str(path.absolute()) != location:
        named += f": {path.absolute()}"
    if is_file:
        raise FileError(f"{named}: no such file; on the hub a file is org/repository/name{path.suffix}")
    raise FileError(f"{named}: no such folder; on the hub a model is org/name")


def is_missing(path: Path) -> bool:
    """Whether nothing is there. False where it cannot be told, such as in a folder that is not readable."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def check_clip_files(settings: Mapping[str, Any]) -> None:
    """Raise FileError where a text encoder's file is missing."""
    check_paths("clip.path", settings["clip"].get("path"))


def check_int8_files(settings: Mapping[str, Any]) -> None:
    """Raise FileError where the file of INT8 layers is missing."""
    check_paths("int8.checkpoint", settings["int8"].get("checkpoint"))


def check_paths(key: str, paths: object) -> None:
    """Raise FileError where one of the paths of a setting is missing.

    Args:
        key: the setting.
        paths: one, or a mapping from components to one each; None passes.
    """
    by_component = paths if isinstance(paths, Mapping) else {None: paths}
    for component, path in by_component.items():
        if not isinstance(path, str) or not path:
            continue
        full_key = key if component is None else f"{key}.{component}"
        check_readable(full_key, expand_path(path))


CHECKS_OF_A_RUN = (
    check_prompt_file,
    check_lora_files,
    check_model_files,
    check_clip_files,
    check_int8_files,
)
# by task class: what its settings name and it opens only after seconds
CHECKS_OF_TASKS: Mapping[str, tuple[Callable[[Mapping[str, Any]], None], ...]] = {
    "Run": CHECKS_OF_A_RUN,
    "Search": CHECKS_OF_A_RUN,
    "Bench": (check_model_files,),
}
