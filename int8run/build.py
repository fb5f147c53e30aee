"""Build what a run needs: the pipeline, its float denoiser, the INT8 denoiser beside it, and the LoRAs on both."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from int8run.budget import Budget
from int8run.convert import layer_rows, to_int8
from int8run.costs import BranchCosts
from int8run.errors import ConfigError
from int8run.generate.generate import TextCache, unknown_arguments
from int8run.generate.probe import record_call
from int8run.generate.prompts import Sample
from int8run.lora.files import read_lora
from int8run.lora.heads import Head
from int8run.lora.stack import Entry, LoraStack, Overhead
from int8run.models.family import ModelFamily, Sampling
from int8run.models.loader import Loaded, find_denoiser, load_pipeline, pick_device, repeated_blocks, use_scheduler
from int8run.quantize import LayerPlan, check_backend, plan_layers
from int8run.report.terminal import Progress
from int8run.spec import RunSpec
from int8run.text_encoders.keep import find_text_encoders
from int8run.timing import medians, now

log = logging.getLogger(__name__)


@dataclass
class Built:
    """A model ready to run. `denoisers` holds `float`, and `int8` where INT8 is enabled."""

    pipe: DiffusionPipeline
    component: str
    family: ModelFamily
    denoisers: dict[str, nn.Module]
    scheduler: Any  # as the checkpoint has it; a sampling may name another
    plans: list[LayerPlan]
    loras: LoraStack
    text_encoders: dict[str, nn.Module]
    text_strengths: list[float]  # that the text encoders have now
    budget: Budget | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def set_strengths(self, strengths: Sequence[float], text_strengths: Sequence[float]) -> float:
        """Bring both denoisers and the text encoders to these LoRA strengths; nothing is rebuilt. Returns the seconds it took."""
        started = now(self.pipe.device)
        changed = list(text_strengths) != self.text_strengths
        self.loras.set_strengths(strengths, text_strengths if changed else None)
        self.text_strengths = list(text_strengths)
        if changed:
            TextCache.of(self.pipe).clear()
        return now(self.pipe.device) - started


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
    sampling = spec.sampling
    check_sampling(pipe, sampling)
    scheduler = pipe.scheduler
    use_scheduler(pipe, scheduler, sampling)
    linears = [name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
    family = spec.model_type.for_denoiser(type(denoiser).__name__, repeated_blocks(denoiser), linears)
    return Loaded(pipe, component, denoiser, scheduler, family, sampling, seconds)


def build(spec: RunSpec, probe: Sequence[Sample], heads: Sequence[Head], progress: Progress) -> Built:
    """Load, match the LoRAs, quantize, install.

    Args:
        probe: samples of one batch; the denoiser's call on them gives real shapes and activations.
        heads: the LoRA files of the stack, in its order.
    """
    entries = [Entry(h.name, read_lora(h.path), components=a.components) for h, a in zip(heads, spec.lora.adapters, strict=True)]
    loaded = load(spec, progress)
    pipe, component, denoiser, family = loaded.pipe, loaded.component, loaded.denoiser, loaded.family
    text_encoders = find_text_encoders(pipe.components)
    loras = LoraStack(denoiser, text_encoders, spec.lora.mode, spec.lora.strict, spec.seed)
    loras.put(entries, loras.matched(entries))
    for line in loras.report():
        log.info("%s", line)
    for index, adapter in enumerate(spec.lora.adapters):
        if adapter.text_strength is not None and not loras.changes_text(index):
            log.warning("LoRA %r has a text_strength and no part for a text encoder; it has no effect", adapter.name)
    if spec.lora.bakes:
        loras.set_strengths(spec.lora.strengths)
    elif entries and spec.save is not None:
        log.warning("%s will hold the model without its LoRAs; lora.mode=bake writes them into it", spec.save)

    with progress.step("look at one step"):
        call = record_call(pipe, component, denoiser, probe, loaded.sampling)
    plans = plan_layers(denoiser, family.why_float)
    off = [0.0] * len(entries)
    built = Built(pipe, component, family, {"float": denoiser}, loaded.scheduler, plans, loras, text_encoders, off)
    started = time.perf_counter()
    if spec.int8.enable:
        built.denoisers["int8"], built.budget = to_int8(loaded, plans, call, spec, progress)
        if entries and not spec.lora.bakes:
            attach_loras(built, spec, call)
    built.seconds = {"load": loaded.seconds, "quantize": time.perf_counter() - started}
    compile_denoisers(built.denoisers, spec.compile)
    return built


def attach_loras(built: Built, spec: RunSpec, call: Mapping[str, Any]) -> None:
    """Bring the LoRAs to the INT8 layers, each by the mode that it can have."""
    overhead: Overhead | None = None
    if spec.lora.mode == "auto" and not spec.lora.scheduled:
        costs = BranchCosts(spec.backend, built.pipe.device, getattr(torch, spec.model.dtype))
        rows = layer_rows(built.denoisers["float"], built.plans, call)
        overhead = lambda name, layer, rank: costs.of(layer, rank, rows[name])  # noqa: E731
    built.loras.attach(
        built.denoisers["int8"], float_weights=spec.int8.checkpoint is None, rounding=spec.rounding, scheduled=spec.lora.scheduled,
        overhead=overhead, max_overhead=spec.lora.max_overhead,
    )  # fmt: skip
    for index in range(len(built.loras.entries)):
        if (line := built.loras.size_line(index)) is not None:
            log.info("%s", line)


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


@torch.no_grad()
def lora_overhead(built: Built, call: Mapping[str, Any], rounds: int = 11) -> float:
    """Time of one INT8 step with the LoRA branches over the time without, from interleaved calls; the median of each."""
    denoiser = built.denoisers["int8"]

    def step(on: bool) -> None:
        for layer in built.loras.dynamic:
            layer.attach(on)
        denoiser(**call)

    # putting branches on and off takes a few microseconds each, both times the same
    without, with_branches = medians([partial(step, False), partial(step, True)], built.pipe.device, rounds)
    return with_branches / without
