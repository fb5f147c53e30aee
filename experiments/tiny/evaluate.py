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
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from data import STYLES, load_drawings, load_trained_names, make_caption
from diffusers import FluxPipeline
from PIL import Image
from pipeline import TOKENS, TRIGGERS

STEPS = 16


def generate_images(pipe: FluxPipeline, prompts: list[str], seed: int, steps: int = STEPS) -> torch.Tensor:
    """Images of the prompts, all from the same seed. Returns uint8 [N, 3, H, W]."""
    images = []
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
        images.append((made.float().cpu() * 255).round().to(torch.uint8))
    return torch.cat(images)


def find_nearest(images: torch.Tensor, drawings: torch.Tensor) -> torch.Tensor:
    """Index of the drawing with the least pixel MSE to each image.

    Uint8 [N, 3, H, W] and [D, 3, H, W] -> [N].
    """
    return torch.cdist(images.flatten(1).float(), drawings.flatten(1).float()).argmin(dim=1)


def draw_sheet(images: torch.Tensor, drawings: torch.Tensor, columns: int = 10) -> Image.Image:
    """Each image above the drawing it was asked for, enlarged twice."""
    pairs = torch.cat([images, drawings], dim=2)  # [N, 3, 2H, W]
    white = torch.full_like(pairs[:1], 255).expand(-len(pairs) % columns, -1, -1, -1)
    grid = torch.cat([pairs, white]).unflatten(0, (-1, columns))  # [rows, columns, 3, 2H, W]
    sheet = grid.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [rows * 2H, columns * W, 3]
    image = Image.fromarray(sheet.contiguous().numpy())
    return image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST)


def list_untrained(names: list[str], trained: list[str]) -> list[str]:
    """The names that the model was not trained on, in order.

    The few-step LoRA learns from the even ones of them.
    """
    seen = set(trained)
    return [name for name in names if name not in seen]


def apply_lora(pipe: FluxPipeline, lora: Path, strength: float) -> None:
    """Add a LoRA to the weights for good."""
    pipe.load_lora_weights(lora)
    pipe.fuse_lora(lora_scale=strength)
    pipe.unload_lora_weights()


def psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    """Mean PSNR in dB over pairs of uint8 images; an error below rounding counts as rounding."""
    mse = (images.float() - others.float()).square().flatten(1).mean(dim=1).clamp(min=1 / 12)
    return (10 * torch.log10(255**2 / mse)).mean().item()


@dataclass(frozen=True)
class Question:
    """What the model is asked to draw, and among what its images are looked up.

    Attributes:
        names: the names asked for.
        drawings: of these names, uint8 [len(names), 3, H, W].
        candidates: all names that an image could be found to show.
        candidate_drawings: of the candidates, uint8 [len(candidates), 3, H, W]; None for names that the model
            was not trained on: their candidates are the model's own images of the names asked for.
    """

    names: list[str]
    drawings: torch.Tensor
    candidates: list[str]
    candidate_drawings: torch.Tensor | None


@dataclass(frozen=True)
class Answer:
    """How the images of one number of steps were found.

    Attributes:
        wrong: `asked -> found` of every image whose nearest candidate is another name.
        top1: the share of the others.
        psnr_db: mean PSNR to the reference images; None without these.
        images: the images of the first seed, uint8 [N, 3, H, W].
    """

    wrong: list[str]
    top1: float
    psnr_db: float | None
    images: torch.Tensor


def choose_names(work: Path, style: str, count: int, *, untrained: bool) -> Question:
    """At most `count` names, evenly spread over the trained ones, or over those that no LoRA has seen."""
    names, drawings = load_drawings(work)
    known = load_trained_names(work)
    if untrained:
        known = list_untrained(names, known)[1::2]
    positions = torch.linspace(0, len(known) - 1, min(count, len(known)))
    asked = [known[int(position)] for position in positions]
    of_style = drawings[style]
    asked_drawings = of_style[[names.index(name) for name in asked]]
    if untrained:
        return Question(asked, asked_drawings, candidates=asked, candidate_drawings=None)
    known_drawings = of_style[[names.index(name) for name in known]]
    return Question(asked, asked_drawings, candidates=known, candidate_drawings=known_drawings)


