r"""The effect of each format on the tiny model's images: a table of a sweep, and a strip to look at.

    int8run -m clip=keep,int8_tensorwise,... int8.enable=false,true prompts=file \
      prompts.path=experiments/fidelity/names.txt sampler.batch=10 metrics.layers=false tracker=none
    python experiments/text_encoders/pictures.py --sweep multirun/<date>/<time> --out \
      experiments/text_encoders

Retrieval is that of experiments/fidelity: the share of images whose nearest drawing of all 374 is the one
that was asked for.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from int8run.report.image_files import DIFFERENCE_GAIN, make_difference_image, make_image_grid

sys.path.append(str(Path(__file__).parents[1] / "fidelity"))

from sweeps import compute_top1, read_drawings, read_jobs

STRIP = ("int8_rowwise", "int8_convrot", "float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4")
GAIN = 64  # less, and most differences are black
SHOWN = ("parrot", "strawberry")
METRICS = {
    "psnr_db": "quality/psnr_db",
    "ssim": "quality/ssim",
    "latent_rel_err": "quality/latent_rel_err",
    "text_encoder_bytes": "memory/text_encoder_bytes",
}


def amplify_difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """|a - b| times GAIN, clipped."""
    return make_difference_image(a, b).point(lambda v: min(255, v * (GAIN // DIFFERENCE_GAIN)))


def format_of(job: dict[str, Any]) -> str:
    """What `clip=` was."""
    return str(job["config"]["clip"]["format"])


def is_int8(job: dict[str, Any]) -> bool:
    """Whether the denoiser was INT8."""
    return bool(job["config"]["int8"]["enable"])


def make_row(job: dict[str, Any], names: list[str], known: Any) -> dict[str, object]:
    """One job in the table."""
    images = job["images"]
    files = [job["folder"] / image["file"] for image in images]
    metrics = {name: job["metrics"].get(key, "") for name, key in METRICS.items()}
    return {
        "format": format_of(job),
        "denoiser": "int8" if is_int8(job) else "float",
        **metrics,
        "worst_psnr_db": min((float(image["psnr_db"]) for image in images if "psnr_db" in image), default=""),
        "top1": compute_top1(files, [image["prompt"] for image in images], names, known),
        "pictures": len(files),
    }


def draw_strip(found: list[dict[str, Any]], out: Path) -> None:
    """A row for each prompt: float, then each format with the float denoiser.

    Below each image its difference to float's.
    """
    by_format = {format_of(job): job for job in found if not is_int8(job)}
    shown = [name for name in STRIP if name in by_format]
    index = {image["prompt"]: image["file"] for image in by_format[shown[0]]["images"]}
    rows = []
    for prompt in SHOWN:
        ours = [Image.open(by_format[name]["folder"] / index[prompt]) for name in shown]
        first = by_format[shown[0]]["folder"] / index[prompt]
        exact = Image.open(first.with_name(f"{first.stem}_float.png"))
        differences = [amplify_difference(picture, exact) for picture in (exact, *ours)]
        rows += [(prompt, [exact, *ours]), (f"difference x {GAIN}", differences)]
    make_image_grid(rows, ["float", *shown]).save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sweep",
        type=Path,
        nargs="+",
        required=True,
        help="of several, a later one's jobs take the place of an earlier one's",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results/pictures.csv and pictures.png"
    )
    asked = parser.parse_args()
    read = list(
        {(format_of(job), is_int8(job)): job for sweep in asked.sweep for job in read_jobs(sweep)}.values()
    )
    known_names, pixels = read_drawings()
    table = [make_row(job, known_names, pixels) for job in read]
    (asked.out / "results").mkdir(parents=True, exist_ok=True)
    with (asked.out / "results" / "pictures.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    draw_strip(read, asked.out / "pictures.png")
