"""`metrics.baseline=cached`: the float model generates first and alone; later runs compare with its images.

tasks/run.py calls it, and gives it a function that builds the float model. No settings of a run are known
here: they come as a key.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from int8run.errors import FileError
from int8run.generate.generate import Generation
from int8run.generate.prompts import Sample
from int8run.generate.serialization import load_generation, save_generation
from int8run.lora.header_info import LoraHeader
from int8run.models.family import ModelSource
from int8run.models.loader import pick_device, read_library_versions
from int8run.models.source import resolve_model
from int8run.pipeline.model_files import hash_model_files
from int8run.utils.disk_cache import DiskCache, hash_parts
from int8run.utils.hardware import get_device_name

log = logging.getLogger(__name__)
# libraries whose version may change what a model generates
HASHED_LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class BaselineOrigin:
    """Everything that decides what the float model generates.

    Args:
        model: where the model is.
        headers: of the LoRA files.
        samples: to generate.
        settings_key: the other settings, as text.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `xpu`, `xpu:N`, `mps`.
    """

    model: ModelSource
    headers: Sequence[LoraHeader]
    samples: Sequence[Sample]
    settings_key: str
    device: str


def get_float_baseline(
    origin: BaselineOrigin, cache: DiskCache, generate: Callable[[], Generation]
) -> tuple[Generation, bool]:
    """Get what the float model generates, out of the cache or now.

    Args:
        origin: what decides it.
        cache: of earlier and later runs.
        generate: builds the float model and lets it generate; the model is dropped afterwards.

    Returns:
        What it generated, and whether it did so now.
    """
    key = build_baseline_key(origin, cache)
    cached = read_cached_baseline(cache, key)
    if cached is not None:
        return cached, False
    generation = generate()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    metadata = {
        "model": str(origin.model.location),
        "images": len(generation.frames),
        "loras": [[header.name] for header in origin.headers],
    }
    cache.put("float", key, generation.nbytes, lambda path: save_generation(generation, path, metadata))
    return generation, True


def build_baseline_key(origin: BaselineOrigin, cache: DiskCache) -> str:
    """The key of what the float model generates in the cache, which remembers the hashes of files."""
    source = resolve_model(origin.model)
    file_hashes = hash_model_files(source, cache) if cache.limit_gb else []
    versions = {
        name: version for name, version in read_library_versions().items() if name in HASHED_LIBRARIES
    }
    device_name = get_device_name(pick_device(origin.device))
    lora_hashes = []
    for header in origin.headers:
        lora_hashes.append([cache.hash_file(file) for file in header.files])
    samples = list(origin.samples)
    return hash_parts([file_hashes, versions, device_name, origin.settings_key, lora_hashes, samples])


def read_cached_baseline(cache: DiskCache, key: str) -> Generation | None:
    """What an earlier run generated, if it is in the cache; a damaged file is removed."""
    path = cache.get("float", key)
    if path is None:
        return None
    try:
        generation = load_generation(path)
    except FileError as error:
        cache.remove(path, error)
        return None
    log.info("Float images of an earlier run: %s", path)
    return generation
