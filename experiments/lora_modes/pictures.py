"""The tiny model's LoRAs in every mode.

How far INT8 is from the float model with the same LoRAs, and what that costs.

    python experiments/lora_modes/pictures.py --work work

Each row of the table is one `int8run -m` over strengths, in one process; results go to results/pictures.csv.
"""

import argparse
import csv
import json
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "pictures.csv"
STACKS = {
    "ink": ["lora=file", "lora.adapters.0.path=ink", "lora.adapters.0.strength=0,0.5,1,2"],
    "gloss": ["lora=file", "lora.adapters.0.path=gloss", "lora.adapters.0.strength=0.5,1"],
    "ink 0.8, gloss 0.4": ["lora=stack_a", "lora.strength=0.5,1"],
}
MODES = {
    "dynamic, float branch": ["lora.mode=dynamic", "backend=vnni", "backend.int8_branch=false"],
    "dynamic, int8 branch": ["lora.mode=dynamic", "backend=vnni"],
    "bake": ["lora.mode=bake", "backend=vnni"],
    "stochastic": ["lora.mode=stochastic", "backend=vnni"],
}
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


def run_sweep(stack: str, mode: str, outlier: str, seeds: int, work: Path) -> list[dict[str, object]]:
    """One command; a row for each strength."""
    folder = work / f"{stack} {mode} {outlier}".replace(", ", "_").replace(" ", "_")
    words = [
        "int8run",
        "-m",
        *STACKS[stack],
        *MODES[mode],
        f"outlier={outlier}",
        f"prompts.seeds_per_prompt={seeds}",
        "tracker=none",
    ]
    subprocess.run([*words, f"hydra.sweep.dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    rows = []
    for job in sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name)):
        found = json.loads((job / "metrics.json").read_text())["metrics"]
        strength = (
            next(word for word in STACKS[stack][::-1] if "strength=" in word)
            .partition("=")[2]
            .split(",")[int(job.name)]
        )
        rows.append(
            {
                "stack": stack,
                "mode": mode,
                "outlier": outlier,
                "strength": strength,
                **{m: found.get(m, "") for m in METRICS},
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each of the six prompts")
    asked = parser.parse_args()
    table = []
    for stack in STACKS:
        for mode in MODES:
            for outlier in ("none", "convrot"):
                table += run_sweep(stack, mode, outlier, asked.seeds, asked.work.absolute())
                print(*table[-1].values(), flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
