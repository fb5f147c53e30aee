"""PSNR and memory of every job of a sweep over bits, as a table.

    int8run -m int8.bits=8,6,4 outlier=none,convrot rounding=absmax,mse,gptq prompts=file \
        prompts.path=experiments/fidelity/names20.txt sampler.batch=10
    python experiments/w4a8/images.py --sweep multirun/<date>/<time>
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "fidelity"))
from plots import method_of
from sweeps import read_jobs

COLUMNS = ("bits", "outlier", "rounding", "PSNR, dB", "latent error, %", "layer SQNR, dB", "denoiser, MB")


def format_row(job: dict[str, Any]) -> list[str]:
    """The cells of a job."""
    metrics, config = job["metrics"], job["config"]
    rounding_class = str(config["rounding"]["_target_"]).rpartition(".")[2]
    return [
        str(config["int8"]["bits"]),
        method_of(config),
        rounding_class.lower(),
        f"{metrics['quality/psnr_db']:.2f}",
        f"{100 * metrics['quality/latent_rel_err']:.2f}",
        f"{metrics['quant/output_sqnr_db_mean']:.2f}",
        f"{metrics['memory/denoiser_bytes'] / 1e6:.1f}",
    ]


def print_table(sweeps: Sequence[Path]) -> None:
    """A line for each job of the sweeps."""
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}")
    for sweep in sweeps:
        for job in read_jobs(sweep):
            print(f"| {' | '.join(format_row(job))} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, nargs="+", required=True)
    print_table(parser.parse_args().sweep)
