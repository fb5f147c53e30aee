"""Writes images and videos while a run generates: what is there when it is stopped stays.

Each file says what it was made with; see `generate.image_parameters`.
"""

import dataclasses
import json
import logging
from collections import Counter
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
from int8run.layers.step_precision import describe_step_counts
from int8run.metrics.key_frames import select_key_frames
from int8run.models.sampling import Sampling
from int8run.report.image_files import save_sample
from int8run.tasks.model_facts import describe_model, list_methods, name_model
from int8run.tasks.run_settings import list_candidates, list_other_settings
from int8run.tracking.secrets import mask_secret_settings

log = logging.getLogger(__name__)
IMAGES = "images"
# text chunks of each image: for other programs, and for int8run itself as JSON
PARAMETERS_CHUNK, OWN_CHUNK = "parameters", "int8run"


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
        if generation.step_denoisers:
            # of the batch that was generated last, which this sample is of
            details["Steps by precision"] = describe_step_counts(Counter(generation.step_denoisers[-1]))
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
        facts |= self.list_model_facts(model, details)
        known = {key: value for key, value in facts.items() if value is not None}
        own = json.dumps(known, ensure_ascii=False, default=str)
        return {PARAMETERS_CHUNK: parameters, OWN_CHUNK: own}

    def list_model_facts(self, model: str, details: Mapping[str, str]) -> dict[str, Any]:
        """What the image says of the model: how it was made, and every other setting of its pixels.

        Args:
            model: `float`, `int8` or `clip`.
            details: of the model, as other programs read them.
        """
        facts: dict[str, Any] = {label.lower().replace(" ", "_"): value for label, value in details.items()}
        is_int8 = model == "int8"
        if is_int8:
            facts |= list_methods(self.spec)
            facts["outlier_candidates"] = list_candidates(self.spec)
        facts["settings"] = mask_secret_settings(list_other_settings(self.spec, is_int8=is_int8))
        return facts

    def report_kept(self) -> None:
        """Log which images are kept, where a run does not come to its end."""
        if self.files:
            folder = self.output_dir / IMAGES
            log.warning("%d of %d images are generated and kept in %s", len(self.files), self.total, folder)


def fill_guidance(sampling: Sampling, pipe: Any) -> Sampling:
    """The settings with the pipeline's own guidance where none was asked for."""
    if sampling.guidance is not None:
        return sampling
    default = get_call_default(pipe, "guidance_scale")
    return dataclasses.replace(sampling, guidance=default) if isinstance(default, int | float) else sampling
