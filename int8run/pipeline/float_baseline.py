"""`metrics.baseline=cached`: the float model draws first and alone, once; later runs compare with what it drew."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from int8run.config.run_spec import RunSpec
from int8run.errors import FileError
from int8run.generate.generate import Generation
from int8run.generate.prompts import Sample
from int8run.generate.serialization import load_generation, save_generation
from int8run.lora.header_info import LoraHeader
from int8run.models.loader import pick_device, read_library_versions
from int8run.models.source import resolve_model
from int8run.pipeline.load import hash_model_files
from int8run.text_encoders.base import TextEncoders
from int8run.utils.disk_cache import hash_parts
from int8run.utils.hardware import get_device_name

log = logging.getLogger(__name__)


def get_float_baseline(
    spec: RunSpec,
    heads: Sequence[LoraHeader],
    wanted: Sequence[Sample],
    draw: Callable[[RunSpec], Generation],
) -> tuple[Generation, bool]:
    """What the float model draws for these samples, out of the cache or drawn now; and whether it was now.

    Args:
        draw: builds the float model that a spec asks for and lets it draw. The model is dropped afterwards.
    """
    source = resolve_model(spec.model)
    hashes = hash_model_files(source, spec.cache) if spec.cache.limit_gb else []
    versions = {
        name: version
        for name, version in read_library_versions().items()
        if name in ("torch", "diffusers", "transformers")
    }
    loras = [spec.cache.hash_file(head.path) for head in heads]
    key = hash_parts(
        [hashes, versions, get_device_name(pick_device(spec.device)), spec.float_key, loras, list(wanted)]
    )
    path = spec.cache.get("float", key)
    if path is not None:
        try:
            found = load_generation(path)
            log.info(
                "float pictures of an earlier run: %s; its speed then says nothing of now and is left out",
                path,
            )
            return found, False
        except FileError as error:
            spec.cache.remove(path, error)
    made = draw(make_float_spec(spec))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    note = {
        "model": str(spec.model.location),
        "drawings": len(made.frames),
        "loras": [[head.name] for head in heads],
    }
    spec.cache.put("float", key, made.nbytes, lambda path: save_generation(made, path, note))
    return made, True


def make_float_spec(spec: RunSpec) -> RunSpec:
    """The same job with the float model alone."""
    return replace(
        spec,
        int8=replace(spec.int8, enable=False, checkpoint=None),
        clip=TextEncoders(),
        save=None,
        quality_db=None,
        model_type=replace(spec.model_type, mixed_precision="none"),
        metrics=replace(spec.metrics, baseline="none", perceptual=()),
    )
