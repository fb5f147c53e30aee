"""The process of one variant; `bench.py` starts it."""

from collections.abc import Callable
from pathlib import Path

import flux
import torch
import variants
from sidebyside import Reply, serve_requests
from torch.profiler import ProfilerActivity, profile

TOP_OPERATORS = 16


def prepare_variant(request: Reply) -> tuple[Callable[[], object], Reply]:
    """Build the variant, and its error against the output that the first variant left in `reference`."""
    variant, reference = variants.VARIANTS[request["variant"]], Path(request["reference"])
    model, call = flux.make_model(flux.SIZES[request["size"]])
    model, call = flux.cast_model(model, call, variant.dtype)
    model = variant.build(model, call, request["layers"])
    if variant.compile:
        model.compile(dynamic=False)
    y = model(**call)[0]
    if not reference.exists():
        torch.save(y, reference)
    return lambda: model(**call), {"error": flux.relative_error(y, torch.load(reference))}


def top_operators(call: Callable[[], object]) -> Reply:
    """The operators with the most self time, and their share of it."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return {"operators": [(e.key, e.self_cpu_time_total / total, e.count) for e in events[:TOP_OPERATORS]]}


if __name__ == "__main__":
    serve_requests(prepare_variant, profile=top_operators)
