"""PSNR, SSIM and top-1 retrieval of every job of a sweep over the tiny model, as a table.

    int8run -m outlier=none,convrot,quarot,hadanorm,smoothquant,auto rounding=absmax,mse,gptq \
        prompts=file prompts.path=experiments/fidelity/names.txt sampler.batch=10
    python experiments/fidelity/images.py --sweep multirun/<date>/<time>

Retrieval: the share of images whose nearest of all 374 training drawings, by pixel MSE, is the one that
the prompt names.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plots import method_of
from sweeps import Drawings, compute_top1, read_drawings, read_jobs

COLUMNS = (
    "outlier",
    "rounding",
    "PSNR, dB",
    "worst image, dB",
    "SSIM",
    "latent error, %",
    "layer SQNR, dB",
    "top-1, INT8",
    "top-1, float",
)


def format_row(job: dict[str, Any], drawings: Drawings) -> list[str]:
    """The cells of a job."""
    metrics = job["metrics"]
    images = job["images"]
    prompts = [image["prompt"] for image in images]
    int8_files = [job["folder"] / image["file"] for image in images]
    float_files = [file.with_name(f"{file.stem}_float.png") for file in int8_files]
    rounding_class = str(job["config"]["rounding"]["_target_"]).rpartition(".")[2]
    worst_psnr_db = min(float(image["psnr_db"]) for image in images)
    return [
        method_of(job["config"]),
        rounding_class.lower(),
        f"{metrics['quality/psnr_db']:.2f}",
        f"{worst_psnr_db:.1f}",
        f"{metrics['quality/ssim']:.4f}",
        f"{100 * metrics['quality/latent_rel_err']:.3f}",
        f"{metrics['quant/output_sqnr_db_mean']:.2f}",
        f"{compute_top1(int8_files, prompts, drawings):.2f}",
        f"{compute_top1(float_files, prompts, drawings):.2f}",
    ]


def print_table(sweeps: Sequence[Path]) -> None:
    """A line for each job of the sweeps."""
    drawings = read_drawings()
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}")
    for sweep in sweeps:
        for job in read_jobs(sweep):
            print(f"| {' | '.join(format_row(job, drawings))} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, nargs="+", required=True)
    print_table(parser.parse_args().sweep)
