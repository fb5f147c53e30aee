"""The tiny model's LoRAs in every mode.

How far INT8 is from the float model with the same LoRAs, and what that costs.

    python experiments/lora_modes/images.py --work work

Each row of the table is one `int8run -m` over strengths, in one process; results go to results/images.csv.
"""

import argparse
import csv
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "images.csv"
STACKS = {
    "ink": ["lora=file", "lora.adapters.0.path=ink", "lora.adapters.0.strength=0,0.5,1,2"],
    "gloss": ["lora=file", "lora.adapters.0.path=gloss", "lora.adapters.0.strength=0.5,1"],
    "ink 0.8, gloss 0.4": ["lora=stack_a", "lora.strength=0.5,1"],
}
MODES = {
    "dynamic, float branch": ["lora.mode=dynamic", "backend=cpu", "backend.int8_branch=false"],
    "dynamic, int8 branch": ["lora.mode=dynamic", "backend=cpu"],
    "bake": ["lora.mode=bake", "backend=cpu"],
    "stochastic": ["lora.mode=stochastic", "backend=cpu"],
}
OUTLIERS = ("none", "convrot")
METRICS = (
    "quality/psnr_db",
    "quality/latent_rel_err",
    "speed/step_ms_p50",
    "float/step_ms_p50",
    "memory/denoiser_bytes",
    "lora/overhead_ratio",
    "lora/change_ms",
    "lora/clipped_share",
    "build/quantize_s",
)


def list_strengths(stack: str) -> list[str]:
    """The strengths over which the command of a stack sweeps, one for each job."""
    swept = [override for override in STACKS[stack] if "strength=" in override]
    return swept[-1].partition("=")[2].split(",")


def run_sweep(stack: str, mode: str, outlier: str, seeds: int, work: Path) -> list[dict[str, object]]:
    """One command; a row for each strength."""
    folder = work / f"{stack} {mode} {outlier}".replace(", ", "_").replace(" ", "_")
    command = [
        *(sys.executable, "-m", "int8run.cli", "-m"),
        *STACKS[stack],
        *MODES[mode],
        f"outlier={outlier}",
        f"prompts.seeds_per_prompt={seeds}",
        "tracker=none",
        f"hydra.sweep.dir={folder}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = []
    for number, strength in enumerate(list_strengths(stack)):
        metrics = json.loads((folder / str(number) / "metrics.json").read_text())["metrics"]
        values = {name: metrics.get(name, "") for name in METRICS}
        rows.append({"stack": stack, "mode": mode, "outlier": outlier, "strength": strength, **values})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=4, help="images of each of the six prompts")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--outliers", nargs="+", choices=OUTLIERS, default=OUTLIERS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for stack, mode, outlier in product(arguments.stacks, arguments.modes, arguments.outliers):
        rows += run_sweep(stack, mode, outlier, arguments.seeds, arguments.work.absolute())
        print(*rows[-1].values(), flush=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
