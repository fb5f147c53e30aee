"""Write the trained drawings as one sheet of 64x64 cells with their names.

What the tests' retrieval looks in.

python experiments/tiny/reference.py --work work --out tests/data/drawings.png
"""

import argparse
from pathlib import Path

import torch
from data import SIZE, load_drawings
from PIL import Image

COLUMNS = 25


def write_reference(work: Path, out: Path) -> None:
    """Row by row, 25 to a row; the names go to a text file beside it, one per line."""
    names, drawings = load_drawings(work)
    trained = torch.load(work / "base.pt", weights_only=True, map_location="cpu")["names"]
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(trained) // COLUMNS) * SIZE), "white")
    for i, name in enumerate(trained):
        cell = Image.fromarray(drawings["flat"][names.index(name)].permute(1, 2, 0).contiguous().numpy())
        sheet.paste(cell, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)
    out.with_suffix(".txt").write_text("\n".join(trained) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    write_reference(**vars(parser.parse_args()))
