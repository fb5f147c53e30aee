"""Put the images of one sweep over two strengths side by side.

    int8run -m lora=stack_a lora.adapters.0.strength=-0.5,0,0.25,0.5,0.75,1 \
        lora.adapters.1.strength=0,0.25,0.5 'prompts.prompts=[fox]' metrics.baseline=none tracker=none \
        hydra.sweep.dir=work/grid
    python experiments/lora_modes/grid.py work/grid --out experiments/lora_modes/grid.png
"""

import argparse
from pathlib import Path

import yaml
from PIL import Image

from int8run.report.image_files import make_image_grid


def read_strengths(job: Path) -> tuple[float, float]:
    """Strengths of the first two adapters of a job."""
    first, second = yaml.safe_load((job / "config.yaml").read_text())["lora"]["adapters"][:2]
    return first["strength"], second["strength"]


def read_images(sweep: Path) -> dict[tuple[float, float], Image.Image]:
    """The image of each job, by its strengths."""
    images = {}
    for job in sweep.glob("[0-9]*"):
        images[read_strengths(job)] = Image.open(next((job / "images").glob("*.png")))
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    images = read_images(arguments.sweep)
    across = sorted({first for first, _ in images})
    down = sorted({second for _, second in images})
    rows = [(f"gloss {gloss:g}", [images[ink, gloss] for ink in across]) for gloss in down]
    make_image_grid(rows, [f"ink {ink:g}" for ink in across]).save(arguments.out)


if __name__ == "__main__":
    main()
