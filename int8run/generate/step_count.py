"""How many steps a call takes: a strength below 1 leaves out the first ones.

Whoever wants a few steps, to warm up, to capture or to time a model, asks here how many to tell the call.
"""

import math
from collections.abc import Sequence
from typing import Any

from int8run.generate.call_inputs import CallInputs, read_call_inputs
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import STRENGTH
from int8run.models.sampling import Sampling

MAX_STEPS = 1000  # that a Sampling may have


def count_asked_steps(pipe: Any, batch: Sequence[Sample], sampling: Sampling, steps: int) -> int:
    """The number of steps by which a call takes at least some.

    Args:
        pipe: to be called.
        batch: what it generates.
        sampling: how.
        steps: that are wanted.
    """
    strength = get_strength(read_call_inputs(type(pipe)), batch, sampling)
    if not 0 < strength < 1:
        return steps
    # pipelines round the product down; in floating point 0.29 * 100 is below 29
    asked = math.ceil(steps / strength)
    while int(asked * strength) < steps:
        asked += 1
    return min(asked, MAX_STEPS)


def count_taken_steps(steps: int, strength: float) -> int:
    """The number of steps that a call takes at least of those that it is told."""
    return min(int(steps * strength), steps)


def get_strength(call: CallInputs, batch: Sequence[Sample], sampling: Sampling) -> float:
    """The smallest strength of a batch: a sample's own, else the sampling's, else the pipeline's default.

    Args:
        call: what the pipeline takes.
        batch: what it generates.
        sampling: how.

    Returns:
        1 where a strength leaves out no steps.
    """
    if not call.strength_skips_steps:
        return 1.0
    default = sampling.extra.get(STRENGTH, call.default_strength)
    strengths = []
    for sample in batch:
        strength = sample.inputs.strength
        if strength is None:
            strength = default
        strengths.append(strength)
    return min((float(strength) for strength in strengths if strength is not None), default=1.0)
