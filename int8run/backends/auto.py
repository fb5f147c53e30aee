"""`backend=auto`: the fastest backend for each layer shape, measured on this machine, never guessed.

A candidate takes part only if its results are right (`result_check`). One that cannot run is left out with
its reason. The float layer
takes part where INT8 has to pay (`int8.only_if_faster`). The choices are kept in a small file
(`autotune_cache`), so that the same config gives the same result the next time. `int8run.ptq.quantize` asks
for a backend per layer, and `task=bench` measures with the same code.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeGuard

import torch

from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import Backend, LayerTimes, Limits, Shape, describe_settings
from int8run.backends.float import Float, TimedFloat
from int8run.backends.float_comparison import FloatComparison, compare_times, parse_comparison
from int8run.backends.layer_timer import LayerTimer
from int8run.backends.result_check import find_wrong_grouped_result, find_wrong_result
from int8run.errors import BackendError, ConfigError, check_range
from int8run.quant.grouped_rounding import GroupLayout
from int8run.utils.paths import expand_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AutoBackend:
    """Chooses the fastest correct backend for each layer shape.

    Args:
        candidates: backends by name.
        rounds: timings of each candidate, interleaved; the median decides.
        table: file of measured choices; None: a file in the user's cache.
        last_resort: runs the layers that no candidate can run. None: such a layer is an error.
    """

    candidates: Mapping[str, Backend]
    rounds: int = 7
    table: str | None = None
    last_resort: Backend | None = None
    name: ClassVar[str] = "auto"
    limits: ClassVar[Limits] = Limits(devices=("cpu", "cuda", "xpu"))

    def __post_init__(self) -> None:
        check_range("backend.rounds", self.rounds, 1, 1000, whole=True)
        if self.table is not None:
            expand_path(self.table)  # raises for what can be no path
        if any(isinstance(backend, Float) for backend in self.candidates.values()):
            raise ConfigError(
                "backend.candidates holds float, which is no INT8 backend; int8.only_if_faster=true lets the "
                "float layer take part"
            )

    def make_chooser(
        self, device: torch.device, dtype: torch.dtype, *, times_float: bool = False
    ) -> "BackendChooser":
        """What chooses for one device and one dtype of the float model.

        Args:
            device: where the layers run.
            dtype: of the float model.
            times_float: whether the float layer is timed beside the candidates.

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
            timer=LayerTimer(device, dtype, self.rounds),
            cache=AutotuneCache(table, device, dtype),
            last_resort=self.last_resort,
            times_float=times_float,
        )

    def _announce_last_resort(self, device: torch.device, missing: Mapping[str, str]) -> None:
        listed = "; ".join(f"{name}: {reasons}" for name, reasons in missing.items())
        if self.last_resort is None:
            raise BackendError(f"backend=auto has no candidate for {device}: {listed}")
        log.warning(
            "backend=auto has none but %s, the slow definition: %s",
            self.last_resort.name,
            listed,
        )

    def _report_missing(self, device: torch.device, missing: Mapping[str, str]) -> None:
        """Log the candidates that one would expect on this device."""
        for backend in self.candidates.values():
            is_expected = device.type in backend.limits.devices and not backend.limits.is_optional
            if is_expected and backend.name in missing:
                log.info("backend=auto runs without %s: it %s", backend.name, missing[backend.name])


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for a layer shape.

    Args:
        backend: the fastest INT8 backend.
        comparison: of the backend with the float layer.
        failures: why other backends take no part at this shape, by name.
    """

    backend: Backend
    comparison: FloatComparison = field(default_factory=FloatComparison)
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass
class BackendChooser:
    """Measures each new layer shape once and remembers the choice.

    In memory whatever it is, so that all layers of a shape get one backend; in the autotune cache where the
    times can be trusted.

    Args:
        candidates: backends that can run on the device.
        timer: measures on the device.
        cache: choices made before.
        last_resort: see `AutoBackend`.
        times_float: whether the float layer is timed beside the candidates.
        left_out: why candidates take no part in a choice, by name.
    """

    candidates: Sequence[Backend]
    timer: LayerTimer
    cache: AutotuneCache
    last_resort: Backend | None = None
    times_float: bool = False
    left_out: dict[str, str] = field(default_factory=dict, init=False)
    _choices: dict[tuple[Shape, GroupLayout | None], LayerChoice] = field(default_factory=dict, init=False)
    # by name of a backend, in_features and layout: why it computes nothing useful; None: it does
    _faults: dict[tuple[str, int, GroupLayout | None], str | None] = field(default_factory=dict, init=False)

    @property
    def device(self) -> torch.device:
        """Where the layers run."""
        return self.timer.device

    @property
    def float_layer(self) -> TimedFloat:
        """The float layer in the model's dtype."""
        return TimedFloat(self.timer.dtype)

    def choose_backend(self, rows: int, in_features: int, out_features: int) -> Backend:
        """The fastest correct backend for `[rows, in_features] x [out_features, in_features]`.

        Raises:
            BackendError: when no candidate computes the right numbers and there is no last resort.
        """
        return self.choose_layer((rows, in_features, out_features)).backend

    def choose_layer(self, shape: Shape, layout: GroupLayout | None = None) -> LayerChoice:
        """The fastest correct backend for a shape, and how it compares with the float layer.

        Args:
            shape: rows, in_features and out_features.
            layout: of a weight with 4 or 6 bits, which is not compared with float: it is wanted for its
                memory. None: the weight has 8 bits.

        Raises:
            BackendError: when no candidate computes the right numbers and there is no last resort.
        """
        key = (shape, layout)
        if key not in self._choices:
            self._choices[key] = self._find_choice(shape, layout)
        return self._choices[key]

    def _find_choice(self, shape: Shape, layout: GroupLayout | None) -> LayerChoice:
        """Read a choice that was measured before, or measure it."""
        _, in_features, out_features = shape
        supported = self.supported_backends(in_features, out_features)
        correct = {backend.name: backend for backend in self.select_correct(supported, in_features, layout)}
        faults = self.list_faults(supported, in_features, layout)
        if not correct:
            correct = self._take_last_resort(shape)
            if not self.compares_float(layout):
                return LayerChoice(next(iter(correct.values())), failures=faults)
        found = parse_choice(self.cache.get(choice_key(correct, shape, layout)), correct)
        if not self.is_complete(found, layout):
            found = self.measure_choice(correct, shape, layout)
        return replace(found, failures={**faults, **found.failures})

    def compares_float(self, layout: GroupLayout | None) -> bool:
        """Whether the float layer takes part for such weights."""
        return self.times_float and layout is None

    def is_complete(
        self, choice: LayerChoice | None, layout: GroupLayout | None = None
    ) -> TypeGuard[LayerChoice]:
        """Whether a choice of the autotune cache says all that is asked of this chooser."""
        if choice is None:
            return False
        return choice.comparison.speedup is not None or not self.compares_float(layout)

    def measure_choice(
        self, backends: Mapping[str, Backend], shape: Shape, layout: GroupLayout | None = None
    ) -> LayerChoice:
        """Time backends on a shape, and remember the fastest where the times can be trusted.

        Args:
            backends: that compute the right numbers, by name; one alone is timed only beside float.
            shape: rows, in_features and out_features.
            layout: as for `choose_layer`.

        Raises:
            BackendError: when none can run the shape and there is no last resort.
        """
        if not self.timer.n_measured:
            log.info("timing the backends on this machine, once for each layer shape")
        timed: dict[str, Backend] = dict(backends)
        if self.compares_float(layout):
            timed[Float.name] = self.float_layer
        times = self.timer.measure(timed, shape, layout)
        self.note_failures(times.failures)
        int8_seconds = {name: times.seconds[name] for name in backends if name in times.seconds}
        if not int8_seconds:
            last_resort = next(iter(self._take_last_resort(shape).values()))
            return LayerChoice(last_resort, failures=times.failures)
        fastest = min(int8_seconds, key=int8_seconds.__getitem__)
        if not times.is_steady:
            # times of a busy machine may pick a backend, but take no layer out of INT8
            return LayerChoice(backends[fastest], failures=times.failures)
        choice = compare_with_float(times, backends[fastest], Float.name)
        kept = self.save_choice([backends[name] for name in int8_seconds], shape, choice, layout)
        return replace(kept, failures=times.failures)

    def _take_last_resort(self, shape: Shape) -> dict[str, Backend]:
        if self.last_resort is None:
            raise BackendError(f"no INT8 backend computes the right numbers on {self.cache.environment}")
        size = "x".join(map(str, shape))
        log.warning("%s: no candidate of backend=auto can run it; %s can", size, self.last_resort.name)
        return {self.last_resort.name: self.last_resort}

    def supported_backends(self, in_features: int, out_features: int) -> list[Backend]:
        """The candidates that can take a layer of this shape."""
        return [
            b for b in self.candidates if not b.limits.unsupported_layer_reasons(in_features, out_features)
        ]

    def save_choice(
        self,
        candidates: Sequence[Backend],
        shape: Shape,
        choice: LayerChoice,
        layout: GroupLayout | None = None,
    ) -> LayerChoice:
        """Keep the best of some candidates for a shape.

        Returns:
            What counts: another process may have measured the shape meanwhile, and both are to run alike.
        """
        by_name = {backend.name: backend for backend in candidates}
        key = choice_key(by_name, shape, layout)
        kept = parse_choice(self.cache.put(key, format_choice(choice)), by_name)
        return kept if self.is_complete(kept, layout) else choice

    def measured_float_rows(self, in_features: int, out_features: int) -> int | None:
        """Up to how many rows `task=bench` found float to be faster; None where it was not measured."""
        found = self.cache.get(f"float_rows | {in_features}x{out_features}")
        if found is None or not found.isdigit():
            return None
        return int(found)

    def select_correct(
        self, backends: Iterable[Backend], in_features: int, layout: GroupLayout | None = None
    ) -> list[Backend]:
        """The backends that compute the right numbers; the others are named in the log with the reason."""
        return [b for b in backends if self.is_correct(b, in_features, layout)]

    def is_correct(self, backend: Backend, in_features: int, layout: GroupLayout | None = None) -> bool:
        """Whether products come out right. Each backend is checked once for each width and layout."""
        key = (backend.name, in_features, layout)
        if key not in self._faults:
            fault = find_wrong_result(backend, in_features, self.device, self.timer.dtype)
            if fault is None and layout is not None:
                fault = find_wrong_grouped_result(backend, in_features, layout, self.device, self.timer.dtype)
            self._faults[key] = fault
            if fault is not None:
                self.note_failures({backend.name: fault})
        return self._faults[key] is None

    def list_faults(
        self, backends: Iterable[Backend], in_features: int, layout: GroupLayout | None = None
    ) -> dict[str, str]:
        """Why some of these backends were found to be of no use at this width, by name."""
        faults = {b.name: self._faults.get((b.name, in_features, layout)) for b in backends}
        return {name: fault for name, fault in faults.items() if fault is not None}

    def note_failures(self, failures: Mapping[str, str]) -> None:
        """Remember and log why candidates take no part, each reason once."""
        for name, reason in failures.items():
            if self.left_out.get(name) != reason:
                log.warning("backend=auto leaves out %s: %s", name, reason)
            self.left_out[name] = reason


