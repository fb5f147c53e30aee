"""PSNR, SSIM and top-1 retrieval of every job of a sweep over the tiny model, as a table.

    int8run -m outlier=none,convrot,quarot,hadanorm,smoothquant,auto rounding=absmax,mse,gptq \
        prompts=file prompts.path=experiments/fidelity/names.txt sampler.batch=10
    python experiments/fidelity/pictures.py --sweep multirun/<date>/<time>

Retrieval: the share of images whose nearest of all 374 training drawings, by pixel MSE, is the one that
the prompt names.
"""

import argparse
from pathlib import Path

from plots import method_of
from sweeps import compute_top1, read_drawings, read_jobs


def print_table(sweeps: list[Path]) -> None:
    names, known = read_drawings()
    print(
        "| outlier | rounding | PSNR, dB | worst picture, dB | SSIM | latent error, % | layer SQNR, dB | "
        "top-1, INT8 | top-1, float |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for job in [job for sweep in sweeps for job in read_jobs(sweep)]:
        metrics, images = job["metrics"], job["images"]
        prompts = [image["prompt"] for image in images]
        files = [job["folder"] / image["file"] for image in images]
        floats = [f.with_name(f"{f.stem}_float.png") for f in files]
        rounding = str(job["config"]["rounding"]["_target_"]).rsplit(".", 1)[1].lower()
        worst = min(float(image["psnr_db"]) for image in images)
        print(
            f"| {method_of(job['config'])} | {rounding} | {metrics['quality/psnr_db']:.2f} | {worst:.1f} | "
            f"{metrics['quality/ssim']:.4f} | {100 * metrics['quality/latent_rel_err']:.3f} | "
            f"{metrics['quant/output_sqnr_db_mean']:.2f} | {compute_top1(files, prompts, names, known):.2f} "
            f"| {compute_top1(floats, prompts, names, known):.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, nargs="+", required=True)
    print_table(parser.parse_args().sweep)
