"""Draw the loss curves of all stages that are in the work folder.

python experiments/tiny/plot.py --work work --out experiments/tiny/loss.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

STAGES = (
    ("vae.pt", "VAE: L1 + MSE + edges", "steps of 16 images"),
    ("base.pt", "base: flow matching", "images seen"),
    ("lora_ink.pt", "LoRA ink: flow matching", "images seen"),
    ("lora_gloss.pt", "LoRA gloss: flow matching", "images seen"),
)


def plot_losses(work: Path, out: Path) -> None:
    """One panel per stage, logarithmic losses."""
    there = [stage for stage in STAGES if (work / stage[0]).exists()]
    figure, axes = plt.subplots(1, len(there), figsize=(4 * len(there), 3), layout="constrained")
    for axis, (file, title, unit) in zip(axes, there, strict=True):
        curve = torch.load(work / file, weights_only=True, map_location="cpu")["curve"]
        axis.plot(*zip(*curve, strict=True))
        axis.set(title=title, xlabel=unit, yscale="log")
        axis.grid(which="both", alpha=0.3)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    plot_losses(**vars(parser.parse_args()))
