"""Reads the index of a pipeline's folder; that of a modular one, `modular_model_index.json`, as any other.

`resolve_weights` and `source` call it. It must work without diffusers. Code that a repository brings is
refused here, before anything else of it is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.errors import FileError
from int8run.utils.untrusted_json import parse_untrusted_json

MODEL_INDEX_NAME, MODULAR_INDEX_NAME = "model_index.json", "modular_model_index.json"
# beside it where a repository has blocks of its own, which are Python
BLOCKS_CONFIG_NAME, CODE_KEY = "modular_config.json", "auto_map"


@dataclass(frozen=True)
class ComponentOrigin:
    """Where the index of a modular pipeline says that a component lies.

    Args:
        location: hub id or folder.
        subfolder: in it; None: itself.
        revision: on the hub.
    """

    location: str
    subfolder: str | None = None
    revision: str | None = None


def has_pipeline_index(folder: Path) -> bool:
    """Return whether a folder is that of a pipeline, modular or not."""
    return any((folder / name).is_file() for name in (MODEL_INDEX_NAME, MODULAR_INDEX_NAME))


def is_modular_folder(folder: Path) -> bool:
    """Return whether a folder has the index of a modular pipeline and no other."""
    return (folder / MODULAR_INDEX_NAME).is_file() and not (folder / MODEL_INDEX_NAME).is_file()


def read_pipeline_index(folder: Path) -> Mapping[str, Any]:
    """Return a pipeline's index: [library, class] by component, and the pipeline's settings.

    Of a folder with both, the one that is not modular counts.

    Raises:
        FileError: when it cannot be read, or when the folder has code of its own.
    """
    if not is_modular_folder(folder):
        return read_json(folder / MODEL_INDEX_NAME)
    check_no_code(folder)
    entries = read_json(folder / MODULAR_INDEX_NAME)
    return {name: get_component_class(entry) or entry for name, entry in entries.items()}


def check_no_code(folder: Path) -> None:
    """Raise FileError for a folder whose blocks are Python files of its own."""
    file = folder / BLOCKS_CONFIG_NAME
    if not file.is_file():
        return
    code = read_json(file).get(CODE_KEY)
    if code:
        named = code
        if isinstance(code, Mapping):
            named = ", ".join(map(str, code.values()))
        raise FileError(
            f"{folder} has blocks of its own ({named}), which are code; code from repositories is never run: "
            "take a folder whose blocks diffusers has"
        )


def get_component_class(entry: object) -> list[Any] | None:
    """The [library, class] of an entry; None for one that is no component.

    A component that was not loaded when the index was written has its class in the type hint alone.
    """
    spec = get_component_spec(entry)
    if spec is None or not isinstance(entry, list):
        return None
    named = entry[:2]
    hint = spec.get("type_hint")
    if None in named and isinstance(hint, list) and len(hint) == 2:
        return hint
    return named


def get_component_spec(entry: object) -> Mapping[str, Any] | None:
    """Where an entry says that its component lies; None for one that is no component."""
    is_component = isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], Mapping)
    return entry[2] if is_component else None  # type: ignore[index]


def list_components_elsewhere(folder: Path) -> dict[str, ComponentOrigin]:
    """The components of a modular pipeline that its folder lacks, and where its index says they are."""
    if not (folder / MODULAR_INDEX_NAME).is_file():
        return {}
    elsewhere = {}
    for name, entry in read_json(folder / MODULAR_INDEX_NAME).items():
        spec = get_component_spec(entry)
        if spec is None or (folder / name).is_dir():
            continue
        location = spec.get("pretrained_model_name_or_path") or spec.get("repo")
        if location:
            elsewhere[name] = ComponentOrigin(str(location), spec.get("subfolder"), spec.get("revision"))
    return elsewhere


def read_json(file: Path) -> Mapping[str, Any]:
    """Return the JSON object of a file.

    Raises:
        FileError: when it cannot be read, or holds something else.
    """
    try:
        content = parse_untrusted_json(file.read_bytes())
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FileError(f"{file} cannot be read: it {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{file} is not a JSON object")
    return content
