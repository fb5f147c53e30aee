"""`backend=auto`: the fastest backend for each layer shape, measured on this machine, never guessed.

A candidate takes part only if its result agrees with the reference on full-range integers, where a CPU without the right
instructions saturates. The choice is kept in a small file, so that the same config gives the same result the next time.
"""

import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from int8run.backends.base import Backend, Limits, usable
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
    name: ClassVar[str] = "auto"
    limits: ClassVar[Limits] = Limits()

    def __post_init__(self) -> None:
        in_range("backend.rounds", self.rounds, 1, 1000, whole=True)

    def chooser(self, device: torch.device, dtype: torch.dtype) -> "Chooser":
        """The choice for one device and dtype, with its own view of the table."""
        able = [b for b in self.candidates.values() if usable(b, device)]
        if not able:
            reasons = "; ".join(f"{b.name}: {', '.join(b.limits.refuse(device))}" for b in self.candidates.values())
            raise BackendError(f"backend=auto has no candidate for {device}: {reasons}")
        return Chooser(able, self.rounds, Path(self.table) if self.table else default_table(), device, dtype)


def default_table() -> Path:
    """Where measured choices are kept when the config names no file."""
    return Path.home() / ".cache" / "int8run" / "backend_choices.json"


class Chooser:
    """Measures each new layer shape once and remembers, in memory and in the table."""

    def __init__(self, able: Sequence[Backend], rounds: int, table: Path, device: torch.device, dtype: torch.dtype):
        self.able, self.rounds, self.table, self.device, self.dtype = list(able), rounds, table, device, dtype
        self.where = f"{device_name(device)} | torch {torch.__version__} | {str(dtype).removeprefix('torch.')}"
        self.known = read_table(table)
        self.measured = 0

    def choose(self, rows: int, in_features: int, out_features: int) -> Backend:
        """The fastest correct backend for `[rows, in_features] x [out_features, in_features]`."""
        names = {b.name: b for b in self.able}
        key = f"{self.where} | {','.join(sorted(names))} | {rows}x{in_features}x{out_features}"
        if self.known.get(key) not in names:
            self.known[key] = self.measure(rows, in_features, out_features).name
            self.measured += 1
            write_table(self.table, key, self.known[key])
        return names[self.known[key]]

    def measure(self, rows: int, in_features: int, out_features: int) -> Backend:
        """Time every candidate that computes the right numbers, interleaved; the least median wins."""
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(self.device)  # noqa: E731
        weight, x = quantize_weight(draw(out_features, in_features)), draw(rows, in_features).to(self.dtype)
        runs = {b.name: (b, b.pack(weight)) for b in self.able if self.agrees(b, in_features)}
        if not runs:
            raise BackendError(f"no INT8 backend computes the right numbers on {self.where}")
        scale, bias = weight.scale[:, 0].contiguous(), draw(out_features)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds + 1):  # the first round warms up
            for name, (backend, packed) in runs.items():
                seconds[name].append(self.timed(backend, packed, x, scale, bias))
        best = min(seconds, key=lambda name: statistics.median(seconds[name][1:]))
        return runs[best][0]

    def timed(self, backend: Backend, packed: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> float:
        """Seconds of one call, device-synchronised."""
        started = time.perf_counter()
        backend.linear(x, packed, scale, bias)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def agrees(self, backend: Backend, in_features: int) -> bool:
        """Whether full-range integers come out right: +127 everywhere makes the largest sums there are."""
        weight = QuantizedWeight(
            torch.full((8, in_features), 127, dtype=torch.int8, device=self.device), torch.ones(8, 1, device=self.device)
        )
        x = torch.ones(8, in_features, device=self.device)
        run = lambda b: b.linear(x, b.pack(weight), weight.scale[:, 0], None).float()  # noqa: E731
        expected = run(Reference())
        right = bool(((run(backend) - expected).abs() <= MAX_REL_ERR * expected.abs()).all())
        if not right:
            log.warning("backend %s saturates on this CPU and is left out", backend.name)
        return right


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
