"""Build what a run needs: the pipeline, its float denoiser, the INT8 denoiser beside it, and the LoRAs on both."""

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from int8run.budget import Budget
from int8run.convert import to_int8
from int8run.errors import ConfigError
from int8run.generate.generate import now, unknown_arguments
from int8run.generate.probe import record_call
from int8run.generate.prompts import Sample
from int8run.lora.apply import DynamicBranches, FloatMerge, Matches, match
from int8run.lora.files import LoraFile, find_lora, read_lora, trigger_words
from int8run.models.family import ModelFamily, Sampling
from int8run.models.loader import Loaded, find_denoiser, load_pipeline, pick_device, repeated_blocks
from int8run.quantize import LayerPlan, check_backend, plan_layers
from int8run.report.terminal import Progress
from int8run.spec import RunSpec
from int8run.text_encoders.keep import find_text_encoders

log = logging.getLogger(__name__)


@dataclass
class Built:
    """A model ready to run. `denoisers` holds `float`, and `int8` where INT8 is enabled."""

    pipe: DiffusionPipeline
    component: str
    family: ModelFamily
    denoisers: dict[str, nn.Module]
    plans: list[LayerPlan]
    lora_files: list[LoraFile]
    matches: Matches
    merge: FloatMerge | None
    branches: DynamicBranches | None
    text_encoders: dict[str, nn.Module]
    budget: Budget | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Bring both denoisers to these LoRA strengths; nothing is rebuilt."""
        if self.merge is not None:
            self.merge.set_strengths(strengths)
        if self.branches is not None:
            self.branches.set_strengths(strengths)


def load(spec: RunSpec, progress: Progress) -> Loaded:
    """Load the pipeline and recognise its family."""
    device = pick_device(spec.device)
    if spec.int8.enable:
        check_backend(spec.backend, device, ())  # before anything is loaded
    started = time.perf_counter()
    with progress.step("load"):
        pipe = load_pipeline(spec.model, device)
        component = find_denoiser(pipe)
        denoiser = getattr(pipe, component).eval().requires_grad_(False)
        set_attention(denoiser, spec.attention)
    seconds = time.perf_counter() - started
    sampling = spec.sampler.over(spec.model.sampling)
    check_sampling(pipe, sampling)
    linears = [name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
    family = spec.model_type.for_denoiser(type(denoiser).__name__, repeated_blocks(denoiser), linears)
    return Loaded(pipe, component, denoiser, family, sampling, seconds)


def build(spec: RunSpec, probe: Sequence[Sample], progress: Progress) -> Built:
    """Load, match the LoRAs, quantize, install.

    Args:
        probe: samples of one batch; the denoiser's call on them gives real shapes and activations.
    """
    loaded = load(spec, progress)
    pipe, component, denoiser, family = loaded.pipe, loaded.component, loaded.denoiser, loaded.family
    files = [read_lora(find_lora(*a.source(spec.model.lora_base))) for a in spec.lora.adapters]
    for file in files:
        log.info("LoRA %s: %d modules, rank %s%s", file.path.name, len(file.pairs), file.ranks, trigger_note(file))
    matches = match(denoiser, files, spec.lora.strict)
    merge = FloatMerge(denoiser, matches) if files else None
    if merge is not None and spec.lora.bakes:
        merge.set_strengths(spec.lora.strengths)

    with progress.step("look at one step"):
        call = record_call(pipe, component, denoiser, probe, loaded.sampling)
    plans = plan_layers(denoiser, family.why_float)
    built = Built(pipe, component, family, {"float": denoiser}, plans, files, matches, merge, None, find_text_encoders(pipe.components))
    started = time.perf_counter()
    if spec.int8.enable:
        built.denoisers["int8"], built.budget = to_int8(loaded, plans, call, spec, progress)
        if files and not spec.lora.bakes:
            built.branches = DynamicBranches(built.denoisers["int8"], matches)
    built.seconds = {"load": loaded.seconds, "quantize": time.perf_counter() - started}
    compile_denoisers(built.denoisers, spec.compile)
    return built


def set_attention(denoiser: Any, name: str) -> None:
    """diffusers' attention backend, and a check of its name."""
    if name == "native":
        return
    try:
        denoiser.set_attention_backend(name)
    except (AttributeError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"attention={name} cannot be used with {type(denoiser).__name__}: {reason}") from error


def check_sampling(pipe: DiffusionPipeline, sampling: Sampling) -> None:
    """Refuse sampler settings that the pipeline does not have."""
    unknown = unknown_arguments(pipe, sampling)
    if unknown:
        raise ConfigError(f"sampler.extra.{unknown[0]} is no argument of {type(pipe).__name__}; see the pipeline's documentation")


def compile_denoisers(denoisers: Mapping[str, Any], mode: str) -> None:
    """torch.compile: `blocks` compiles the repeated blocks, `full` the whole denoiser; float and INT8 alike."""
    for denoiser in denoisers.values():
        if mode == "blocks":
            denoiser.compile_repeated_blocks(fullgraph=True)
        elif mode == "full":
            denoiser.compile(fullgraph=True)


def trigger_note(file: LoraFile) -> str:
    """`, trigger words: …` where the header names them."""
    words = trigger_words(file.metadata)
    return f", trigger words: {words}" if words else ""


@torch.no_grad()
def lora_overhead(built: Built, call: Mapping[str, Any], strengths: Sequence[float], rounds: int = 11) -> float:
    """Time of one INT8 step with the LoRA branches over the time without, from interleaved calls; the median of each."""
    denoiser = built.denoisers["int8"]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    assert built.branches is not None
    for _ in range(rounds + 1):
        for on in (True, False):
            built.branches.attach(on)
            started = now(built.pipe.device)
            denoiser(**call)
            seconds[on].append(now(built.pipe.device) - started)
    built.branches.attach(True)
    return statistics.median(seconds[True][1:]) / statistics.median(seconds[False][1:])
