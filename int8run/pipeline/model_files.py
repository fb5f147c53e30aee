"""The files of a model: their hashes, and which of them hold quantized weights.

load.py checks them before diffusers reads them. The hashes are part of the keys of both caches, and of the
provenance of what is written.
"""

import math
from collections.abc import Collection
from pathlib import Path

from int8run.checkpoints.checkpoint_files import read_file_content
from int8run.checkpoints.detect import list_quantized_weights, read_layers
from int8run.checkpoints.layer import FLOAT, CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.unsupported import read_quant_config
from int8run.errors import FileError
from int8run.models.resolve_weights import READ_SUFFIXES
from int8run.models.source import ResolvedModel
from int8run.utils.disk_cache import DiskCache
from int8run.utils.plurals import count_noun

# files of a diffusers folder that decide what a model computes
HASHED_SUFFIXES = (".safetensors", ".json", ".model", ".txt")


def hash_model_files(source: ResolvedModel, cache: DiskCache) -> list[tuple[str, str]]:
    """Name and SHA-256 of every file that decides what a model generates.

    Args:
        source: where the model is.
        cache: remembers hashes of files that did not change.
    """
    return [(name, cache.hash_file(path)) for name, path in sorted(find_model_files(source).items())]


def count_weight_numbers(source: ResolvedModel) -> int:
    """How many numbers the files with weights of a model hold, whatever their dtypes, by their headers."""
    num_numbers = 0
    for path in find_model_files(source).values():
        if path.suffix.lower() in READ_SUFFIXES:
            num_numbers += sum(math.prod(info.shape) for info in read_file_content(path).infos)
    return num_numbers


def find_model_files(source: ResolvedModel) -> dict[str, Path]:
    """Every file that decides what a model generates, by its name."""
    files = find_hashed_files(source.folder)
    for component, folder in source.elsewhere.items():
        for name, path in find_hashed_files(folder).items():
            files[f"{component}: {name}"] = path
    if source.has_single_files:
        for denoiser in source.denoisers:
            for path in list_safetensors(denoiser.weights):
                files[f"{denoiser.component}: {path.name}"] = path
    return files


def find_hashed_files(folder: Path) -> dict[str, Path]:
    """The files in a folder that decide what a model computes, by their paths in it."""
    files = {}
    for path in folder.rglob("*"):
        if path.suffix in HASHED_SUFFIXES:
            files[path.relative_to(folder).as_posix()] = path
    return files


def list_safetensors(path: Path) -> list[Path]:
    """The `.safetensors` files of a folder, or the one file that a path names."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def has_quantized_weights(path: Path) -> bool:
    """Whether a safetensors file, or those of a folder, hold quantized weights."""
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return False
    with TensorFiles.open(path) as files:
        return bool(list_quantized_weights(files))


def find_scaled_layers(folder: Path) -> list[CheckpointLayer]:
    """The weights of a component that diffusers and transformers would use without their scales.

    Args:
        folder: of the component; where its config names a method, the library of that method reads it.
    """
    if not has_quantized_weights(folder):
        return []
    with TensorFiles.open(folder) as files:
        if read_quant_config(files):
            return []
        layers = read_layers(files)
    return [layer for layer in layers.values() if layer.storage_dtype != FLOAT and layer.granularity]


def check_float_components(folder: Path, without: Collection[str]) -> None:
    """Check that diffusers and transformers read the right numbers in the components of a pipeline.

    They take quantized weights for floats and leave out scales that they do not know. Plain casts to fp8 are
    floats. A component whose config names a method is left to the library of that method.

    Args:
        folder: of the pipeline.
        without: components that are not loaded from there.

    Raises:
        FileError: naming the component and what reads it.
    """
    for part in sorted(folder.iterdir()):
        if not part.is_dir() or part.name in without:
            continue
        quantized = find_scaled_layers(part)
        if not quantized:
            continue
        how = "take a pipeline with its float weights"
        if part.name.startswith("text_encoder"):
            how = f"set clip=auto 'clip.path={{{part.name}: {part}}}' metrics.baseline=none, which reads them"
        weights = count_noun(len(quantized), "quantized weight")
        raise FileError(
            f"{part} holds {weights} ({quantized[0].label}), which diffusers would "
            f"use without their scales; {how}"
        )
