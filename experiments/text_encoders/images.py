r"""The effect of each format on the tiny model's images: a table of a sweep, and a strip to look at.

    int8run -m clip=keep,int8_tensorwise,... int8.enable=false,true prompts=file \
      prompts.path=experiments/fidelity/names.txt sampler.batch=10 metrics.layers=false tracker=none
    python experiments/text_encoders/images.py --sweep multirun/<date>/<time> --out \
      experiments/text_encoders

Retrieval is that of experiments/fidelity: the share of images whose nearest drawing of all 374 is the one
that was asked for.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from int8run.report.image_files import DIFFERENCE_GAIN, make_difference_image, make_image_grid

sys.path.append(str(Path(__file__).parents[1] / "fidelity"))

from sweeps import Drawings, compute_top1, read_drawings, read_jobs

Job = dict[str, Any]

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
    factor = GAIN // DIFFERENCE_GAIN
    return make_difference_image(a, b).point(lambda value: min(255, value * factor))


def get_format(job: Job) -> str:
    """What `clip=` was."""
    return str(job["config"]["clip"]["format"])


def is_int8(job: Job) -> bool:
    """Whether the denoiser was INT8."""
    return bool(job["config"]["int8"]["enable"])


def read_sweeps(sweeps: Sequence[Path]) -> list[Job]:
    """The jobs of sweeps; of several with the same format and denoiser the last one."""
    jobs = {}
    for sweep in sweeps:
        for job in read_jobs(sweep):
            jobs[get_format(job), is_int8(job)] = job
    return list(jobs.values())


def make_row(job: Job, drawings: Drawings) -> dict[str, object]:
    """One job in the table."""
    images = job["images"]
    files = [job["folder"] / image["file"] for image in images]
    prompts = [image["prompt"] for image in images]
    psnrs_db = [float(image["psnr_db"]) for image in images if "psnr_db" in image]
    return {
        "format": get_format(job),
        "denoiser": "int8" if is_int8(job) else "float",
        **{name: job["metrics"].get(key, "") for name, key in METRICS.items()},
        "worst_psnr_db": min(psnrs_db, default=""),
        "top1": compute_top1(files, prompts, drawings),
        "images": len(files),
    }


def write_table(rows: Sequence[dict[str, object]], path: Path) -> None:
    """The table as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def make_strip(jobs: Sequence[Job]) -> Image.Image:
    """A row for each prompt: float, then each format with the float denoiser.

    Below each image its difference to float's.
    """
    by_format = {get_format(job): job for job in jobs if not is_int8(job)}
    formats = [name for name in STRIP if name in by_format]
    first = by_format[formats[0]]
    files = {image["prompt"]: image["file"] for image in first["images"]}
    rows = []
    for prompt in SHOWN:
        first_file = first["folder"] / files[prompt]
        float_image = Image.open(first_file.with_name(f"{first_file.stem}_float.png"))
        images = [float_image]
        for name in formats:
            images.append(Image.open(by_format[name]["folder"] / files[prompt]))
        differences = [amplify_difference(image, float_image) for image in images]
        rows += [(prompt, images), (f"difference x {GAIN}", differences)]
    return make_image_grid(rows, ["float", *formats])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sweep",
        type=Path,
        nargs="+",
        required=True,
        help="of several, a later one's jobs take the place of an earlier one's",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results/images.csv and images.png"
    )
    arguments = parser.parse_args()
    jobs = read_sweeps(arguments.sweep)
    drawings = read_drawings()
    write_table([make_row(job, drawings) for job in jobs], arguments.out / "results" / "images.csv")
    make_strip(jobs).save(arguments.out / "images.png")


if __name__ == "__main__":
    main()
