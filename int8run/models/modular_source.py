"""Finds the components of modular pipelines, which may lie in several repositories.

`source` calls it. What a hub id names is downloaded, without pickled files and without code.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from int8run.errors import FileError
from int8run.models.hub import check_repository, make_download_error
from int8run.models.pipeline_index import ComponentOrigin, list_components_elsewhere
from int8run.models.resolve_weights import is_local
from int8run.utils.paths import SAFETENSORS, to_local_path

# files of a component besides its configs: weights, vocabularies, chat templates
COMPONENT_SUFFIXES = (SAFETENSORS, ".txt", ".model", ".jinja")


def download_modular(
    location: str, revision: str | None, index: Mapping[str, Any], without: tuple[str, ...]
) -> Path:
    """Download the components of a modular pipeline; nothing pickled and no code.

    Args:
        location: its hub id.
        revision: on the hub.
        index: of the pipeline.
        without: components whose weights are not needed; their configs are.

    Returns:
        The folder.

    Raises:
        OSError, ValueError: of the hub.
    """
    patterns = ["*.json"]
    for name, entry in index.items():
        if isinstance(entry, list):
            patterns.append(f"{name}/*.json")
            if name not in without:
                patterns += [f"{name}/*{suffix}" for suffix in COMPONENT_SUFFIXES]
    return Path(snapshot_download(location, revision=revision, allow_patterns=patterns))


def resolve_components_elsewhere(folder: Path, used: Collection[str]) -> dict[str, Path]:
    """Return the folders of components that a modular pipeline's index finds in other places.

    What is on the hub is downloaded, without pickled files and code.

    Args:
        folder: of the pipeline.
        used: components that are needed.

    Raises:
        FileError: when one is not there or cannot be downloaded.
    """
    elsewhere = list_components_elsewhere(folder)
    return {name: resolve_component(name, origin) for name, origin in elsewhere.items() if name in used}


def resolve_component(name: str, origin: ComponentOrigin) -> Path:
    """Return the folder of one component; see `resolve_components_elsewhere`."""
    path = to_local_path(origin.location)
    subfolder = origin.subfolder or ""
    if is_local(origin.location) or path.is_dir():
        if not (path / subfolder).is_dir():
            raise FileError(
                f"the index of the pipeline finds its {name} in {path / subfolder}, which is not there; put "
                f"it beside the index, into a folder {name}"
            )
        return path / subfolder
    check_repository(origin.location, f"the {name} of the pipeline", origin.revision)
    place = f"{subfolder}/" if subfolder else ""
    patterns = [f"{place}*.json"] + [f"{place}*{suffix}" for suffix in COMPONENT_SUFFIXES]
    try:
        downloaded = snapshot_download(origin.location, revision=origin.revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise make_download_error(origin.location, f"the {name} of the pipeline", error) from error
    return Path(downloaded) / subfolder
