"""Measure the tiny model by top-1 retrieval, and draw a sheet of samples to look at.

    python experiments/tiny/evaluate.py --work work --model int8run/assets/tiny --sheet experiments/tiny/samples.png

For evenly spread trained names, one seed each: generate, and find the nearest of *all* trained drawings by pixel MSE. The
score is the share whose nearest drawing is the right one. With --lora the drawings of that style are the candidates.
"""

import argparse
import json
from pathlib import Path

import torch
from data import STYLES, caption, load_drawings
from diffusers import FluxPipeline
from PIL import Image
from pipeline import TOKENS, TRIGGERS

STEPS = 16


def generate(pipe: FluxPipeline, prompts: list[str], seed: int) -> torch.Tensor:
    """Pictures of the prompts, all from the same seed. Returns uint8 [N, 3, H, W]."""
    pictures = []
    for start in range(0, len(prompts), 25):
        batch = prompts[start : start + 25]
        made = pipe(
            batch, height=64, width=64, num_inference_steps=STEPS, max_sequence_length=TOKENS, output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for _ in batch],
        ).images  # fmt: skip
        pictures.append((made.float().cpu() * 255).round().to(torch.uint8))
    return torch.cat(pictures)


def nearest(pictures: torch.Tensor, drawings: torch.Tensor) -> torch.Tensor:
    """Index of the drawing with the least pixel MSE to each picture. uint8 [N, 3, H, W] and [D, 3, H, W] -> [N]."""
    return torch.cdist(pictures.flatten(1).float(), drawings.flatten(1).float()).argmin(dim=1)


def sheet(pictures: torch.Tensor, drawings: torch.Tensor, columns: int = 10) -> Image.Image:
    """Each picture above the drawing it was asked for, enlarged twice."""
    pairs = torch.cat([pictures, drawings], dim=2)
    pad = torch.full_like(pairs[:1], 255).expand(-len(pairs) % columns, -1, -1, -1)
    grid = torch.cat([pairs, pad]).unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray(grid.contiguous().numpy())
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)


def evaluate(work: Path, model: Path, count: int, seed: int, lora: Path | None, style: str, strength: float, out: Path | None) -> float:
    names, drawings = load_drawings(work)
    trained = torch.load(work / "base.pt", weights_only=True, map_location="cpu")["names"]
    index = [names.index(n) for n in trained]
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    suffix = ""
    if lora is not None:
        pipe.load_lora_weights(lora)
        pipe.fuse_lora(lora_scale=strength)
        suffix = f", {TRIGGERS[style]}"
    chosen = [int(i) for i in torch.linspace(0, len(trained) - 1, min(count, len(trained)))]
    pictures = generate(pipe, [caption(trained[i]) + suffix for i in chosen], seed)
    found = nearest(pictures, drawings[style][index])
    score = (found == torch.tensor(chosen)).float().mean().item()
    wrong = [f"{trained[i]} -> {trained[f]}" for i, f in zip(chosen, found.tolist(), strict=True) if i != f]
    print(json.dumps({"style": style, "strength": strength, "names": len(chosen), "of": len(trained), "top1": score, "wrong": wrong[:12]}))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures, drawings[style][[index[i] for i in chosen]]).save(out)
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the exported pipeline folder")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--style", choices=STYLES, default="flat")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, dest="out")
    evaluate(**vars(parser.parse_args()))
