"""Writes images and videos while a run generates: what is there when it is stopped stays.

Each file says what it was made with; see `generate.image_parameters`.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from int8run import __version__
from int8run.config.run_spec import RunSpec
from int8run.generate.call_parameters import get_call_default
from int8run.generate.generate import Generation
from int8run.generate.generated_sampling import read_generated_sampling
from int8run.generate.image_parameters import collect_input_facts, describe_sampling, format_parameters
from int8run.generate.negative_prompts import read_guidance
from int8run.generate.pipeline_call import get_frame_rate
from int8run.generate.prompts import Sample
from int8run.layers.plan import Int8Settings
from int8run.metrics.quality import select_key_frames
from int8run.models.sampling import Sampling
from int8run.report.image_files import save_sample
from int8run.tracking.secrets import mask_secret_settings

log = logging.getLogger(__name__)
IMAGES = "images"
# text chunks of each image: for other programs, and for int8run itself as JSON
PARAMETERS_CHUNK, OWN_CHUNK = "parameters", "int8run"
# of the command line; each has a fact with its option and one with the option's settings
METHOD_GROUPS = ("outlier", "rounding", "backend")
SETTINGS_SUFFIX = "_settings"
INT8_SETTINGS = f"int8{SETTINGS_SUFFIX}"
# of `int8`: what an image says otherwise, and how
SAID_OTHERWISE = {"enable": "its precision is INT8 or a float dtype"}


class ImageWriter:
    """Saves what the models of a run generate, sample by sample.

    Args:
        spec: the settings.
        samples: all that are generated.
        output_dir: folder of the run; images go into `images` below it.
    """

    def __init__(self, spec: RunSpec, samples: Sequence[Sample], output_dir: Path):
        self.spec = spec
        self.samples = samples
        self.output_dir = output_dir
        # by model and key of the sample: paths below the output folder, the first is the whole sample
        self.files: dict[tuple[str, str], list[str]] = {}
        has_float_images = spec.has_comparison and spec.metrics.baseline != "none"
        self.total = 2 * len(samples) if has_float_images else len(samples)

    def write_all(self, model: str, generation: Generation, pipe: Any) -> None:
        """Save every sample of a model that is not saved yet, such as images out of the cache."""
        for index, sample in enumerate(self.samples):
            if (model, sample.key) not in self.files:
                self.write_sample(model, index, generation, pipe)

    def write_batch(self, model: str, batch: Sequence[Sample], generation: Generation, pipe: Any) -> None:
        """Save the samples that a model generated last."""
        start = len(generation.frames) - len(batch)
        for index in range(start, len(generation.frames)):
            self.write_sample(model, index, generation, pipe)

    def write_sample(self, model: str, index: int, generation: Generation, pipe: Any) -> None:
        """Save one sample.

        Args:
            model: `float`, `int8` or `clip`.
            index: of the sample.
            generation: of the model.
            pipe: that generated it.
        """
        sample = self.samples[index]
        folder = self.output_dir / IMAGES
        folder.mkdir(parents=True, exist_ok=True)
        frames: Sequence[Image] = generation.frames[index]
        name = sample.key
        if model == "float" and self.spec.has_comparison:
            name = f"{sample.key}_float"
        files = save_sample(
            frames,
            select_key_frames(len(frames)),
            folder=folder,
            name=name,
            frames_per_second=get_frame_rate(pipe, self.spec.sampling),
            texts=self.describe(model, sample, generation, pipe),
        )
        self.files[model, sample.key] = [f"{IMAGES}/{file}" for file in files]

    def describe(self, model: str, sample: Sample, generation: Generation, pipe: Any) -> dict[str, str]:
        """The text chunks of an image: `parameters` for readers of other programs, `int8run` as JSON.

        `tasks.inspect_image` reads the second one.

        Args:
            model: `float`, `int8` or `clip`.
            sample: prompt and seed.
            generation: of the model.
            pipe: that generated it.
        """
        sampling = read_generated_sampling(self.spec.sampling, generation)
        sampling = fill_guidance(sampling, pipe)
        guidance = read_guidance(pipe, sampling)
        scheduler = type(pipe.scheduler).__name__
        details = describe_model(self.spec, model)
        name = name_model(str(self.spec.model.location))
        version = f"int8run {__version__}"
        all_details: dict[str, object] = {**details, "Version": version}
        num_frames = len(generation.frames[0])
        if num_frames > 1:
            all_details = {"Frames": num_frames, **all_details}
        parameters = format_parameters(
            sample, sampling, scheduler=scheduler, model=name, details=all_details, guidance=guidance
        )
        facts: dict[str, Any] = {
            "version": version,
            "prompt": sample.prompt,
            "negative_prompt": sample.negative_prompt if guidance.uses_negative_prompt else None,
            "seed": sample.seed,
            "model": name,
            "pipeline": self.spec.model.pipeline,
            "mode": self.spec.model.mode,
            **mask_secret_settings(collect_input_facts(sample.inputs)),
            "sampling": mask_secret_settings(describe_sampling(sampling, scheduler)),
        }
        for label, value in details.items():
            facts[label.lower().replace(" ", "_")] = value
        if model == "int8":
            facts |= list_methods(self.spec)
        known = {key: value for key, value in facts.items() if value is not None}
        own = json.dumps(known, ensure_ascii=False, default=str)
        return {PARAMETERS_CHUNK: parameters, OWN_CHUNK: own}

    def report_kept(self) -> None:
        """Log which images are kept, where a run does not come to its end."""
        if self.files:
            folder = self.output_dir / IMAGES
            log.warning("%d of %d images are generated and kept in %s", len(self.files), self.total, folder)


def describe_model(spec: RunSpec, model: str) -> dict[str, str]:
    """How the model of an image differs from the float checkpoint, by names for its file.

    Args:
        spec: the settings.
        model: `float`, `int8` or `clip`.
    """
    facts = {"Precision": spec.model.dtype}
    if model == "int8":
        facts = {
            "Precision": "INT8",
            "Outlier": name_method(spec.outlier),
            "Rounding": name_method(spec.rounding),
            "Backend": spec.backend.name,
        }
        changed = find_changed_int8_settings(list_int8_settings(spec.int8))
        if changed:
            facts["INT8 settings"] = " ".join(f"{name}={value}" for name, value in changed.items())
    if model != "float" and spec.clip.is_quantized:
        facts["Text encoders"] = spec.clip.format
    loras = []
    for adapter, strength in zip(spec.lora.adapters, spec.lora.strengths, strict=True):
        loras.append(f"{adapter.name}: {strength:g}")
    if loras:
        facts["LoRAs"] = ", ".join(loras)
    return facts


def list_methods(spec: RunSpec) -> dict[str, Any]:
    """The options of outlier=, rounding= and backend=, the plain settings of each, and those of `int8`."""
    facts: dict[str, Any] = {INT8_SETTINGS: list_int8_settings(spec.int8)}
    for group in METHOD_GROUPS:
        method = getattr(spec, group)
        facts[group] = method.name
        settings = list_plain_settings(method)
        if settings:
            facts[f"{group}{SETTINGS_SUFFIX}"] = settings
    return facts


def list_int8_settings(settings: Int8Settings) -> dict[str, Any]:
    """The settings of `int8` that an image does not say otherwise; of `checkpoint` the names of its files."""
    listed = {}
    for field in dataclasses.fields(settings):
        if field.name not in SAID_OTHERWISE:
            listed[field.name] = getattr(settings, field.name)
    checkpoint = settings.checkpoint
    if isinstance(checkpoint, str):
        listed["checkpoint"] = name_model(checkpoint)
    elif checkpoint is not None:
        listed["checkpoint"] = ", ".join(map(name_model, checkpoint.values()))
    return listed


def find_changed_int8_settings(listed: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the listed settings of `int8` that are not the defaults of this version."""
    defaults = list_int8_settings(Int8Settings())
    changed = {}
    for name, value in listed.items():
        if name not in defaults or value != defaults[name]:
            changed[name] = value
    return changed


def name_method(method: Any) -> str:
    """A method with its settings: `convrot group_size=256`."""
    settings = [f"{name}={value}" for name, value in list_plain_settings(method).items()]
    return " ".join([method.name, *settings])


def list_plain_settings(method: Any) -> dict[str, float | None]:
    """The settings of a method that are numbers, or null in place of one: no file, and no further method."""
    settings = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        is_null = value is None and isinstance(field.default, int | float)
        if is_null or isinstance(value, int | float):
            settings[field.name] = value
    return settings


def name_model(location: str) -> str:
    """The last part of where a model is, without the ending of a file; no folder of this machine."""
    name = re.split("[/:]", location.rstrip("/"))[-1]
    return name.removesuffix(".safetensors").removesuffix(".gguf") or "unknown"


def fill_guidance(sampling: Sampling, pipe: Any) -> Sampling:
    """The settings with the pipeline's own guidance where none was asked for."""
    if sampling.guidance is not None:
        return sampling
    default = get_call_default(pipe, "guidance_scale")
    return dataclasses.replace(sampling, guidance=default) if isinstance(default, int | float) else sampling
