"""Write the trained drawings as one sheet of 64x64 cells with their names: where the tests look images up.

python experiments/tiny/reference.py --work work --out tests/data/drawings.png
"""

import argparse
import math
from pathlib import Path

from data import SIZE, load_drawings, load_trained_names
from PIL import Image

COLUMNS = 25


def write_reference(work: Path, out: Path) -> None:
    """Row by row, 25 to a row; the names go to a text file beside it, one per line."""
    names, drawings = load_drawings(work)
    trained = load_trained_names(work)
    rows = math.ceil(len(trained) / COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIZE, rows * SIZE), "white")
    for i, name in enumerate(trained):
        drawing = drawings["flat"][names.index(name)].permute(1, 2, 0)  # [3, H, W] -> [H, W, 3]
        row, column = divmod(i, COLUMNS)
        sheet.paste(Image.fromarray(drawing.contiguous().numpy()), (column * SIZE, row * SIZE))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)
    out.with_suffix(".txt").write_text("\n".join(trained) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    write_reference(**vars(parser.parse_args()))
