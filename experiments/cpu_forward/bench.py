"""INT8 against float32: one forward of the tiny model's denoiser, with every backend, interleaved in one run.

    python experiments/cpu_forward/bench.py --rounds 15

Each round calls the float model and every INT8 model once, in turn; the ratio is taken per round, and its
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

from int8run.config.compose import create_run_spec
from int8run.errors import BackendError
from int8run.generate.capture import capture_step
from int8run.generate.prompts import build_samples
from int8run.metrics.layers import measure_layer_outputs
from int8run.models.loader import read_library_versions
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.report.console import Progress
from int8run.report.run_files import collect_environment

BACKENDS = ("auto", "cpu", "onednn", "torch_int_mm", "reference")
OUTLIERS = ("none", "convrot")
WARMUP = 2  # rounds that are not counted
HEAD = (
    "batch",
    "backend",
    "outlier",
    "float ms",
    "INT8 ms",
    "float / INT8, median [quartiles]",
    "layer SQNR, mean dB",
)

Call = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """The tiny model with one backend and outlier method, and a real call of its denoiser."""

    backend: str
    outlier: str
    built: BuiltModel
    call: Call


def build_variant(backend: str, outlier: str, batch: int) -> Variant:
    """Build the tiny model as the runner does.

    Raises:
        BackendError: when the backend cannot run on this machine.
    """
    overrides = [
        f"backend={backend}",
        f"outlier={outlier}",
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
    return Variant(backend, outlier, built, calls[0])


def build_variants(backends: Sequence[str], batch: int) -> list[Variant]:
    """All variants that can run on this machine; why others cannot is printed."""
    variants = []
    for backend in backends:
        for outlier in OUTLIERS:
            try:
                variants.append(build_variant(backend, outlier, batch))
            except BackendError as error:
                print(f"{backend}: {error}", file=sys.stderr)
    return variants


@torch.no_grad()
def time_call(denoiser: nn.Module, call: Call) -> float:
    """Seconds of one forward."""
    started = time.perf_counter()
    denoiser(**call)
    return time.perf_counter() - started


def time_rounds(variants: Sequence[Variant], rounds: int) -> tuple[list[float], list[list[float]]]:
    """Seconds of each counted round: of the float model, and of each variant in their order."""
    base = variants[0]
    float_seconds: list[float] = []
    int8_seconds: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds + WARMUP):
        float_seconds.append(time_call(base.built.denoisers["float"], base.call))
        for variant, seconds in zip(variants, int8_seconds, strict=True):
            seconds.append(time_call(variant.built.denoisers["int8"], base.call))
    return float_seconds[WARMUP:], [seconds[WARMUP:] for seconds in int8_seconds]


def measure_sqnr(variant: Variant) -> float:
    """The mean over INT8 layers of their output's SQNR, in dB."""
    built = variant.built
    measure_layer_outputs(built.denoisers["float"], built.denoisers["int8"], [variant.call], built.plans)
    int8_plans = [plan for plan in built.plans if plan.skip_reason is None]
    return statistics.mean(plan.measured["output_sqnr_db"] for plan in int8_plans)


def name_backend(variant: Variant) -> str:
    """The backend; for `auto` also those that it chose."""
    if variant.backend != "auto":
        return variant.backend
    used = {plan.backend_used for plan in variant.built.plans if plan.backend_used}
    return f"auto ({'+'.join(sorted(used))})"


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


def measure_backends(rounds: int, batches: list[int], backends: list[str]) -> None:
    """Print a row for each batch size, backend and outlier method."""
    facts = collect_environment(torch.device("cpu"), read_library_versions())
    machine = f"{facts['cpu']}, {facts['threads']} threads, torch {facts['versions']['torch']}"
    print(f"{machine}, float32, {rounds} rounds\n")
    print_row(HEAD)
    print("|---" * len(HEAD) + "|")
    for batch in batches:
        variants = build_variants(backends, batch)
        float_seconds, int8_seconds = time_rounds(variants, rounds)
        float_ms = 1000 * statistics.median(float_seconds)
        for variant, seconds in zip(variants, int8_seconds, strict=True):
            int8_ms = 1000 * statistics.median(seconds)
            ratios = format_ratios(float_seconds, seconds)
            sqnr = f"{measure_sqnr(variant):.1f}"
            times = (f"{float_ms:.1f}", f"{int8_ms:.1f}", ratios)
            print_row([batch, name_backend(variant), variant.outlier, *times, sqnr])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    measure_backends(**vars(parser.parse_args()))
