"""`backend=auto`: the fastest backend for each layer shape, measured on this machine, never guessed.

A candidate takes part only if its result agrees with the reference on full-range integers, where a CPU
without the right instructions saturates. The choices are kept in a small file (`autotune_cache`), so that the
same config gives the same result the next time. `int8run.ptq.quantize` asks for a backend per layer, and
`task=bench` measures with the same code.
"""

import logging
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Backend, Limits, run_plain_layer
from int8run.backends.reference import Reference
from int8run.errors import BackendError, check_range
from int8run.quant.weight import QuantizedWeight, quantize_weight
from int8run.utils.paths import expand_path
from int8run.utils.timing import is_steady, time_in_turns

log = logging.getLogger(__name__)

# how far the results of the correctness check may be from the reference: float16 rounds the scaled sums
MAX_REL_ERR = 1e-3


@dataclass(frozen=True)
class AutoBackend:
    """Chooses the fastest correct backend for each layer shape.

    Args:
        candidates: backends by name.
        rounds: timings of each candidate, interleaved; the median decides.
        table: file of measured choices; None: a file in the user's cache.
        last_resort: not timed; runs the layers that no candidate can run. None: such a layer is an error.
    """

    candidates: Mapping[str, Backend]
    rounds: int = 7
    table: str | None = None
    last_resort: Backend | None = None
    name: ClassVar[str] = "auto"
    limits: ClassVar[Limits] = Limits()

    def __post_init__(self) -> None:
        check_range("backend.rounds", self.rounds, 1, 1000, whole=True)
        if self.table is not None:
            expand_path(self.table)  # raises for what can be no path

    def make_chooser(self, device: torch.device, dtype: torch.dtype) -> "BackendChooser":
        """What chooses for one device and one dtype of the float model.

        Raises:
            BackendError: when no candidate can run on the device and there is no last resort.
        """
        usable: list[Backend] = []
        missing: dict[str, str] = {}  # name of a backend that cannot run here -> why
        for backend in self.candidates.values():
            reasons = backend.limits.unsupported_reasons(device)
            if reasons:
                missing[backend.name] = ", ".join(reasons)
            else:
                usable.append(backend)
        if not usable:
            self._announce_last_resort(device, missing)
        self._report_missing(device, missing)
        table = expand_path(self.table) if self.table else None
        return BackendChooser(
            candidates=usable,
            rounds=self.rounds,
            cache=AutotuneCache(table, device, dtype),
            device=device,
            dtype=dtype,
            last_resort=self.last_resort,
        )

    def _announce_last_resort(self, device: torch.device, missing: Mapping[str, str]) -> None:
        listed = "; ".join(f"{name}: {reasons}" for name, reasons in missing.items())
        if self.last_resort is None:
            raise BackendError(f"backend=auto has no candidate for {device}: {listed}")
        log.warning("backend=auto uses %s, the slow definition: %s", self.last_resort.name, listed)

    def _report_missing(self, device: torch.device, missing: Mapping[str, str]) -> None:
        """Log the candidates that one would expect on this device."""
        for backend in self.candidates.values():
            is_expected = device.type in backend.limits.devices and not backend.limits.is_optional
            if is_expected and backend.name in missing:
                log.info("backend=auto runs without %s: it %s", backend.name, missing[backend.name])