def compare_with_float(times: LayerTimes, backend: Backend, float_name: str) -> LayerChoice:
    """The choice of a backend, with its ratio to the float layer, rounded as it is kept.

    Args:
        times: of one shape, steady ones.
        backend: the fastest of them.
        float_name: that the float layer has in the times.

    Returns:
        No ratio where the float layer has no time.
    """
    if float_name not in times.seconds:
        return LayerChoice(backend)
    comparison = compare_times(
        times.seconds[float_name], times.seconds[backend.name], times.find_shortest(backend.name)
    )
    return LayerChoice(backend, comparison)


def choice_key(candidates: Mapping[str, Backend], shape: Shape, layout: GroupLayout | None = None) -> str:
    """The key of a choice in the autotune cache: the candidates with their settings, shape and bits."""
    described = [describe_settings(candidates[name]) for name in sorted(candidates)]
    key = f"{','.join(described)} | {'x'.join(map(str, shape))}"
    return key if layout is None else f"{key} | {layout.label}"


def format_choice(choice: LayerChoice) -> str:
    """A choice as the autotune cache has it: `cpu`, `cpu 1.84` where the float layer was timed.

    `cpu 0.93 scatters` where float may only seem to be faster.
    """
    return f"{choice.backend.name} {choice.comparison.format()}".rstrip()


def parse_choice(text: str | None, backends: Mapping[str, Backend]) -> LayerChoice | None:
    """A choice out of the autotune cache; None for one of other backends, and for what somebody edited."""
    name, _, comparison = (text or "").partition(" ")
    if name not in backends:
        return None
    return LayerChoice(backends[name], parse_comparison(comparison))
