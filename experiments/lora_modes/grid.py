"""Put the images of one sweep over two strengths side by side.

    int8run -m lora=stack_a lora.adapters.0.strength=-1,0,0.5,1,1.5,2 lora.adapters.1.strength=0,0.5,1 \
        'prompts.prompts=[fox]' metrics.baseline=none tracker=none hydra.sweep.dir=work/grid
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder of the sweep")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    pictures = {
        read_strengths(job): Image.open(next((job / "images").glob("*.png")))
        for job in asked.sweep.glob("[0-9]*")
    }
    across, down = (sorted({key[axis] for key in pictures}) for axis in (0, 1))
    rows = [(f"gloss {b:g}", [pictures[a, b] for a in across]) for b in down]
    make_image_grid(rows, [f"ink {a:g}" for a in across]).save(asked.out)
