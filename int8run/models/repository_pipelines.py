"""Which class the repository of a model names, as far as that is known without asking the hub.

`source` and `pipeline.sample_checks` ask, so that a mode or an input that does not fit is refused before
anything is downloaded. What they find here is checked against the repository's own index afterwards.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import yaml

from int8run.errors import FileError
from int8run.models.family import ModelSource
from int8run.models.model_folders import names_weights, read_model_index
from int8run.models.pipeline_index import has_pipeline_index
from int8run.utils.paths import to_local_path

TABLE_FILE = Path(__file__).with_suffix(".yaml")


@functools.cache
def load_repository_pipelines() -> Mapping[str, str]:
    """The class that each repository of the table names, by its id on the hub."""
    table: Mapping[str, str] = yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))
    return table


def find_named_pipeline(source: ModelSource) -> str | None:
    """The class that a model's repository names; None where only the hub can tell.

    Args:
        source: the model. Of a denoiser alone, `base` is the repository.
    """
    location: object = source.location
    if isinstance(location, Mapping) or names_weights(str(location)):
        location = source.base
    if location is None:
        return None
    folder = to_local_path(str(location))
    if folder.is_dir():
        return read_named_class(folder) if has_pipeline_index(folder) else None
    if source.revision is not None:
        return None  # another revision may name another class
    return load_repository_pipelines().get(str(location))


def read_named_class(folder: Path) -> str | None:
    """The class that the index of a folder names; None where it cannot be read, which loading refuses."""
    try:
        named = read_model_index(folder, str(folder)).get("_class_name")
    except FileError:
        return None
    return named if isinstance(named, str) else None
