"""Which of a model's layers become INT8, and why the others do not, from their plans alone.

Builds, tasks and metrics ask here. No model is needed for it, so that `task=quantize`, which works on files,
does not import diffusers.
"""

import logging
from collections import Counter
from collections.abc import Sequence

from int8run.layers.plan import CONV, FLOAT, LayerPlan

log = logging.getLogger(__name__)


def select_int8_plans(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers that become INT8."""
    return [plan for plan in plans if plan.skip_reason is None]


def warn_without_convolutions(plans: Sequence[LayerPlan], choice: str) -> None:
    """Warn where INT8 convolutions are asked for and the denoiser has none that can be INT8.

    Args:
        plans: of every layer, before any is timed.
        choice: `int8.convolutions` of the config.
    """
    if choice == FLOAT or any(plan.kind == CONV for plan in select_int8_plans(plans)):
        return
    log.warning(
        "int8.convolutions=%s: the denoiser has no convolutions that can be INT8; int8.vae=int8 is for "
        "the VAE's",
        choice,
    )


def describe_skip_reasons(plans: Sequence[LayerPlan]) -> str:
    """Why the layers of a denoiser stay float, with the number of layers for each reason."""
    reasons = Counter(plan.skip_reason for plan in plans if plan.skip_reason is not None)
    counts = "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
    return counts or "it has no Linear at all"