def replace_scheduler(pipe: FluxPipeline, class_name: str, shift: float | None) -> None:
    """Give a pipeline a scheduler of diffusers, with the settings of the one it has."""
    changes = {}
    if shift is not None:
        changes["shift"] = shift
    scheduler_class = getattr(diffusers, class_name)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **changes)


def answer_question(
    pipe: FluxPipeline,
    question: Question,
    prompts: list[str],
    steps: int,
    seeds: Sequence[int],
    references: Mapping[int, torch.Tensor],
) -> Answer:
    """Draw every prompt with every seed, and look the images up.

    Args:
        pipe: the model.
        question: the names, and their candidates.
        prompts: what is said to the model for each name.
        steps: of the sampler.
        seeds: one image per prompt each.
        references: by seed, images that these should equal, uint8 [N, 3, H, W]; empty: not compared.
    """
    wrong: list[str] = []
    closeness_db: list[float] = []
    drawn = []
    for seed in seeds:
        images = generate_images(pipe, prompts, seed, steps)
        drawn.append(images)
        candidates = question.candidate_drawings
        if candidates is None:
            candidates = references[seed]
        nearest = find_nearest(images, candidates).tolist()
        for name, index in zip(question.names, nearest, strict=True):
            found = question.candidates[index]
            if found != name:
                wrong.append(f"{name} -> {found}")
        if references:
            closeness_db.append(psnr(images, references[seed]))
    total = len(prompts) * len(seeds)
    return Answer(
        wrong=wrong,
        top1=(total - len(wrong)) / total,
        psnr_db=statistics.fmean(closeness_db) if closeness_db else None,
        images=drawn[0],
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--untrained", action="store_true", help="ask for names that were not trained on")
    parser.add_argument("--lora", type=Path, help="a style LoRA")
    parser.add_argument("--style", choices=STYLES, default="flat")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--few-step", type=Path, help="a few-step LoRA, beside the style LoRA")
    parser.add_argument("--few-step-strength", type=float, default=1.0)
    parser.add_argument("--sheet", type=Path, help="the image to draw, of the first seed")
    return parser.parse_args()


def main() -> None:
    """Print a line of JSON for each number of steps."""
    args = parse_arguments()
    question = choose_names(args.work, args.style, args.count, untrained=args.untrained)
    prompts = [make_caption(name) for name in question.names]
    pipe = FluxPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.lora is not None:
        apply_lora(pipe, args.lora, args.strength)
        prompts = [f"{prompt}, {TRIGGERS[args.style]}" for prompt in prompts]

    seeds = range(args.seed, args.seed + args.seeds)
    references = {}
    if args.reference or args.untrained:
        references = {seed: generate_images(pipe, prompts, seed) for seed in seeds}
    if args.scheduler is not None:
        replace_scheduler(pipe, args.scheduler, args.shift)
    if args.few_step is not None:
        apply_lora(pipe, args.few_step, args.few_step_strength)

    for steps in args.steps:
        answer = answer_question(pipe, question, prompts, steps, seeds, references)
        line: dict[str, Any] = {
            "style": args.style,
            "strength": args.strength,
            "names": len(question.names),
            "of": len(question.candidates),
            "seeds": args.seeds,
            "scheduler": type(pipe.scheduler).__name__,
            "steps": steps,
            "top1": answer.top1,
        }
        if answer.psnr_db is not None:
            line["psnr"] = round(answer.psnr_db, 2)
        line["wrong"] = answer.wrong[:12]
        print(json.dumps(line), flush=True)
        if args.sheet is not None:
            args.sheet.parent.mkdir(parents=True, exist_ok=True)
            draw_sheet(answer.images, question.drawings).save(args.sheet)


if __name__ == "__main__":
    main()
