"""A model that is ready to run, with its float and its INT8 denoiser side by side.

build.py makes it. tasks/ generate with it, and give it the LoRA strengths of the next job without a new
build.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from int8run.backends.best_float import BestFloat
from int8run.generate.prompt_cache import PromptCache
from int8run.generate.step_denoisers import StepDenoisers
from int8run.layers.plan import FLOAT, INT8, LayerPlan
from int8run.lora.stack import LoraStack
from int8run.models.family import ModelFamily
from int8run.pipeline.controlnets import BuiltControlnet
from int8run.pipeline.step_denoisers import share_steps
from int8run.pipeline.text_encoders import QuantizedEncoders
from int8run.pipeline.vae import QuantizedVae
from int8run.ptq.mixed_precision import MixedPrecisionResult
from int8run.utils.step_schedule import Schedule
from int8run.utils.timing import read_clock, time_medians

OVERHEAD_ROUNDS = 11


@dataclass
class BuiltModel:
    """A model ready to run.

    Args:
        component: the pipeline's name for its denoiser; of two, for the first one.
        denoisers: by what generates with them: `float` where the run needs it, and what is compared with it,
            `int8` or `clip`; the latter is the float denoiser once more.
        float_bytes: size of the float denoiser, whether its weights are in memory or not.
        num_params: numbers in its parameters.
        macs: multiply-adds of its layers in one step, by name.
        scheduler: as the checkpoint has it; a sampling may name another.
        plans: what happened to each Linear.
        encoders: the quantized text encoders.
        text_encoders: by the names of `denoisers`, the components that differ between them.
        float_text_encoder_bytes: size of the float text encoders, whether they are in memory or not.
        text_strengths: of the LoRAs on the text encoders now.
        controlnets: of the pipeline, as floats and in INT8.
        vae: the VAE as floats and in INT8; None: float alone.
        num_dequantized_layers: Linears of the float model that are quantized numbers of its own file.
        mixed_precision: what keeping layers float for `quality_db` brought, where that was asked for.
        seconds: that loading and quantizing took.
        best_float: the fastest float dtype for the denoiser, once it was measured.
        is_best_float_tried: whether that was tried; where no answer came, the next run would get none either.
        lora_overhead: time of a step with LoRA branches over its time without, once it was measured; it does
            not depend on the strengths.
    """

    pipe: DiffusionPipeline
    component: str
    family: ModelFamily
    denoisers: dict[str, nn.Module]
    float_bytes: int
    num_params: int
    macs: Mapping[str, int]
    scheduler: Any
    device: torch.device
    plans: list[LayerPlan]
    loras: LoraStack
    encoders: QuantizedEncoders
    text_encoders: dict[str, dict[str, nn.Module]]
    float_text_encoder_bytes: int
    text_strengths: list[float]
    controlnets: Sequence[BuiltControlnet] = ()
    vae: QuantizedVae | None = None
    num_dequantized_layers: int = 0
    mixed_precision: MixedPrecisionResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    lora_overhead: float | None = None
    best_float: BestFloat | None = None
    is_best_float_tried: bool = False

    @property
    def components(self) -> dict[str, dict[str, nn.Module]]:
        """By the names of `denoisers`, the components besides text encoders that differ between them."""
        components: dict[str, dict[str, nn.Module]] = {"float": {}, "int8": {}}
        if self.vae is not None:
            components = self.vae.by_denoiser("int8")
        for controlnet in self.controlnets:
            components["int8"][controlnet.component] = controlnet.module
            if controlnet.float_module is not None:
                components["float"][controlnet.component] = controlnet.float_module
        return components

    def list_step_denoisers(self, steps: Schedule | None, offload: str) -> dict[str, StepDenoisers]:
        """What computes the steps of the INT8 model, by its name; empty where INT8 computes all.

        ControlNets change with the denoiser. The VAE does not: it decodes once, when all steps are done.

        Args:
            steps: as `int8.steps` has it.
            offload: of the pipeline.
        """
        if steps is None or INT8 not in self.denoisers:
            return {}
        controlnets: dict[str, dict[str, nn.Module]] = {FLOAT: {}, INT8: {}}
        for controlnet in self.controlnets:
            controlnets[INT8][controlnet.component] = controlnet.module
            if controlnet.float_module is not None:
                controlnets[FLOAT][controlnet.component] = controlnet.float_module
        int8 = self.denoisers[INT8]
        shared = share_steps(
            int8,
            steps=steps,
            float_denoiser=self.denoisers.get(FLOAT, int8),
            pipe=self.pipe,
            offload=offload,
            device=self.device,
            components=controlnets,
        )
        return {INT8: shared}

    def set_strengths(self, strengths: Sequence[float], text_strengths: Sequence[float]) -> float:
        """Set the LoRA strengths of all denoisers and text encoders; nothing is rebuilt.

        Args:
            strengths: of each LoRA on the denoisers.
            text_strengths: of each LoRA on the text encoders.

        Returns:
            The seconds that it took.
        """
        started = read_clock(self.device)
        has_new_text_strengths = list(text_strengths) != self.text_strengths
        self.loras.set_strengths(strengths, text_strengths if has_new_text_strengths else None)
        self.text_strengths = list(text_strengths)
        if has_new_text_strengths:
            self.encoders.set_strengths(text_strengths)
            PromptCache.for_pipeline(self.pipe).clear()
        return read_clock(self.device) - started


@torch.no_grad()
def measure_lora_overhead(
    built: BuiltModel, calls: Sequence[Mapping[str, Any]], rounds: int = OVERHEAD_ROUNDS
) -> float:
    """Time of an INT8 step with the LoRA branches over its time without: medians of calls that take turns.

    Args:
        built: the model, with LoRA branches at its INT8 layers.
        calls: arguments of the denoiser; of two denoisers those of each.
        rounds: how often each is timed.
    """
    denoiser = built.denoisers["int8"]

    def run_step(*, has_branches: bool) -> None:
        # takes a few microseconds for each layer, both times the same
        for layer in built.loras.dynamic_layers:
            layer.switch_branch(on=has_branches)
        for call in calls:
            denoiser(**call)

    without, with_branches = time_medians(
        [partial(run_step, has_branches=False), partial(run_step, has_branches=True)], built.device, rounds
    )
    return with_branches / without
