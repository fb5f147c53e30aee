"""Both denoisers of a model as those that share the steps of an image, as `int8.steps` has it.

`BuiltModel` has those that a run generates with, `quantize_denoiser` gives its search the same.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import nn

from int8run.generate.step_denoisers import StepDenoisers
from int8run.layers.step_precision import FLOAT, INT8
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.offload import follow_denoiser
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.utils.step_schedule import Schedule

NO_COMPONENTS: Mapping[str, Mapping[str, nn.Module]] = {}


def share_steps(
    int8: nn.Module,
    *,
    steps: Schedule,
    float_denoiser: nn.Module,
    pipe: DiffusionPipeline,
    offload: str,
    device: torch.device,
    components: Mapping[str, Mapping[str, nn.Module]] = NO_COMPONENTS,
) -> StepDenoisers:
    """What computes the steps where the float denoiser has some of them.

    Args:
        int8: the INT8 denoiser.
        steps: as `int8.steps` has it.
        float_denoiser: computes the others.
        pipe: runs both.
        offload: of the pipeline.
        device: where it computes.
        components: that change with the denoiser, by precision.
    """
    return StepDenoisers(
        schedule=steps,
        denoisers={FLOAT: float_denoiser, INT8: int8},
        components=components,
        on_change=partial(follow_denoiser, pipe, offload, device),
    )


def share_with_trials(
    loaded: LoadedModel, settings: QuantizationSettings
) -> Callable[[nn.Module], StepDenoisers] | None:
    """What lets the float model compute some steps of each trial of a search; None: it computes none.

    Args:
        loaded: the float model.
        settings: of its quantization.
    """
    if settings.int8.steps is None:
        return None
    return partial(
        share_steps,
        steps=settings.int8.steps,
        float_denoiser=loaded.denoiser,
        pipe=loaded.pipe,
        offload=loaded.offload,
        device=loaded.device,
    )
