"""The files that `int8.checkpoint` names: which belongs to which denoiser, and whether they hold its layers.

`prequantized.py` opens them; `given_files.py` checks them before the model's weights are read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from int8run.errors import ConfigError, FileError
from int8run.pipeline.checkpoint_weights import DenoiserWeights
from int8run.text_encoders.detect import find_encoders
from int8run.utils.paths import expand_path


def resolve_checkpoint_paths(
    checkpoint: str | Mapping[str, str], components: Sequence[str]
) -> dict[str, Path]:
    """The file or folder of each denoiser's INT8 layers.

    Args:
        checkpoint: a file, a folder, a folder with one for each component, or a mapping from components.
        components: names of the pipeline's denoisers.

    Raises:
        ConfigError: when it is not clear which file belongs to which denoiser.
    """
    if isinstance(checkpoint, Mapping):
        if set(checkpoint) != set(components):
            raise ConfigError(
                f"int8.checkpoint names {', '.join(checkpoint)}; the model has {', '.join(components)}"
            )
        return {name: expand_path(path) for name, path in checkpoint.items()}
    path = expand_path(checkpoint)
    if all((path / name).is_dir() for name in components):
        return {name: path / name for name in components}
    if len(components) > 1:
        example = ", ".join(f"{name}: <file>" for name in components)
        raise ConfigError(
            f"int8.checkpoint={checkpoint} is one file, the model has {len(components)} denoisers; set "
            f"'int8.checkpoint={{{example}}}'"
        )
    return {components[0]: path}


def check_has_int8_layers(weights: DenoiserWeights, checkpoint: str | Mapping[str, str]) -> None:
    """Check that the files of `int8.checkpoint` hold INT8 layers of the model.

    Args:
        weights: the files, opened.
        checkpoint: as it was given, for the message.

    Raises:
        FileError: when they hold none; it says what they hold, where that is known.
    """
    if weights.find_int8_layers():
        return
    check_is_no_text_encoder(weights)
    for file in weights.parts.values():
        other = file.describe_other_model()
        if other:
            raise FileError(f"int8.checkpoint={checkpoint} is no checkpoint of a {file.class_name}{other}")
    raise FileError(
        f"{checkpoint} holds no INT8 layer that can be used as it is; set model.location to it, or "
        "quantize anew"
    )


def check_is_no_text_encoder(weights: DenoiserWeights) -> None:
    """Check that files without an INT8 layer of the denoiser are not text encoders.

    Raises:
        FileError: naming the setting that takes the file.
    """
    for file in weights.parts.values():
        shapes = {key: info.shape for key, info in file.files.items()}
        encoders = find_encoders(shapes)
        if encoders:
            names = " and ".join(encoder.name for encoder in encoders.values())
            raise FileError(
                f"int8.checkpoint={file.path} is a text encoder ({names}), and int8.checkpoint takes layers "
                f"of the denoiser; set clip=auto clip.path={file.path}"
            )