@dataclass
class BackendChooser:
    """Measures each new layer shape once and remembers the choice, in memory and in the autotune cache.

    Args:
        candidates: backends that can run on the device.
        rounds: timings of each candidate.
        cache: choices made before.
        device: where the layers run.
        dtype: of the float model.
        last_resort: see `AutoBackend`.
        n_measured: how many measurements were taken so far.
        is_steady: whether the last measurement can be trusted: the times of the fastest did not scatter.
    """

    candidates: list[Backend]
    rounds: int
    cache: AutotuneCache
    device: torch.device
    dtype: torch.dtype
    last_resort: Backend | None = None
    n_measured: int = field(default=0, init=False)
    is_steady: bool = field(default=True, init=False)

    def choose_backend(self, rows: int, in_features: int, out_features: int) -> Backend:
        """The fastest correct backend for `[rows, in_features] x [out_features, in_features]`.

        Raises:
            BackendError: when no candidate computes the right numbers and there is no last resort.
        """
        shape = (rows, in_features, out_features)
        by_name = {b.name: b for b in self.supported_backends(in_features, out_features)}
        known = self.cache.get(choice_key(by_name, shape))
        if known in by_name:
            return by_name[known]
        correct = self.select_correct(by_name.values(), in_features)
        seconds = self.measure_seconds(correct, *shape)
        if not seconds:
            return self._use_last_resort(shape)
        fastest = min(seconds, key=seconds.__getitem__)
        if self.is_steady:
            self.save_choice(by_name, shape, fastest)
        return by_name[fastest]

    def _use_last_resort(self, shape: tuple[int, int, int]) -> Backend:
        # not kept in the cache: what is missing may be installed tomorrow
        if self.last_resort is None:
            raise BackendError(f"no INT8 backend computes the right numbers on {self.cache.environment}")
        size = "x".join(map(str, shape))
        log.warning("%s: no candidate of backend=auto can run it; %s does", size, self.last_resort.name)
        return self.last_resort

    def supported_backends(self, in_features: int, out_features: int) -> list[Backend]:
        """The candidates that can take a layer of this shape."""
        return [
            b for b in self.candidates if not b.limits.unsupported_layer_reasons(in_features, out_features)
        ]

    def save_choice(self, candidates: Iterable[str], shape: tuple[int, int, int], best: str) -> None:
        """Remember the best of these candidates for a shape (rows, in_features, out_features)."""
        self.cache.put(choice_key(candidates, shape), best)

    def measured_float_rows(self, in_features: int, out_features: int) -> int | None:
        """Up to how many rows `task=bench` found float to be faster; None where it was not measured."""
        found = self.cache.get(f"float_rows | {in_features}x{out_features}")
        if found is None or not found.isdigit():
            return None
        return int(found)

    def measure_seconds(
        self, backends: Iterable[Backend], rows: int, in_features: int, out_features: int
    ) -> dict[str, float]:
        """Seconds of each backend on random numbers, by its name: the median of interleaved calls."""
        if not self.n_measured:
            log.info("timing the backends on this machine, once for each layer shape")
        self.n_measured += 1
        generator = torch.Generator().manual_seed(0)

        def random_tensor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        weight = quantize_weight(random_tensor(out_features, in_features))
        x = random_tensor(rows, in_features).to(self.dtype)
        scale, bias = weight.scale[:, 0].contiguous(), random_tensor(out_features)
        calls = {b.name: partial(run_plain_layer, b, x, b.pack_weight(weight), scale, bias) for b in backends}
        times = time_in_turns(list(calls.values()), self.device, self.rounds)
        seconds = dict(zip(calls, times, strict=True))  # of each call, by backend
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        # scatter matters for the fastest, and for those that were as fast once
        rivals = [values for values in seconds.values() if min(values) <= min(medians.values())]
        self.is_steady = all(map(is_steady, rivals))
        return medians

    def select_correct(self, backends: Iterable[Backend], in_features: int) -> list[Backend]:
        """The backends that compute the right numbers; the others are named in the log with the reason."""
        return [b for b in backends if self.is_correct(b, in_features)]

    def is_correct(self, backend: Backend, in_features: int) -> bool:
        """Whether full-range integers come out right: +127 everywhere makes the largest sums there are.

        A backend whose kernels cannot be built does not take part either; the log says why.
        """
        try:
            found = run_full_range(backend, in_features, self.device)
        except BackendError as error:
            log.warning("backend=auto leaves out %s", error)
            return False
        expected = run_full_range(Reference(), in_features, self.device)
        is_close = bool(((found - expected).abs() <= MAX_REL_ERR * expected.abs()).all())
        if not is_close:
            log.warning("backend %s saturates on this CPU and is left out", backend.name)
        return is_close


def run_full_range(backend: Backend, in_features: int, device: torch.device) -> Tensor:
    """The product of ones with integers that are all +127. Returns float32 [8, 8]."""
    weight = QuantizedWeight(
        qdata=torch.full((8, in_features), 127, dtype=torch.int8, device=device),
        scale=torch.ones(8, 1, device=device),
    )
    x = torch.ones(8, in_features, device=device)
    packed, scale = backend.pack_weight(weight), weight.scale[:, 0].contiguous()
    return run_plain_layer(backend, x, packed, scale, bias=None).float()


def choice_key(candidates: Iterable[str], shape: tuple[int, int, int]) -> str:
    """The key of a choice in the autotune cache: the candidates by name, and the shape of the layer."""
    return f"{','.join(sorted(candidates))} | {'x'.join(map(str, shape))}"
