"""Tells when a step of a pipeline's call has ended, and with which latents.

`call_pipeline` observes every call. Most pipelines report their steps by a callback; of the others, modular
ones among them, the scheduler is watched. What is done with a step is not known here.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor

from int8run.generate.call_parameters import list_call_parameters

# as diffusers' `callback_on_step_end`: the pipeline, the number of the step, its timestep, tensors by name
OnStepEnd = Callable[[Any, int, Any, dict[str, Tensor]], object]
CALLBACK, OLD_CALLBACK = "callback_on_step_end", "callback"


@contextmanager
def observe_steps(pipe: Any, on_step_end: OnStepEnd) -> Iterator[Mapping[str, Callable[..., object]]]:
    """Call a function at the end of each step of the call that is made in this context.

    Args:
        pipe: that is called.
        on_step_end: takes the arguments of diffusers' `callback_on_step_end`.

    Yields:
        The arguments of the call by which the pipeline reports its steps; none where its scheduler is
        watched.
    """
    parameters = list_call_parameters(pipe)
    if CALLBACK in parameters:
        yield {CALLBACK: on_step_end}
    elif OLD_CALLBACK in parameters:
        yield {OLD_CALLBACK: adapt_old_callback(pipe, on_step_end)}
    else:
        with watch_scheduler(pipe, on_step_end):
            yield {}


def adapt_old_callback(pipe: Any, on_step_end: OnStepEnd) -> Callable[[int, Any, Tensor], object]:
    """diffusers' older callback, which PixArt's pipelines have: it gets the latents without a name."""

    def callback(step: int, timestep: Any, latents: Tensor) -> object:
        return on_step_end(pipe, step, timestep, {"latents": latents})

    return callback


@contextmanager
def watch_scheduler(pipe: Any, on_step_end: OnStepEnd) -> Iterator[None]:
    """Report every step that the pipeline's scheduler takes.

    A scheduler that needs two calls for a step (Heun) is counted as the pipelines with a callback count it:
    each of its timesteps is a step. The latents are those that it returns; what a pipeline makes of them
    afterwards, such as the pixels that an inpainting keeps, is not in them.

    Args:
        pipe: whose `scheduler` is watched; a second one, for sound, has its own steps and is not.
        on_step_end: is called after each.
    """
    scheduler = pipe.scheduler

    def report(step: int, timestep: Any, latents: Tensor) -> None:
        on_step_end(pipe, step, timestep, {"latents": latents})

    # the object alone is changed: another pipeline may have a scheduler of the same class
    scheduler.step = WatchedStep(scheduler, report)
    try:
        yield
    finally:
        del scheduler.step


class WatchedStep:
    """Takes the place of one scheduler's `step` and reports what it returns.

    Args:
        scheduler: whose `step` is called.
        report: takes the number of the step, its timestep and the latents after it.
    """

    def __init__(self, scheduler: Any, report: Callable[[int, Any, Tensor], None]):
        self.scheduler = scheduler
        self.step = scheduler.step
        self.signature = inspect.signature(self.step)
        self.report = report
        self.num_steps = 0
        # pipelines look into the signature for what a scheduler takes
        functools.update_wrapper(self, self.step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`step(model_output, timestep, sample, …)`."""
        output = self.step(*args, **kwargs)
        arguments = self.signature.bind(*args, **kwargs).arguments
        latents = output[0] if isinstance(output, tuple) else output.prev_sample
        self.report(self.num_steps, arguments.get("timestep"), latents)
        self.num_steps += 1
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        """The plain `step` of a copied scheduler: some pipelines copy theirs for the steps of the sound."""
        copied = memo[id(self.scheduler)]
        return MethodType(type(copied).step, copied)


def count_steps(pipe: Any) -> int:
    """How many steps the running call of a pipeline has.

    Not every pipeline counts them; one that does may stop before the scheduler's last timestep. One that
    begins with an image begins later.
    """
    counted = getattr(pipe, "num_timesteps", None)
    if counted:
        return int(counted)
    begin = getattr(pipe.scheduler, "begin_index", None) or 0
    return len(pipe.scheduler.timesteps) - begin
