"""`backend=auto`: the fastest backend for each layer shape, measured on this machine, never guessed.

A candidate takes part only if its result agrees with the reference on full-range integers, where a CPU without the right
instructions saturates. The choice is kept in a small file, so that the same config gives the same result the next time.
"""

import importlib.metadata
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from int8run.backends.base import Backend, Limits, run_layer
from int8run.backends.reference import Reference
from int8run.errors import BackendError, in_range
from int8run.machine import device_name
from int8run.quant.weight import QuantizedWeight, quantize_weight

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
        in_range("backend.rounds", self.rounds, 1, 1000, whole=True)

    def chooser(self, device: torch.device, dtype: torch.dtype) -> "Chooser":
        """The choice for one device and dtype, with its own view of the table."""
        refused = {b.name: why for b in self.candidates.values() if (why := b.limits.refuse(device))}
        able = [b for b in self.candidates.values() if b.name not in refused]
        left_out = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
        if not able and self.last_resort is None:
            raise BackendError(f"backend=auto has no candidate for {device}: {left_out}")
        if not able and self.last_resort is not None:
            log.warning("backend=auto uses %s, the slow definition: %s", self.last_resort.name, left_out)
        elif left_out:
            log.info("backend=auto leaves out %s", left_out)
        table = Path(self.table) if self.table else default_table()
        return Chooser(able, self.rounds, table, device, dtype, self.last_resort)


def default_table() -> Path:
    """Where measured choices are kept when the config names no file."""
    return Path.home() / ".cache" / "int8run" / "backend_choices.json"


class Chooser:
    """Measures each new layer shape once and remembers, in memory and in the table."""

    def __init__(
        self, able: Sequence[Backend], rounds: int, table: Path, device: torch.device, dtype: torch.dtype,
        last_resort: Backend | None = None,
    ):  # fmt: skip
        self.able, self.rounds, self.table, self.device, self.dtype = list(able), rounds, table, device, dtype
        self.last_resort = last_resort
        self.where = " | ".join([device_name(device), *library_stamp(device), str(dtype).removeprefix("torch.")])
        self.known = read_table(table)
        self.measured = 0
        self.milliseconds: dict[tuple[int, int, int], dict[str, float]] = {}  # of the shapes measured by this object

    def choose(self, rows: int, in_features: int, out_features: int) -> Backend:
        """The fastest correct backend for `[rows, in_features] x [out_features, in_features]`."""
        names = {b.name: b for b in self.able if not b.limits.refuse_layer(in_features, out_features)}
        key = f"{self.where} | {','.join(sorted(names))} | {rows}x{in_features}x{out_features}"
        if self.known.get(key) not in names:
            best = self.measure(list(names.values()), rows, in_features, out_features)
            if best is self.last_resort:  # not remembered: what is missing may be there tomorrow
                return best
            self.known[key] = best.name
            write_table(self.table, key, self.known[key])
        return names[self.known[key]]

    def measure(self, candidates: Sequence[Backend], rows: int, in_features: int, out_features: int) -> Backend:
        """Time every candidate that computes the right numbers, interleaved; the least median wins."""
        self.measured += 1
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(self.device)  # noqa: E731
        weight, x = quantize_weight(draw(out_features, in_features)), draw(rows, in_features).to(self.dtype)
        runs = {b.name: (b, b.pack(weight)) for b in candidates if self.agrees(b, in_features)}
        if not runs:
            if self.last_resort is None:
                raise BackendError(f"no INT8 backend computes the right numbers on {self.where}")
            log.warning(
                "%dx%dx%d: no candidate of backend=auto can run it; %s does", rows, in_features, out_features, self.last_resort.name
            )
            return self.last_resort
        scale, bias = weight.scale[:, 0].contiguous(), draw(out_features)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds + 1):  # the first round warms up
            for name, (backend, packed) in runs.items():
                seconds[name].append(self.timed(backend, packed, x, scale, bias))
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        self.milliseconds[rows, in_features, out_features] = {name: 1000 * t for name, t in medians.items()}
        return runs[min(medians, key=medians.__getitem__)][0]

    def timed(self, backend: Backend, packed: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> float:
        """Seconds of one call, device-synchronised."""
        started = time.perf_counter()
        run_layer(backend, x, packed, scale, bias)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def agrees(self, backend: Backend, in_features: int) -> bool:
        """Whether full-range integers come out right: +127 everywhere makes the largest sums there are.

        A backend whose kernels cannot be built does not take part either, and its reason is logged.
        """
        weight = QuantizedWeight(
            torch.full((8, in_features), 127, dtype=torch.int8, device=self.device), torch.ones(8, 1, device=self.device)
        )
        x = torch.ones(8, in_features, device=self.device)
        run = lambda b: run_layer(b, x, b.pack(weight), weight.scale[:, 0].contiguous(), None).float()  # noqa: E731
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


def library_stamp(device: torch.device) -> list[str]:
    """Versions that a measured choice depends on: int8run, torch and, on a GPU, CUDA and its driver."""
    stamp = [f"int8run {importlib.metadata.version('int8run')}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        runtime: Any = torch._C  # typed by builds with CUDA only
        stamp.append(f"CUDA {torch.version.cuda}, driver {runtime._cuda_getDriverVersion()}")
    return stamp


def read_table(table: Path) -> dict[str, str]:
    """Choices made before; an unreadable table counts as empty and is written anew."""
    try:
        found = json.loads(table.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def write_table(table: Path, key: str, name: str) -> None:
    """Add one choice. Written whole to a new name and moved, so that a reader never sees half a file."""
    table.parent.mkdir(parents=True, exist_ok=True)
    merged = {**read_table(table), key: name}
    fresh = table.with_suffix(f".{time.time_ns()}")
    fresh.write_text(json.dumps(merged, indent=1, sort_keys=True))
    fresh.replace(table)
