r"""The images of the README.

    python experiments/fidelity/plots.py layers --results experiments/fidelity/results
    python experiments/fidelity/plots.py pareto --sweep multirun/<date>/<time> --out \
      experiments/fidelity/pareto.png
    python experiments/fidelity/plots.py drift --sweep multirun/<date>/<time> --out \
      experiments/fidelity/drift.png
"""

import argparse
import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from sweeps import read_jobs

METHODS = ("none", "convrot", "quarot", "hadanorm", "smoothquant", "auto")
COLOURS = dict(zip(METHODS, ("#7f7f7f", "#1f77b4", "#17becf", "#9467bd", "#ff7f0e", "#d62728"), strict=True))
METHOD_MARKERS = {"auto": "x", "none": "_"}  # all others: o
TITLES = {
    "gaussian": "Gaussian layers",
    "planted": "planted outlier channels (channels × size)",
    "tiny": "tiny model, real inputs",
    "minilm": "MiniLM-L6, real inputs",
}


def read_sqnr(results: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Output SQNR in dB by source, method and layer, of absmax rounding."""
    found: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with (results / "layers.csv").open() as file:
        for row in csv.DictReader(file):
            if row["rounding"] == "absmax" and row["outlier"] in METHODS:
                found[row["source"]][row["outlier"]][row["layer"]] = float(row["output_sqnr_db"])
    return found


def plot_layers(results: Path) -> None:
    """A panel per source: output SQNR of every layer by method, absmax rounding."""
    found = read_sqnr(results)
    figure, panels = plt.subplots(len(TITLES), 1, figsize=(11, 15), height_ratios=[1, 2, 3, 3])
    for (source, title), panel in zip(TITLES.items(), panels, strict=True):
        draw_source(panel, found[source])
        panel.set_title(title, loc="left", fontsize=10)
    panels[0].legend(
        ncols=len(METHODS), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.25), frameon=False
    )
    panels[-1].set_xlabel("output SQNR on inputs that nothing was fitted to, dB")
    figure.tight_layout()
    figure.savefig(results.parent / "layers.png", dpi=110)


def draw_source(panel: Axes, found: dict[str, dict[str, float]]) -> None:
    """The layers of a source from top to bottom, a marker for each method."""
    for method in METHODS:
        values = list(found[method].values())
        panel.plot(
            values,
            range(len(values)),
            METHOD_MARKERS.get(method, "o"),
            color=COLOURS[method],
            label=method,
            markersize=5,
            alpha=0.85,
        )
    names = [shorten_name(name) for name in found["none"]]
    fontsize = 6 if len(names) > 20 else 8
    panel.set_yticks(range(len(names)), names, fontsize=fontsize)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)


def shorten_name(layer: str) -> str:
    """A layer's name without what all of them share."""
    for long, brief in (
        ("single_transformer_blocks.", "single."),
        ("transformer_blocks.", "double."),
        ("encoder.layer.", ""),
        ("attention.self.", ""),
    ):
        layer = layer.replace(long, brief)
    return layer


def method_of(config: dict[str, Any]) -> str:
    """The outlier option of a job, from the class it named."""
    return str(config["outlier"]["_target_"]).rsplit(".", 2)[1]


@dataclass(frozen=True)
class Point:
    """A job of the sweep.

    Attributes:
        method: its outlier option.
        quality_db: the budget that it was given; None without one.
        speed: step time of float / INT8.
        psnr_db: to float.
        kept: layers that stay float for the budget.
    """

    method: str
    quality_db: float | None
    speed: float
    psnr_db: float
    kept: int


def read_points(sweep: Path) -> list[Point]:
    """A point for each job."""
    points = []
    for job in read_jobs(sweep):
        metrics = job["metrics"]
        point = Point(
            method=method_of(job["config"]),
            quality_db=job["config"]["quality_db"],
            speed=metrics["speed/ratio_vs_float"],
            psnr_db=metrics["quality/psnr_db"],
            kept=int(metrics.get("budget/layers_kept", 0)),
        )
        points.append(point)
    return points


def find_front(points: list[Point]) -> list[Point]:
    """The points that no other beats in speed and PSNR, from slow to fast."""
    front = []
    for point in points:
        beaten = any(p.speed >= point.speed and p.psnr_db >= point.psnr_db and p != point for p in points)
        if not beaten:
            front.append(point)
    return sorted(front, key=lambda point: point.speed)


def plot_pareto(sweep: Path, out: Path) -> None:
    """PSNR against speed: a line per method through its budgets, the front marked."""
    points = read_points(sweep)
    figure, panel = plt.subplots(figsize=(9, 6))
    for method in METHODS:
        draw_method(panel, method, [point for point in points if point.method == method])
    front = find_front(points)
    panel.plot(
        [point.speed for point in front],
        [point.psnr_db for point in front],
        color="black",
        linewidth=6,
        alpha=0.12,
        label="Pareto front",
        zorder=0,
    )
    panel.set_xlabel("step time of float / INT8 (faster to the right)")
    panel.set_ylabel("PSNR to float, dB")
    title = "tiny model: outlier methods × quality budgets; numbers: layers kept float for the budget"
    panel.set_title(title, loc="left", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def draw_method(panel: Axes, method: str, points: list[Point]) -> None:
    """A method's line through its budgets, and at each point the number of layers kept float."""
    points = sorted(points, key=lambda point: point.kept)
    panel.plot(
        [point.speed for point in points],
        [point.psnr_db for point in points],
        "o-",
        color=COLOURS[method],
        label=method,
        linewidth=1,
        markersize=5,
    )
    for point in points:
        panel.annotate(
            str(point.kept),
            (point.speed, point.psnr_db),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=7,
            color=COLOURS[method],
        )


def plot_drift(sweep: Path, out: Path) -> None:
    """Latent error after each step, a line per method."""
    figure, panel = plt.subplots(figsize=(9, 5))
    for job in read_jobs(sweep):
        if str(job["config"]["rounding"]["_target_"]).endswith("AbsMax"):
            errors = [100 * error for error in job["series"]["series/latent_rel_err"]]
            method = method_of(job["config"])
            panel.plot(
                range(1, len(errors) + 1),
                errors,
                "o-",
                color=COLOURS[method],
                label=method,
                linewidth=1,
                markersize=4,
            )
    panel.set_xlabel("step")
    panel.set_ylabel("latent error to float, %")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("layers")
    one.add_argument("--results", type=Path, required=True)
    one.set_defaults(draw=plot_layers)
    for name, draw in (("pareto", plot_pareto), ("drift", plot_drift)):
        other = commands.add_parser(name)
        other.add_argument("--sweep", type=Path, required=True)
        other.add_argument("--out", type=Path, required=True)
        other.set_defaults(draw=draw)
    arguments = vars(parser.parse_args())
    arguments.pop("draw")(**arguments)
