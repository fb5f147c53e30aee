r"""Measure the tiny model by top-1 retrieval, and draw a sheet of samples to look at.

    python experiments/tiny/evaluate.py --work work --model int8run/assets/tiny --sheet \
      experiments/tiny/samples.png

For evenly spread trained names, one seed each: generate, and find the nearest of *all* trained drawings by
pixel MSE. The score is the share whose nearest drawing is the right one. With --lora the drawings of that
style are the candidates.

    python experiments/tiny/evaluate.py --work work --model int8run/assets/tiny --count 374 --seeds 3 \
      --steps 4 2 1 --reference \
      --few-step int8run/assets/lora/few_step.safetensors

With --reference the images are also compared, name by name and seed by seed, with those of 16 Euler steps
without the few-step LoRA. With --untrained the names are such that neither the model nor the few-step LoRA
has seen; they have no drawings that the model could know, and the candidates are their own images of 16
steps.
"""

import argparse
import json
from pathlib import Path

import diffusers
import torch
from data import STYLES, load_drawings, make_caption
from diffusers import FluxPipeline
from PIL import Image
from pipeline import TOKENS, TRIGGERS

STEPS = 16


def generate_images(pipe: FluxPipeline, prompts: list[str], seed: int, steps: int = STEPS) -> torch.Tensor:
    """Images of the prompts, all from the same seed. Returns uint8 [N, 3, H, W]."""
    pictures = []
    torch.manual_seed(seed)  # a sampler that adds noise between steps takes it from here
    for start in range(0, len(prompts), 25):
        batch = prompts[start : start + 25]
        made = pipe(
            batch,
            height=64,
            width=64,
            num_inference_steps=steps,
            max_sequence_length=TOKENS,
            output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for _ in batch],
        ).images
        pictures.append((made.float().cpu() * 255).round().to(torch.uint8))
    return torch.cat(pictures)


def find_nearest(pictures: torch.Tensor, drawings: torch.Tensor) -> torch.Tensor:
    """Index of the drawing with the least pixel MSE to each picture.

    Uint8 [N, 3, H, W] and [D, 3, H, W] -> [N].
    """
    return torch.cdist(pictures.flatten(1).float(), drawings.flatten(1).float()).argmin(dim=1)


def draw_sheet(pictures: torch.Tensor, drawings: torch.Tensor, columns: int = 10) -> Image.Image:
    """Each image above the drawing it was asked for, enlarged twice."""
    pairs = torch.cat([pictures, drawings], dim=2)
    pad = torch.full_like(pairs[:1], 255).expand(-len(pairs) % columns, -1, -1, -1)
    grid = (
        torch.cat([pairs, pad]).unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    )
    image = Image.fromarray(grid.contiguous().numpy())
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)


def list_untrained(names: list[str], trained: list[str]) -> list[str]:
    """The names that the model was not trained on, in order.

    The few-step LoRA learns from the even ones of them.
    """
    seen = set(trained)
    return [n for n in names if n not in seen]


def apply_lora(pipe: FluxPipeline, lora: Path, strength: float) -> None:
    """Add a LoRA to the weights for good."""
    pipe.load_lora_weights(lora)
    pipe.fuse_lora(lora_scale=strength)
    pipe.unload_lora_weights()


def psnr(pictures: torch.Tensor, others: torch.Tensor) -> float:
    """Mean PSNR in dB over pairs of uint8 images; an error below rounding counts as rounding."""
    mse = (pictures.float() - others.float()).square().flatten(1).mean(dim=1).clamp(min=1 / 12)
    return (10 * torch.log10(255**2 / mse)).mean().item()


def evaluate_model(
    work: Path,
    model: Path,
    count: int,
    seed: int,
    seeds: int,
    steps: list[int],
    scheduler: str | None,
    shift: float | None,
    reference: bool,
    unseen: bool,
    lora: Path | None,
    style: str,
    strength: float,
    few_step: Path | None,
    few_step_strength: float,
    out: Path | None,
) -> list[float]:
    names, drawings = load_drawings(work)
    asked = torch.load(work / "base.pt", weights_only=True, map_location="cpu")["names"]
    if unseen:
        asked = list_untrained(names, asked)[1::2]
    index = [names.index(n) for n in asked]
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    suffix = ""
    if lora is not None:
        apply_lora(pipe, lora, strength)
        suffix = f", {TRIGGERS[style]}"
    chosen = [int(i) for i in torch.linspace(0, len(asked) - 1, min(count, len(asked)))]
    prompts = [make_caption(asked[i]) + suffix for i in chosen]
    all_seeds = range(seed, seed + seeds)
    references = {s: generate_images(pipe, prompts, s) for s in all_seeds} if reference or unseen else {}
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(
            pipe.scheduler.config, **({} if shift is None else {"shift": shift})
        )
    if few_step is not None:
        apply_lora(pipe, few_step, few_step_strength)
    scores = []
    for n in steps:
        right, wrong, closeness = 0, [], 0.0
        for s in all_seeds:
            pictures = generate_images(pipe, prompts, s, n)
            found = find_nearest(pictures, references[s] if unseen else drawings[style][index]).tolist()
            found = [chosen[f] for f in found] if unseen else found
            wrong += [f"{asked[i]} -> {asked[f]}" for i, f in zip(chosen, found, strict=True) if i != f]
            right += sum(i == f for i, f in zip(chosen, found, strict=True))
            closeness += psnr(pictures, references[s]) / seeds if references else 0.0
            if out is not None and s == seed:
                out.parent.mkdir(parents=True, exist_ok=True)
                draw_sheet(pictures, drawings[style][[index[i] for i in chosen]]).save(out)
        scores.append(right / (len(chosen) * seeds))
        line = {
            "style": style,
            "strength": strength,
            "names": len(chosen),
            "of": len(chosen if unseen else asked),
            "seeds": seeds,
        }
        line |= {"scheduler": type(pipe.scheduler).__name__, "steps": n, "top1": scores[-1]}
        line |= {"psnr": round(closeness, 2)} if references else {}
        print(json.dumps(line | {"wrong": wrong[:12]}), flush=True)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the exported pipeline folder")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS])
    parser.add_argument("--scheduler", help="a class of diffusers, such as FlowMatchLCMScheduler")
    parser.add_argument("--shift", type=float, help="the scheduler's shift, where --scheduler names one")
    parser.add_argument(
        "--reference", action="store_true", help="also the PSNR to 16 Euler steps without the few-step LoRA"
    )
    parser.add_argument(
        "--untrained", action="store_true", dest="unseen", help="ask for names that were not trained on"
    )
    parser.add_argument("--lora", type=Path, help="a style LoRA")
    parser.add_argument("--style", choices=STYLES, default="flat")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--few-step", type=Path, help="a few-step LoRA, beside the style LoRA")
    parser.add_argument("--few-step-strength", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, dest="out")
    evaluate_model(**vars(parser.parse_args()))
