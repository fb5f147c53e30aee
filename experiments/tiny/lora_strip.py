"""Draw the shipped LoRAs at rising strength with the INT8 model, as one image.

python experiments/tiny/lora_strip.py --out experiments/tiny/loras.png
"""

import argparse
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_module

from int8run.config.compose import create_run_spec, get_plain_config
from int8run.config.job import Job
from int8run.report.image_files import make_image_grid
from int8run.tasks.run import run

PROMPTS = ["strawberry", "fox", "octopus", "birthday cake"]
STRENGTHS = (0, 0.5, 1)


def generate_images(style: str, strength: float) -> list:
    """One INT8 image per prompt; the model is built once for all strengths of a style."""
    adapter = f"{{_target_: int8run.lora.config.Adapter, name: {style}, path: {style}}}"
    overrides = [
        f"prompts.prompts=[{','.join(PROMPTS)}]",
        f"lora.adapters=[{adapter}]",
        f"lora.strength={strength}",
        "tracker=none",
    ]
    with initialize_config_module("int8run.conf", version_base="1.3"):
        config = compose("config", [*overrides, "metrics.baseline=none"])
    with tempfile.TemporaryDirectory() as folder:
        job = Job(get_plain_config(config), {"model": "tiny"}, overrides, Path(folder))
        return run(create_run_spec(config), job).candidate.images


def main() -> None:
    """A row for each prompt, a column for each style and strength."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    columns = {}
    for style in ("ink", "gloss"):
        for strength in STRENGTHS:
            columns[f"{style} {strength:g}"] = generate_images(style, strength)
    rows = [(prompt, [images[i] for images in columns.values()]) for i, prompt in enumerate(PROMPTS)]
    make_image_grid(rows, list(columns)).save(out)


if __name__ == "__main__":
    main()
