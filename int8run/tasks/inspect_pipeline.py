"""What `task=inspect` says about a pipeline's folder: its components, one by one.

Called by `inspect_file` for a folder with the index of a pipeline. Of the weights only headers are read.
"""

from collections.abc import Iterator
from pathlib import Path

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.layer import FLOAT
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.pipeline_index import has_pipeline_index, read_pipeline_index
from int8run.tasks.file_description import FileDescription, Row, count_names, format_size
from int8run.tasks.inspect_checkpoint import describe_family
from int8run.text_encoders.detect import find_encoder_of_class
from int8run.utils.paths import SAFETENSORS


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder holds a pipeline as diffusers saves it."""
    return has_pipeline_index(folder)


def inspect_pipeline(folder: Path, declared: DeclaredFormat) -> FileDescription:
    """Describe the pipeline in a folder.

    Args:
        folder: with an index.
        declared: what the user says of the files.

    Raises:
        FileError: when its index cannot be read.
    """
    index = read_pipeline_index(folder)
    rows: list[Row] = [("kind", "pipeline"), ("class", str(index.get("_class_name")))]
    for name, entry in index.items():
        # [library, class]; [null, null] for a component that the pipeline does without
        if not isinstance(entry, list) or len(entry) != 2 or None in entry:
            continue
        description = describe_component(folder / name, str(entry[1]), declared)
        rows.append((name, ", ".join(description)))
    return FileDescription(str(folder), rows)


def describe_component(folder: Path, class_name: str, declared: DeclaredFormat) -> Iterator[str]:
    """Describe a component: its class, its family where it has one, its size, and how its weights are stored.

    Args:
        folder: of the component.
        class_name: of diffusers or transformers.
        declared: what the user says of the files.
    """
    yield class_name
    if not folder.is_dir():
        yield "not in this folder"
        return
    if not any(folder.glob(f"*{SAFETENSORS}*")):
        yield "no weights"
        return
    try:
        with TensorFiles.open(folder) as files:
            yield from describe_weights(files, folder.name, class_name, declared)
    except (ConfigError, FileError) as error:
        yield f"cannot be read: {error}"


def describe_weights(
    files: TensorFiles, name: str, class_name: str, declared: DeclaredFormat
) -> Iterator[str]:
    """Describe the weights of a component.

    Args:
        files: of the component.
        name: of the component.
        class_name: of diffusers or transformers.
        declared: what the user says of the files.

    Raises:
        ConfigError: when a setting does not fit the files.
        FileError: when a weight cannot be read.
    """
    layers = read_layers(files, declared=declared)
    if name in DENOISER_COMPONENTS:
        yield f"family {describe_family(files, '', layers).partition(' (')[0]}"
    else:
        shapes = {key: info.shape for key, info in files.items()}
        encoder = find_encoder_of_class(class_name, shapes)
        if encoder is not None:
            yield f"encoder {encoder.name}"
    yield format_size(sum(info.nbytes for info in files.values()))
    quantized = [layer.label for layer in layers.values() if layer.storage_dtype != FLOAT]
    yield count_names(quantized) or "float"
