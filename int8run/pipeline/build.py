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

from int8run.checkpoints.output_path import prepare_output_path
from int8run.config.run_spec import RunSpec
from int8run.generate.capture import capture_step
from int8run.generate.generate import PromptCache, use_text_encoders
from int8run.generate.prompts import Sample
from int8run.layers.plan import LayerPlan
from int8run.lora.header_info import LoraHeader
from int8run.lora.load import read_lora
from int8run.lora.modes import Overhead
from int8run.lora.stack import Entry, LoraStack
from int8run.metrics.layers import count_macs, count_module_bytes
from int8run.models.dual_denoisers import set_denoiser, split_denoiser
from int8run.models.family import ModelFamily
from int8run.pipeline.load import load_model, replace_missing_linears, set_offload
from int8run.pipeline.prequantized import find_prequantized
from int8run.pipeline.quantize_denoiser import build_cache_key, count_layer_rows, quantize_denoiser
from int8run.pipeline.text_encoders import QuantizedEncoders, build_encoders
from int8run.ptq.layer_costs import BranchCosts
from int8run.ptq.mixed_precision import MixedPrecisionResult
from int8run.report.console import Progress
from int8run.text_encoders.base import find_text_encoders
from int8run.utils.timing import read_clock, time_medians

log = logging.getLogger(__name__)


@dataclass
class BuiltModel:
    """A model ready to run.

    Args:
        denoisers: by the name of who draws: `float` where the run needs it, and what is compared with it, `int8` or `clip`; the latter
            is the float denoiser once more.
        text_encoders: by the same names, the components that are not the same for both.
    """

    pipe: DiffusionPipeline
    component: str
    family: ModelFamily
    denoisers: dict[str, nn.Module]
    float_bytes: int  # of the float denoiser, whether it is there or not
    num_params: int  # numbers in its parameters
    macs: Mapping[str, int]  # multiply-adds of its layers in one step
    scheduler: Any  # as the checkpoint has it; a sampling may name another
    device: torch.device
    plans: list[LayerPlan]
    loras: LoraStack
    encoders: QuantizedEncoders
    text_encoders: dict[str, dict[str, nn.Module]]
    float_text_encoder_bytes: int  # of the float text encoders, whether they are there or not
    text_strengths: list[float]  # that the text encoders have now
    budget: MixedPrecisionResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    lora_overhead: float | None = (
        None  # step time with branches over that without, once it was measured: no strength changes it
    )

    def set_strengths(self, strengths: Sequence[float], text_strengths: Sequence[float]) -> float:
        """Bring both denoisers and the text encoders to these LoRA strengths; nothing is rebuilt. Returns the seconds it took."""
        started = read_clock(self.device)
        changed = list(text_strengths) != self.text_strengths
        self.loras.set_strengths(strengths, text_strengths if changed else None)
        self.text_strengths = list(text_strengths)
        if changed:
            self.encoders.set_strengths(text_strengths)
            PromptCache.for_pipeline(self.pipe).clear()
        return read_clock(self.device) - started


