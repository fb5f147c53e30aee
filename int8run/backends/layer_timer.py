"""Times backends on one layer shape: random numbers, calls that take turns, medians.

`auto` chooses with it, `task=bench` prints its numbers, and backends that have settings are tuned with it.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from int8run.backends.base import Backend, LayerTimes, Shape, run_plain_layer
from int8run.backends.float import TimedFloat
from int8run.backends.row_decoder import choose_multiplier, run_grouped_layer
from int8run.backends.run_errors import describe_run_error, find_run_failure, has_lost_device, list_run_errors
from int8run.quant.grouped_rounding import GroupLayout, draw_grouped_weight
from int8run.quant.grouped_weight import GroupedWeight, LayerWeight
from int8run.quant.weight import quantize_weight
from int8run.utils.timing import is_steady, read_clock, time_in_turns

# what takes this many times as long as the fastest is timed once: it is out of the race, and some float
# products of CPUs without instructions for them take minutes
HOPELESS = 10.0
MIN_HOPELESS_SECONDS = 0.5  # a quicker call may have waited for other work


@dataclass(frozen=True)
class RandomLayer:
    """A layer with random numbers.

    Args:
        weight: [N, K].
        bias: float32 [N].
        x: float32 [M, K].
    """

    weight: LayerWeight
    bias: Tensor
    x: Tensor
    _inputs: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def get_input(self, dtype: torch.dtype) -> Tensor:
        """x in a dtype, one tensor for all who take it: with many rows each takes gigabytes."""
        if dtype not in self._inputs:
            self._inputs[dtype] = self.x.to(dtype)
        return self._inputs[dtype]


def draw_layer(shape: Shape, device: torch.device, layout: GroupLayout | None = None) -> RandomLayer:
    """Draw a layer on the device, the same one at each call.

    Args:
        shape: rows, in_features and out_features.
        device: where it is.
        layout: of a weight with 4 or 6 bits; None: it has 8.
    """
    rows, in_features, out_features = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    weight: LayerWeight
    if layout is None:
        weight = quantize_weight(draw(out_features, in_features))
    else:
        weight = draw_grouped_weight(out_features, in_features, layout, generator)
    return RandomLayer(
        weight=weight,
        bias=draw(out_features),
        x=draw(rows, in_features),
    )


@dataclass
class Attempt:
    """One backend on one layer, for as long as it can run.

    Args:
        run: one call of it.
        failure: why it cannot run; None: it can.
    """

    run: Callable[[], object]
    failure: str | None = None

    def __call__(self) -> None:
        """One call, after a failure none."""
        if self.failure is not None:
            return
        try:
            self.run()
        except list_run_errors() as error:
            if has_lost_device(error):
                raise
            self.failure = describe_run_error(error)


@dataclass
class LayerTimer:
    """Times backends on one device.

    Args:
        device: where the layers run.
        dtype: of their inputs.
        rounds: timings of each backend, interleaved.
        n_measured: how many shapes were measured so far.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int
    n_measured: int = field(default=0, init=False)

    @torch.no_grad()
    def measure(
        self, backends: Mapping[str, Backend], shape: Shape, layout: GroupLayout | None = None
    ) -> LayerTimes:
        """Time a layer without transform and branch on each backend.

        Args:
            backends: by the name that they have in the result.
            shape: rows, in_features and out_features.
            layout: of a weight with 4 or 6 bits; None: it has 8.
        """
        self.n_measured += 1
        layer = draw_layer(shape, self.device, layout)
        return self.time_attempts({name: self.prepare(backend, layer) for name, backend in backends.items()})

    def time_attempts(self, attempts: Mapping[str, Attempt]) -> LayerTimes:
        """Time calls that take turns; one that is hopelessly slow is called once.

        Args:
            attempts: each was called once; by the name that it has in the result.
        """
        seconds = self.time_first_calls(attempts)
        limit = max(HOPELESS * min(seconds.values(), default=0.0), MIN_HOPELESS_SECONDS)
        rivals = {name: attempts[name] for name in seconds if seconds[name] <= limit}
        times = time_in_turns(list(rivals.values()), self.device, self.rounds)
        rounds = dict(zip(rivals, times, strict=True))
        for name, attempt in attempts.items():
            if attempt.failure is not None:  # in one of its rounds
                seconds.pop(name, None)
                rounds.pop(name, None)
        seconds |= {name: statistics.median(values) for name, values in rounds.items()}
        failures = {name: attempt.failure for name, attempt in attempts.items() if attempt.failure}
        return LayerTimes(
            seconds,
            failures,
            is_steady=are_fastest_steady(rounds),
            shortest={name: min(values) for name, values in rounds.items()},
        )

    def prepare(self, backend: Backend, layer: RandomLayer) -> Attempt:
        """Pack the weight and call the backend once, which compiles what it needs."""
        dtype = self.dtype
        if isinstance(backend, TimedFloat):
            dtype = backend.dtype
        x, scale = layer.get_input(dtype), layer.weight.scale[:, 0].contiguous()
        attempt = Attempt(run=lambda: None)

        def pack_and_run() -> None:
            if isinstance(layer.weight, GroupedWeight):
                multiplier = choose_multiplier(backend, layer.weight)
                groups = multiplier.pack_grouped_weight(layer.weight)
                attempt.run = partial(run_grouped_layer, backend, multiplier, x, groups, scale, layer.bias)
            else:
                packed = backend.pack_weight(layer.weight)
                attempt.run = partial(run_plain_layer, backend, x, packed, scale, layer.bias)
            attempt.run()

        attempt.failure = find_run_failure(pack_and_run, self.device)
        return attempt

    def time_first_calls(self, attempts: Mapping[str, Attempt]) -> dict[str, float]:
        """Seconds of one call of each attempt that can run, by name."""
        seconds = {}
        for name, attempt in attempts.items():
            started = read_clock(self.device)
            attempt()
            if attempt.failure is None:
                seconds[name] = read_clock(self.device) - started
        return seconds


def are_fastest_steady(rounds: Mapping[str, list[float]]) -> bool:
    """Whether the times can be trusted.

    Scatter matters for the fastest, and for those that were as fast once.
    """
    if not rounds:
        return True
    least_median = min(statistics.median(values) for values in rounds.values())
    rivals = [values for values in rounds.values() if min(values) <= least_median]
    return all(map(is_steady, rivals))
