"""INT8 against float32: one forward of the tiny model's denoiser, with every backend, interleaved in one run.

    python experiments/cpu_forward/bench.py --rounds 15
    python experiments/cpu_forward/bench.py --table instructions   # float dtypes, our kernels on each set

Each round calls the float32 model and every other once, in turn; the ratio is taken per round, and its
median and quartiles are printed as a table. Run it on a quiet machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch import nn

from int8run.backends.cpu import Cpu
from int8run.config.compose import create_run_spec
from int8run.errors import BackendError
from int8run.generate.capture import capture_step
from int8run.generate.prompts import build_samples
from int8run.kernels.cpu.instructions import INSTRUCTION_SETS
from int8run.metrics.layers import measure_layer_outputs
from int8run.models.loader import read_library_versions
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.report.console import Progress
from int8run.report.run_files import collect_environment
from int8run.utils.hardware import describe_instructions

BACKENDS = ("auto", "cpu", "onednn", "torch_int_mm", "reference")
OUTLIERS = ("none", "convrot")
FLOATS = ("bfloat16", "float16")  # float32 is the base of all ratios
TABLES = ("backends", "instructions")
WARMUP = 2  # rounds that are not counted
HEAD = (
    "batch",
    "backend",
    "outlier",
    "float32 ms",
    "ms",
    "float32 / this, median [quartiles]",
    "layer SQNR, mean dB",
)

Call = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        name: of the backend.
        overrides: what the model is built with.
        outlier: option of `outlier=`.
        denoiser: which one of the built model is timed: `int8` or `float`.
    """

    name: str
    overrides: tuple[str, ...]
    outlier: str = "none"
    denoiser: str = "int8"


@dataclass(frozen=True)
class Variant:
    """The tiny model, built for a row, and a real call of its denoiser."""

    case: Case
    built: BuiltModel
    call: Call

    @property
    def denoiser(self) -> nn.Module:
        """What is timed."""
        return self.built.denoisers[self.case.denoiser]


def list_cases(table: str, backends: Sequence[str]) -> list[Case]:
    """The rows of a table: backends without and with rotation, or float dtypes and instruction sets."""
    if table == "backends":
        return [
            Case(backend, (f"backend={backend}",), outlier) for backend in backends for outlier in OUTLIERS
        ]
    cases = [Case(dtype, (f"model.dtype={dtype}",), denoiser="float") for dtype in FLOATS]
    for name in INSTRUCTION_SETS:
        cases.append(Case(f"cpu, {name}", ("backend=cpu", f"backend.instructions={name}")))
    cases.append(Case("cpu in a bfloat16 model", ("backend=cpu", "model.dtype=bfloat16")))
    return cases


def build_variant(case: Case, batch: int) -> Variant:
    """Build the tiny model as the runner does.

    Raises:
        BackendError: when the backend cannot run on this machine.
    """
    overrides = [
        *case.overrides,
        f"outlier={case.outlier}",
        f"sampler.batch={batch}",
        "tracker=none",
        "progress=false",
    ]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        spec = create_run_spec(compose("config", overrides))
    samples = build_samples(["red apple"] * batch, 1, 0)
    built = build_model(spec, samples, [], Progress(enabled=False))
    float_denoiser = built.denoisers["float"]
    calls = capture_step(built.pipe, built.component, float_denoiser, samples, spec.sampling)
    return Variant(case, built, calls[0])


def build_variants(cases: Sequence[Case], batch: int) -> list[Variant]:
    """All variants that can run on this machine; why others cannot is printed."""
    variants = []
    for case in cases:
        try:
            variants.append(build_variant(case, batch))
        except BackendError as error:
            print(f"{case.name}: {error}", file=sys.stderr)
    return variants


@torch.no_grad()
def time_call(denoiser: nn.Module, call: Call) -> float:
    """Seconds of one forward."""
    started = time.perf_counter()
    denoiser(**call)
    return time.perf_counter() - started


def time_rounds(base: Variant, variants: Sequence[Variant], rounds: int) -> list[list[float]]:
    """Seconds of each counted round: of the float32 model, and of each variant in their order."""
    measured: list[list[float]] = [[] for _ in range(1 + len(variants))]
    for _ in range(rounds + WARMUP):
        measured[0].append(time_call(base.built.denoisers["float"], base.call))
        for variant, seconds in zip(variants, measured[1:], strict=True):
            seconds.append(time_call(variant.denoiser, variant.call))
    return [seconds[WARMUP:] for seconds in measured]


def measure_sqnr(variant: Variant) -> str:
    """The mean over INT8 layers of their output's SQNR, in dB; nothing for a float model."""
    if variant.case.denoiser == "float":
        return ""
    built = variant.built
    measure_layer_outputs(built.denoisers["float"], built.denoisers["int8"], [variant.call], built.plans)
    int8_plans = [plan for plan in built.plans if plan.skip_reason is None]
    return f"{statistics.mean(plan.measured['output_sqnr_db'] for plan in int8_plans):.1f}"


def name_backend(variant: Variant) -> str:
    """The backend; for `auto` also those that it chose, for `cpu` the instruction set that it chose."""
    name = variant.case.name
    plans = variant.built.plans
    if name == "auto":
        return f"auto ({'+'.join(sorted({plan.backend_used for plan in plans if plan.backend_used}))})"
    if name == "cpu":
        return f"cpu ({Cpu().instruction_set})"
    return name


def format_ratios(float_seconds: Sequence[float], int8_seconds: Sequence[float]) -> str:
    """Median and quartiles of the ratios of the rounds; of a single round its ratio."""
    ratios = [f / i for f, i in zip(float_seconds, int8_seconds, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} [{low:.2f}–{high:.2f}]"


def print_row(cells: Sequence[object]) -> None:
    """A line of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def measure_cases(rounds: int, batches: list[int], cases: Sequence[Case]) -> None:
    """Print a row for each batch size and case."""
    facts = collect_environment(torch.device("cpu"), read_library_versions())
    instructions = describe_instructions(torch.device("cpu"))
    machine = f"{facts['cpu']} ({instructions}), {facts['threads']} threads"
    print(f"{machine}, torch {facts['versions']['torch']}, {rounds} rounds\n")
    print_row(HEAD)
    print("|---" * len(HEAD) + "|")
    for batch in batches:
        base = build_variant(Case("base", ("backend=reference",)), batch)
        variants = build_variants(cases, batch)
        float_seconds, *measured = time_rounds(base, variants, rounds)
        float_ms = 1000 * statistics.median(float_seconds)
        for variant, seconds in zip(variants, measured, strict=True):
            ms = 1000 * statistics.median(seconds)
            ratios = format_ratios(float_seconds, seconds)
            times = (f"{float_ms:.1f}", f"{ms:.1f}", ratios)
            print_row([batch, name_backend(variant), variant.case.outlier, *times, measure_sqnr(variant)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--table",
        choices=TABLES,
        default=TABLES[0],
        help="instructions: float dtypes, and our kernels on each instruction set",
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--threads", type=int, help="of torch; else as many as torch takes")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    measure_cases(args.rounds, args.batches, list_cases(args.table, args.backends))


if __name__ == "__main__":
    main()
