"""INT8 against float32.

One forward of the tiny model's denoiser, batch 1 and 8, every backend, interleaved in one run.

    python experiments/cpu_forward/bench.py --rounds 15

Each round calls the float model and every INT8 model once, in turn; the ratio is taken per round, and its
median and quartiles are printed as a table. Run it on a quiet machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
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
from int8run.pipeline.build import BuiltModel, build_model
from int8run.report.console import Progress
from int8run.report.run_files import collect_environment

BACKENDS = ("auto", "vnni", "onednn", "torch_int_mm", "reference")


def build_with(backend: str, outlier: str, batch: int) -> tuple[BuiltModel, Mapping[str, Any]]:
    """The tiny model with one backend, and a real call of its denoiser."""
    overrides = [
        f"backend={backend}",
        f"outlier={outlier}",
        f"sampler.batch={batch}",
        "tracker=none",
        "progress=false",
    ]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        spec = create_run_spec(compose("config", overrides))
    wanted = build_samples(["red apple"] * batch, 1, 0)
    built = build_model(spec, wanted, [], Progress(False))
    return built, capture_step(built.pipe, built.component, built.denoisers["float"], wanted, spec.sampling)[
        0
    ]


@torch.no_grad()
def time_call(denoiser: nn.Module, call: Mapping[str, Any]) -> float:
    started = time.perf_counter()
    denoiser(**call)
    return time.perf_counter() - started


def measure_backends(rounds: int, batches: list[int]) -> None:
    facts = collect_environment(torch.device("cpu"), read_library_versions())
    print(
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['versions']['torch']}, float32, {rounds} "
        "rounds\n"
    )
    print(
        "| batch | backend | outlier | float ms | INT8 ms | float / INT8, median [quartiles] | layer SQNR, "
        "mean dB |"
    )
    print("|---|---|---|---|---|---|---|")
    for batch in batches:
        built = {}
        for backend in BACKENDS:
            for outlier in ("none", "convrot"):
                try:
                    built[backend, outlier] = build_with(backend, outlier, batch)
                except BackendError as error:
                    print(f"{backend}: {error}", file=sys.stderr)
        base, call = next(iter(built.values()))
        times: dict[object, list[float]] = {key: [] for key in built} | {"float": []}
        for _ in range(rounds + 2):  # two rounds warm up
            times["float"].append(time_call(base.denoisers["float"], call))
            for key, (one, _) in built.items():
                times[key].append(time_call(one.denoisers["int8"], call))
        for (backend, outlier), (one, _) in built.items():
            measure_layer_outputs(one.denoisers["float"], one.denoisers["int8"], call, one.plans)
            sqnr = statistics.mean(p.measured["output_sqnr_db"] for p in one.plans if p.skip_reason is None)
            pairs = list(zip(times["float"], times[backend, outlier], strict=True))[2:]
            low, middle, high = statistics.quantiles([f / i for f, i in pairs], n=4)
            used = "+".join(sorted({p.backend_used for p in one.plans if p.backend_used}))
            name = f"{backend} ({used})" if backend == "auto" else backend
            milliseconds = [1000 * statistics.median(column) for column in zip(*pairs, strict=True)]
            print(
                f"| {batch} | {name} | {outlier} | {milliseconds[0]:.1f} | {milliseconds[1]:.1f} "
                f"| {middle:.2f} [{low:.2f}–{high:.2f}] | {sqnr:.1f} |"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    measure_backends(**vars(parser.parse_args()))
