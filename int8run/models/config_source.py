"""Where a model's configs are, for those who need its shapes and none of its weights.

`task=bench task.rows=N` builds skeletons from them. `source` finds whole models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from int8run.models.family import ModelSource
from int8run.models.hub import make_download_error
from int8run.models.model_folders import names_weights, read_source_index
from int8run.models.modular_blocks import list_used_components
from int8run.models.pipeline_index import ComponentOrigin, list_components_elsewhere
from int8run.models.resolve_weights import CONFIG_NAME, download_index, is_local
from int8run.models.source import ResolvedModel, choose_source_pipeline, read_denoiser, select_denoisers
from int8run.utils.paths import to_local_path


def resolve_configs(source: ModelSource) -> ResolvedModel:
    """Find the configs of a model's denoisers; of a model on the hub they alone are downloaded.

    Of a denoiser that is a file of its own, they are those of `model.base`. The weights of a denoiser are
    that file where it is here, else the folder of its config, which may hold none.

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
    components = select_denoisers(index, location, used)
    files = find_local_files(source, components)
    folders = {component: find_config_folder(location, component, revision) for component in components}
    denoisers = []
    for component, folder in folders.items():
        weights = files.get(component, folder)
        denoisers.append(read_denoiser(folder, component, index, weights=weights))
    return ResolvedModel(
        folder=folders[components[0]].parent,
        denoisers=tuple(denoisers),
        has_single_files=bool(files),
        pipeline_class=pipeline_class,
        workflow=source.workflow,
        skip_blocks=tuple(source.skip_blocks),
    )


def find_local_files(source: ModelSource, components: Sequence[str]) -> dict[str, Path]:
    """The files and folders of denoisers alone that are here, by component; nothing is downloaded.

    Args:
        source: the model.
        components: its denoisers; a single file is that of the first.
    """
    if isinstance(source.location, Mapping):
        named = {str(component): str(file) for component, file in source.location.items()}
    elif names_weights(str(source.location)):
        named = {components[0]: str(source.location)}
    else:
        return {}
    files = {component: to_local_path(file) for component, file in named.items()}
    return {component: file for component, file in files.items() if file.exists()}


def find_config_folder(location: str, component: str, revision: str | None) -> Path:
    """The folder with the config of a component, downloaded where the location is on the hub.

    A component that a modular pipeline's folder lacks is where the pipeline's index finds it.

    Raises:
        FileError: when it cannot be downloaded.
    """
    path = to_local_path(location)
    if is_local(location) or path.is_dir():
        origin = list_components_elsewhere(path).get(component)
        return path / component if origin is None else find_config_elsewhere(origin)
    origin = None
    try:
        origin = list_components_elsewhere(download_index(location, revision)).get(component)
        return download_config(ComponentOrigin(location, component, revision))
    except (OSError, ValueError, EntryNotFoundError) as error:
        is_absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if is_absent and origin is not None:
            return find_config_elsewhere(origin)
        raise make_download_error(location, "model.location", error) from error


def find_config_elsewhere(origin: ComponentOrigin) -> Path:
    """The folder with the config of a component that lies outside the pipeline's folder.

    Raises:
        FileError: when it cannot be downloaded.
    """
    path = to_local_path(origin.location)
    if is_local(origin.location) or path.is_dir():
        return path / (origin.subfolder or "")
    try:
        return download_config(origin)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise make_download_error(origin.location, "the denoiser of the pipeline", error) from error


def download_config(origin: ComponentOrigin) -> Path:
    """Download the config of a component from the hub, and return the folder that it is in.

    Raises:
        OSError, ValueError: of the hub.
    """
    file = hf_hub_download(origin.location, CONFIG_NAME, subfolder=origin.subfolder, revision=origin.revision)
    return Path(file).parent
