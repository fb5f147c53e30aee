"""A model of random weights, built as a run builds it, and two steps of 16 x 16 pixels with it."""

from pathlib import Path

from support.run_job import make_spec
from torch import Tensor

from int8run.generate.generate import Generation, generate
from int8run.generate.prompts import build_samples
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.report.console import Progress
from int8run.tasks.run import read_headers

SAMPLES = build_samples(["a"], 1, 0)
SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=2",
    "backend=reference",
    "metrics.baseline=none",
    "int8.small_batch_fallback=never",
    "calibration.prompts=[b]",
]


def build_small_model(folder: Path, *overrides: str) -> BuiltModel:
    """The model in a folder, its LoRAs at the strengths that the overrides give."""
    spec = make_spec([f"model.location={folder}", *SMALL, *overrides])
    built = build_model(spec, SAMPLES, read_headers(spec), Progress(enabled=False))
    built.set_strengths(spec.lora.strengths, spec.lora.text_strengths)
    return built


def generate_latents(built: BuiltModel) -> Tensor:
    """What the last step of the INT8 denoiser gives."""
    return generate_sample(built).trajectories[0]


def generate_sample(built: BuiltModel) -> Generation:
    """The image of the INT8 model, and what its denoiser gave on the way."""
    sampling = make_spec(SMALL).sampling
    sampling = sampling.with_defaults(sampling)
    return generate(built.pipe, built.component, {"": built.denoisers["int8"]}, SAMPLES, sampling)[""]
