"""`backend=auto`: the fastest backend for each layer shape, measured on this machine, never guessed.

A candidate takes part only if its result agrees with the reference on full-range integers, where a CPU without the right
instructions saturates. The choice is kept in a small file, so that the same config gives the same result the next time.
"""

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Backend, Limits, run_plain_layer
from int8run.backends.reference import Reference
from int8run.errors import BackendError, check_range
from int8run.quant.weight import QuantizedWeight, quantize_weight
from int8run.utils.timing import is_steady, time_in_turns

log = logging.getLogger(__name__)
MAX_REL_ERR = 1e-3


@dataclass(frozen=True)
class AutoBackend:
    """Chooses among `candidates`; `rounds` interleaved timings of each, the median decides."""

    candidates: Mapping[str, Backend]
    rounds: int = 7
    table: str | None = None  # file of measured choices; None: a file in the user's cache
    last_resort: Backend | None = None  # not timed; runs a layer that no candidate can
    name: ClassVar[str] = "auto"
    limits: ClassVar[Limits] = Limits()

    def __post_init__(self) -> None:
        check_range("backend.rounds", self.rounds, 1, 1000, whole=True)

    def make_chooser(self, device: torch.device, dtype: torch.dtype) -> "BackendChooser":
        """The choice for one device and dtype, with its own view of the table."""
        refused = {
            b.name: why for b in self.candidates.values() if (why := b.limits.unsupported_reasons(device))
        }
        able = [b for b in self.candidates.values() if b.name not in refused]
        left_out = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
        if not able and self.last_resort is None:
            raise BackendError(f"backend=auto has no candidate for {device}: {left_out}")
        if not able and self.last_resort is not None:
            log.warning("backend=auto uses %s, the slow definition: %s", self.last_resort.name, left_out)
        for b in self.candidates.values():
            if (
                b.name in refused and device.type in b.limits.devices and not b.limits.is_optional
            ):  # somebody may miss its speed
                log.info("backend=auto goes without %s: it %s", b.name, ", ".join(refused[b.name]))
        cache = AutotuneCache(Path(self.table) if self.table else None, device, dtype)
        return BackendChooser(able, self.rounds, cache, device, dtype, self.last_resort)


class BackendChooser:
    """Measures each new layer shape once and remembers, in memory and in the table."""

    def __init__(
        self,
        able: Sequence[Backend],
        rounds: int,
        cache: AutotuneCache,
        device: torch.device,
        dtype: torch.dtype,
        last_resort: Backend | None = None,
    ):
        self.able, self.rounds, self.cache, self.device, self.dtype = list(able), rounds, cache, device, dtype
        self.last_resort = last_resort
        self.n_measured = 0
        self.is_steady = True  # whether the last measurement can be trusted

    def choose_backend(self, rows: int, in_features: int, out_features: int) -> Backend:
        """The fastest correct backend for `[rows, in_features] x [out_features, in_features]`."""
        names = {b.name: b for b in self.supported_backends(in_features, out_features)}
        known = self.cache.get(choice_key(names, (rows, in_features, out_features)))
        if known in names:
            return names[known]
        seconds = self.measure_seconds(
            self.select_correct(names.values(), in_features), rows, in_features, out_features
        )
        if not seconds:  # not remembered: what is missing may be there tomorrow
            if self.last_resort is None:
                raise BackendError(f"no INT8 backend computes the right numbers on {self.cache.environment}")
            log.warning(
                "%dx%dx%d: no candidate of backend=auto can run it; %s does",
                rows,
                in_features,
                out_features,
                self.last_resort.name,
            )
            return self.last_resort
        best = min(seconds, key=seconds.__getitem__)
        if self.is_steady:
            self.save_choice(names, (rows, in_features, out_features), best)
        return names[best]

    def supported_backends(self, in_features: int, out_features: int) -> list[Backend]:
        """The candidates that can take a layer of this shape."""
        return [b for b in self.able if not b.limits.unsupported_layer_reasons(in_features, out_features)]

    def save_choice(self, candidates: Iterable[str], shape: tuple[int, int, int], best: str) -> None:
        """Remember the choice among these candidates for a shape (rows, in_features, out_features)."""
        self.cache.put(choice_key(candidates, shape), best)

    def measured_float_rows(self, in_features: int, out_features: int) -> int | None:
        """Up to how many rows `task=bench` found float to be faster, or None."""
        found = self.cache.get(f"float_rows | {in_features}x{out_features}")
        return None if found is None or not found.isdigit() else int(found)

    def measure_seconds(
        self, backends: Iterable[Backend], rows: int, in_features: int, out_features: int
    ) -> dict[str, float]:
        """Seconds of each backend on random numbers, by its name: the median of interleaved calls."""
        if not self.n_measured:
            log.info("timing the backends on this machine, once for each layer shape")
        self.n_measured += 1
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(self.device)  # noqa: E731
        weight, x = quantize_weight(draw(out_features, in_features)), draw(rows, in_features).to(self.dtype)
        runs = {b.name: (b, b.pack_weight(weight)) for b in backends}
        scale, bias = weight.scale[:, 0].contiguous(), draw(out_features)
        calls = [partial(run_plain_layer, b, x, packed, scale, bias) for b, packed in runs.values()]
        seconds = dict(zip(runs, time_in_turns(calls, self.device, self.rounds), strict=True))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        # what scatters matters for the fastest, and for those that were as fast once
        rivals = [times for times in seconds.values() if min(times) <= min(medians.values())]
        self.is_steady = all(map(is_steady, rivals))
        return medians

    def select_correct(self, backends: Iterable[Backend], in_features: int) -> list[Backend]:
        """Those that compute the right numbers; the others are named in the log with the reason."""
        return [b for b in backends if self.is_correct(b, in_features)]

    def is_correct(self, backend: Backend, in_features: int) -> bool:
        """Whether full-range integers come out right: +127 everywhere makes the largest sums there are.

        A backend whose kernels cannot be built does not take part either, and its reason is logged.
        """
        weight = QuantizedWeight(
            torch.full((8, in_features), 127, dtype=torch.int8, device=self.device),
            torch.ones(8, 1, device=self.device),
        )
        x = torch.ones(8, in_features, device=self.device)
        run = lambda b: run_plain_layer(
            b, x, b.pack_weight(weight), weight.scale[:, 0].contiguous(), None
        ).float()
        try:
            found = run(backend)
        except BackendError as error:
            log.warning("backend=auto leaves out %s", error)
            return False
        expected = run(Reference())
        right = bool(((found - expected).abs() <= MAX_REL_ERR * expected.abs()).all())
        if not right:
            log.warning("backend %s saturates on this CPU and is left out", backend.name)
        return right


def choice_key(candidates: Iterable[str], shape: tuple[int, int, int]) -> str:
    """What the table is asked: which of these candidates, by their names, for this shape."""
    return f"{','.join(sorted(candidates))} | {'x'.join(map(str, shape))}"
