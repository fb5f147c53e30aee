"""The plots of the README, from the CSVs: python experiments/text_encoders/plots.py [--device cuda]"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from tables import EMBEDDINGS, RESULTS, Row, read_rows

COLOURS = ("#1f77b4", "#17becf", "#d62728", "#ff7f0e", "#7f7f7f", "#9467bd")
MARKERS = ("o", "s", "D", "d", "^", "v")
TIMED = {
    "minilm": "MiniLM-L6, 16 × 64 tokens",
    "clip_l": "CLIP-L, 77 tokens",
    "t5_xxl": "one T5-XXL layer, 512 tokens",
}


Variant = tuple[str, str]  # format, kernels


def list_variants(rows: list[Row]) -> list[Variant]:
    """Every format and its kernels once, in the table's order."""
    return list(dict.fromkeys((row["format"], row["kernels"]) for row in rows))


def plot_quality(results: Path, device: str, out: Path) -> None:
    """Left: bytes of the quantized layers; right: error of the embeddings, a marker for each encoder."""
    rows = read_rows(results, "quality", device)
    variants = list_variants(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 8), width_ratios=[1, 3], sharey=True)
    draw_bytes(left, rows, variants)
    draw_errors(right, rows, variants)
    left.set_yticks(range(len(variants)), [make_label(*variant) for variant in variants], fontsize=9)
    left.invert_yaxis()
    for y in range(1, len(variants)):
        is_new_format = variants[y][0] != variants[y - 1][0]
        if is_new_format:
            left.axhline(y - 0.5, color="black", linewidth=0.4, alpha=0.4)
            right.axhline(y - 0.5, color="black", linewidth=0.4, alpha=0.4)
    right.legend(fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(out / f"quality{make_suffix(device)}.png", dpi=100)


def draw_bytes(panel: Axes, rows: list[Row], variants: list[Variant]) -> None:
    """A bar for each variant: bytes of CLIP-L's quantized layers, as a share of bfloat16."""
    shares: dict[Variant, float] = {}
    for row in rows:
        if row["case"] == "clip_l" and row["layers_vs_bf16"]:
            shares[row["format"], row["kernels"]] = float(row["layers_vs_bf16"])
    for y, variant in enumerate(variants):
        share = shares.get(variant, 1.0)  # bfloat16 itself has no quantized layers
        panel.barh(y, share, color="#b0c4de", height=0.7)
        panel.text(share - 0.02, y, f"{share:.2f}", va="center", ha="right", fontsize=8)
    panel.set_xlabel("bytes of the quantized layers\n(CLIP-L; bfloat16 = 1)")


def draw_errors(panel: Axes, rows: list[Row], variants: list[Variant]) -> None:
    """The error of the embeddings of each variant, a marker for each encoder."""
    found = {(row["format"], row["kernels"], row["case"]): row for row in rows}
    for (title, case, prefix), colour, marker in zip(EMBEDDINGS, COLOURS, MARKERS, strict=True):
        percents, heights = [], []
        for y, variant in enumerate(variants):
            row = found.get((*variant, case))
            if row is not None:
                percents.append(100 * float(row[f"{prefix}rel_err"]))
                heights.append(y)
        panel.plot(percents, heights, marker, color=colour, label=title, markersize=6, alpha=0.85)
    panel.set_xscale("log")
    ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xlabel("relative error of the embeddings to float32, %")
    panel.grid(alpha=0.3, which="both")


def plot_speed(results: Path, device: str, out: Path) -> None:
    """How many times as fast as the float model of the same dtype, a panel for each encoder."""
    rows = [row for row in read_rows(results, "time", device) if row["case"] in TIMED]
    variants = list_variants(rows)
    if not variants:
        return
    figure, panels = plt.subplots(1, len(TIMED), figsize=(12, 7.5), sharex=True, sharey=True)
    for panel, (case, title) in zip(panels, TIMED.items(), strict=True):
        for dtype, colour, marker in (("float32", "#1f77b4", "o"), ("bfloat16", "#ff7f0e", "D")):
            ratios, heights = [], []
            for row in rows:
                if row["case"] == case and row["dtype"] == dtype:
                    ratios.append(float(row[f"vs_{dtype}"]))
                    heights.append(variants.index((row["format"], row["kernels"])))
            label = f"{dtype} / the same in {dtype}"
            panel.plot(ratios, heights, marker, color=colour, label=label, alpha=0.85)
        style_panel(panel, title)
    panels[0].set_yticks(range(len(variants)), [make_label(*variant) for variant in variants], fontsize=9)
    panels[0].invert_yaxis()
    panels[1].set_xlabel("time of the float model / time of the quantized one (faster to the right)")
    panels[1].legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.05), frameon=False)
    figure.tight_layout()
    figure.savefig(out / f"speed{make_suffix(device)}.png", dpi=100)


def make_label(name: str, kernels: str) -> str:
    """A format; below it the same with other kernels."""
    if kernels in ("", "auto"):
        return name
    return f"… {kernels}"


def style_panel(panel: Axes, title: str) -> None:
    """Title, a line where nothing is won, and a logarithmic axis."""
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_title(title, loc="left", fontsize=10)


def make_suffix(device: str) -> str:
    """Of files for another device than the CPU."""
    return "" if device == "cpu" else f"_{device}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="folder for the images")
    arguments = parser.parse_args()
    plot_quality(arguments.results, arguments.device, arguments.out)
    plot_speed(arguments.results, arguments.device, arguments.out)
