"""The fastest float dtype of this machine for a model: what INT8 has to beat, whatever the model's own is.

`tasks.run_metrics` compares with it. Measured with one step of the model, once for each machine, model and
size, and kept with the other measured choices. Knows no family and no config.
"""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Shape
from int8run.backends.float import TimedFloat
from int8run.backends.layer_timer import LayerTimer
from int8run.backends.run_errors import find_run_failure
from int8run.utils.dtypes import FLOAT_DTYPES
from int8run.utils.hardware import count_free_bytes
from int8run.utils.tensors import iter_tensors
from int8run.utils.timing import is_steady, time_in_turns

log = logging.getLogger(__name__)
RIVALS = FLOAT_DTYPES  # the dtypes that are tried
SCATTERED = "float dtypes are not compared: times scatter by more than twice, other work runs here"
ROUNDS = 5
# a dtype whose largest product is not this many times as fast is not worth a copy of the model
MIN_GAIN = 1.05
MAX_MEMORY_SHARE = 0.8  # of what is free, for the copy
Calls = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class BestFloat:
    """The fastest float dtype for a model.

    Args:
        dtype: such as `bfloat16`.
        time_share: time of a step in it over that in the model's own dtype, at most 1.
    """

    dtype: str
    time_share: float = 1.0


def find_best_float(
    denoiser: nn.Module, calls: Calls, *, dtype: torch.dtype, largest: Shape, cache: AutotuneCache
) -> BestFloat | None:
    """The fastest float dtype for a model, measured or known from before.

    Args:
        denoiser: the float model, in memory, not compiled.
        calls: its arguments in one step.
        dtype: the model's own; single layers may have another.
        largest: the layer with the most multiply-adds, which tells what dtype is worth a try.
        cache: of the device and the model's dtype.

    Returns:
        None where a copy of the model in that dtype does not fit into the memory or fails, or where times
        scatter.
    """
    num_params = sum(parameter.numel() for parameter in denoiser.parameters())
    key = f"best float | {type(denoiser).__name__} of {num_params} | {'x'.join(map(str, largest))}"
    known = parse_best_float(cache.get(key))
    if known is not None:
        return known
    device = next(denoiser.parameters()).device
    rival = find_fastest_product(dtype, device, largest)
    if rival is None:
        log.info(SCATTERED)
        return None
    if rival == dtype:
        best: BestFloat | None = BestFloat(TimedFloat(dtype).dtype_name)
    else:
        best = measure_steps(denoiser, calls, dtype, rival)
    if best is not None:
        cache.put(key, f"{best.dtype} {best.time_share}")
    return best


def parse_best_float(text: str | None) -> BestFloat | None:
    """What the cache has; None for nothing and for what somebody edited."""
    dtype, _, share = (text or "").partition(" ")
    try:
        time_share = float(share)
    except ValueError:
        return None
    if dtype not in FLOAT_DTYPES or not 0 < time_share <= 1:
        return None
    return BestFloat(dtype, time_share)


def find_fastest_product(own: torch.dtype, device: torch.device, largest: Shape) -> torch.dtype | None:
    """The dtype in which the largest layer is clearly faster than in the model's own, else that.

    Returns:
        None where the times scatter.
    """
    rivals = {name: TimedFloat(getattr(torch, name)) for name in RIVALS}
    own_name = TimedFloat(own).dtype_name
    if own_name not in rivals:
        return own
    times = LayerTimer(device, own, ROUNDS).measure(rivals, largest)
    if not times.is_steady:
        return None
    seconds = times.seconds
    fastest = min(seconds, key=seconds.__getitem__, default=own_name)
    if seconds.get(own_name, math.inf) < MIN_GAIN * seconds.get(fastest, 0.0):
        return own
    return rivals[fastest].dtype


def measure_steps(
    denoiser: nn.Module, calls: Calls, dtype: torch.dtype, rival_dtype: torch.dtype
) -> BestFloat | None:
    """Time one step of the model beside one of a copy in another dtype.

    Args:
        denoiser: the float model.
        calls: its arguments in one step.
        dtype: the model's own.
        rival_dtype: of the copy.

    Returns:
        The faster of the two; None where the copy cannot be had, or the times scatter.
    """
    device = next(denoiser.parameters()).device
    own_name, name = TimedFloat(dtype).dtype_name, TimedFloat(rival_dtype).dtype_name
    needed = count_copy_bytes(denoiser, rival_dtype)
    if needed > MAX_MEMORY_SHARE * count_free_bytes(device):
        log.info("%s may be faster than %s here; a copy of the model does not fit", name, own_name)
        return None
    rival_calls = [cast_floats(call, dtype, rival_dtype) for call in calls]
    rivals: list[nn.Module] = []
    outputs: list[bool] = []

    def try_rival() -> None:
        rivals.append(copy.deepcopy(denoiser).to(rival_dtype))
        outputs.append(run_step(rivals[0], rival_calls))

    failure = find_run_failure(try_rival, device)
    if failure is not None:
        log.info("the model does not run in %s: %s", name, failure)
        return None
    if not outputs[0]:  # too narrow for its activations
        return BestFloat(own_name)
    steps = [partial(run_step, denoiser, calls), partial(run_step, rivals[0], rival_calls)]
    own_times, rival_times = time_in_turns(steps, device, ROUNDS)
    share = round(min(rival_times) / min(own_times), 3)
    if not (is_steady(own_times) and is_steady(rival_times)):
        log.info(SCATTERED)
        return None
    return BestFloat(name, share) if 0 < share < 1 else BestFloat(own_name)


def count_copy_bytes(denoiser: nn.Module, dtype: torch.dtype) -> int:
    """The most memory that a copy of a model takes while it is made: it is copied first, and cast then."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    return sum(tensor.numel() * max(tensor.itemsize, dtype.itemsize) for tensor in tensors)


@torch.no_grad()
def run_step(denoiser: nn.Module, calls: Calls) -> bool:
    """Call the model with the arguments of one step; whether all that it returns is finite."""
    is_finite = True
    for call in calls:
        for tensor in iter_tensors(denoiser(**call)):
            if tensor.is_floating_point():
                is_finite = is_finite and bool(torch.isfinite(tensor).all())
    return is_finite


def cast_floats(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """A value whose tensors of one dtype have another, in lists and mappings at any depth."""
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, Mapping):
        return {name: cast_floats(item, source, target) for name, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    items = [cast_floats(item, source, target) for item in value]
    if hasattr(value, "_make"):  # a named tuple takes its fields one by one
        return value._make(items)
    return type(value)(items)
