"""Where a model's configs are, for those who need its shapes and none of its weights.

`task=bench task.rows=N` builds skeletons from them. `source` finds whole models.
"""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download

from int8run.models.family import ModelSource
from int8run.models.hub import make_download_error
from int8run.models.modular_pipeline import list_used_components
from int8run.models.resolve_weights import CONFIG_NAME, is_local
from int8run.models.source import (
    ResolvedModel,
    choose_source_pipeline,
    names_weights,
    read_denoiser,
    read_source_index,
    select_denoisers,
)
from int8run.utils.paths import to_local_path


def resolve_configs(source: ModelSource) -> ResolvedModel:
    """Find the configs of a model's denoisers; of a model on the hub they alone are downloaded.

    Of a denoiser that is a file of its own, they are those of `model.base`.

    Raises:
        ConfigError: for a single file without `model.base`.
        FileError: when they are not there or cannot be downloaded.
    """
    index = read_source_index(source)
    location, revision = str(source.location), source.revision
    if isinstance(source.location, Mapping) or names_weights(location):
        location, revision = str(source.base), None
    pipeline_class = choose_source_pipeline(source, index)
    used = list_used_components(pipeline_class, source.workflow, source.skip_blocks)
    denoisers = []
    for component in select_denoisers(index, location, used):
        folder = find_config_folder(location, component, revision)
        denoisers.append(read_denoiser(folder, component, index, weights=folder))
    return ResolvedModel(
        folder=denoisers[0].weights.parent,
        denoisers=tuple(denoisers),
        has_single_files=False,
        pipeline_class=pipeline_class,
    )


def find_config_folder(location: str, component: str, revision: str | None) -> Path:
    """The folder with the config of a component, downloaded where the location is on the hub.

    Raises:
        FileError: when it cannot be downloaded.
    """
    path = to_local_path(location)
    if is_local(location) or path.is_dir():
        return path / component
    try:
        file = hf_hub_download(location, CONFIG_NAME, subfolder=component, revision=revision)
    except (OSError, ValueError) as error:
        raise make_download_error(location, "model.location", error) from error
    return Path(file).parent