def build_model(
    spec: RunSpec, probe: Sequence[Sample], heads: Sequence[LoraHeader], progress: Progress
) -> BuiltModel:
    """Load, match the LoRAs, quantize, install.

    Args:
        probe: samples of one batch; the denoiser's call on them gives real shapes and activations.
        heads: the LoRA files of the stack, in its order.
    """
    entries = [
        Entry(h.name, read_lora(h.path), components=a.components)
        for h, a in zip(heads, spec.lora.adapters, strict=True)
    ]
    if spec.save is not None:
        if spec.clip.is_quantized:
            log.info(
                "save= holds the denoiser; task=quantize task.component=text_encoder writes a text encoder"
            )
        prepare_output_path(spec.save)  # before the work whose result it is to hold
    loaded = load_model(spec, progress, whole=spec.needs_float_denoiser)
    pipe, component, denoiser, family = loaded.pipe, loaded.component, loaded.denoiser, loaded.family
    text_encoders = find_text_encoders(pipe.components)
    loras = LoraStack(denoiser, text_encoders, spec.lora.mode, spec.lora.strict, spec.seed)
    matches = loras.match_entries(entries)
    started = time.perf_counter()
    plans = loaded.plan_layers()
    key = build_cache_key(spec, loaded, entries)
    taken = find_prequantized(loaded, plans, spec, key, set(matches.denoiser))
    with progress.track_step("load float layers"):
        loaded.fill_weights(but=[p.name for p in plans if p.skip_reason is None])
    load_seconds = loaded.seconds + time.perf_counter() - started
    loras.install(entries, matches, leave=loaded.skeleton_encoders)
    float_text_bytes = sum(map(count_module_bytes, text_encoders.values()))
    encoders = build_encoders(loaded.encoders, spec.clip, loaded.device, loaded.sampling, matches, progress)
    if not spec.needs_float_encoders:
        pipe.register_modules(**encoders.modules)
    for line in loras.report():
        log.info("%s", line)
    for index, adapter in enumerate(spec.lora.adapters):
        if adapter.text_strength is not None and not loras.changes_text_encoder(index):
            log.warning(
                "LoRA %r has a text_strength and no part for a text encoder; it has no effect", adapter.name
            )
    if spec.lora.is_baked:
        loras.set_strengths(spec.lora.strengths)
    elif entries and spec.save is not None:
        log.warning("%s will hold the model without its LoRAs; lora.mode=bake writes them into it", spec.save)

    with progress.track_step("look at one step"):
        blank = replace_missing_linears(denoiser)
        set_denoiser(pipe, blank, component)
        set_offload(pipe, spec.offload, loaded.device)
        calls = capture_step(pipe, component, blank, probe, loaded.sampling)
    denoisers = {"float": denoiser} if spec.needs_float_denoiser else {}
    if spec.candidate == "clip":
        denoisers["clip"] = denoiser
    in_turn = (
        {"float": {name: text_encoders[name] for name in encoders.modules}}
        if spec.needs_float_encoders
        else {}
    )
    off = [0.0] * len(entries)
    built = BuiltModel(
        pipe,
        component,
        family,
        denoisers,
        loaded.float_bytes,
        sum(p.numel() for p in denoiser.parameters()),
        count_macs(blank, calls),
        loaded.scheduler,
        loaded.device,
        plans,
        loras,
        encoders,
        in_turn | {spec.candidate: encoders.modules},
        float_text_bytes,
        off,
    )
    started = time.perf_counter()
    if spec.int8.enable:
        rows = count_layer_rows(blank, [p for p in plans if p.skip_reason is None], calls)
        denoisers["int8"], built.budget = quantize_denoiser(
            loaded, plans, rows, spec, taken, loras, key, progress
        )
        if entries and not spec.lora.is_baked:
            attach_loras(built, spec, rows)
    set_denoiser(pipe, denoisers[spec.candidate], component)
    use_text_encoders(pipe, spec.candidate, encoders.modules)
    set_offload(pipe, spec.offload, loaded.device)
    built.seconds = {"load": load_seconds, "quantize": time.perf_counter() - started}
    compile_denoisers(denoisers, spec.compile)
    return built


def attach_loras(built: BuiltModel, spec: RunSpec, rows: Mapping[str, int]) -> None:
    """Bring the LoRAs to the INT8 layers, each by the mode that it can have."""
    overhead: Overhead | None = None
    if spec.lora.mode == "auto" and not spec.lora.is_scheduled:
        costs = BranchCosts(spec.backend, built.device, getattr(torch, spec.model.dtype))
        overhead = lambda name, layer, rank: costs.get_ratio(layer, rank, rows[name])  # noqa: E731
    float_weights = "float" in built.denoisers and spec.int8.checkpoint is None
    built.loras.attach(
        built.denoisers["int8"],
        float_weights=float_weights,
        rounding=spec.rounding,
        scheduled=spec.lora.is_scheduled,
        overhead=overhead,
        max_overhead=spec.lora.max_overhead,
    )
    for index in range(len(built.loras.entries)):
        if (line := built.loras.format_size(index)) is not None:
            log.info("%s", line)


def compile_denoisers(denoisers: Mapping[str, nn.Module], mode: str) -> None:
    """torch.compile: `blocks` compiles the repeated blocks, `full` the whole denoiser; float and INT8 alike."""
    parts: list[Any] = [part for whole in denoisers.values() for part in split_denoiser(whole).values()]
    for part in dict.fromkeys(parts):  # with quantized text encoders alone both denoisers are one
        if mode == "blocks":
            part.compile_repeated_blocks(fullgraph=True)
        elif mode == "full":
            part.compile(fullgraph=True)


@torch.no_grad()
def measure_lora_overhead(built: BuiltModel, calls: Sequence[Mapping[str, Any]], rounds: int = 11) -> float:
    """Time of one INT8 step (of each expert) with the LoRA branches over the time without, from interleaved calls; the median of each."""
    denoiser = built.denoisers["int8"]

    def step(on: bool) -> None:
        for layer in built.loras.dynamic_layers:
            layer.attach(on)
        for call in calls:
            denoiser(**call)

    # putting branches on and off takes a few microseconds each, both times the same
    without, with_branches = time_medians([partial(step, False), partial(step, True)], built.device, rounds)
    return with_branches / without
