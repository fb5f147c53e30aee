r"""Measure the edit LoRA on drawings that it has not seen, by top-1 retrieval, and draw a sheet to look at.

    python experiments/tiny/evaluate_edit.py --work work --lora int8run/assets/lora/edit.safetensors --sheet \
      experiments/tiny/edits.png

Every held-out flat drawing gets every edit, one seed each. The nearest by pixel MSE is looked for among
*all* drawings in *all* edits: the score is the share whose nearest is the right drawing with the right edit.
`pairs` is the score of one edit per drawing, each edit in turn. `psnr` compares with what the edit should
be, `psnr_of_input` the drawing before the edit.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import load_drawings
from diffusers import FluxKontextPipeline
from edits import PROMPTS, STYLES, apply_edit, list_held_out
from evaluate import psnr
from PIL import Image
from pipeline import TOKENS
from torch import Tensor
from train_edit import SHIPPED

STEPS = 8
BATCH = 20
SHEET_ROWS = 12
# what diffusers' call needs to know about images that are no megapixel
SMALL_IMAGES = {"max_area": 64 * 64, "_auto_resize": False, "max_sequence_length": TOKENS}


@dataclass(frozen=True)
class Found:
    """Which images were found to be what they should be, [N] booleans.

    Attributes:
        right: nothing is nearer than the right drawing with the right edit; an equal one may be as near.
        right_edit: the same for any drawing with the right edit.
        right_drawing: of all drawings with the right edit, none is nearer than the right one.
    """

    right: Tensor
    right_edit: Tensor
    right_drawing: Tensor


def load_editor(lora: Path) -> FluxKontextPipeline:
    """The shipped model with the LoRA in its weights, float32."""
    pipe = FluxKontextPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


def edit_images(pipe: FluxKontextPipeline, prompt: str, images: Tensor, steps: int, seed: int) -> Tensor:
    """The images after one edit, uint8 [N, 3, H, W] as they come.

    Args:
        pipe: the model.
        prompt: the edit.
        images: to edit.
        steps: of the sampler.
        seed: of every image's noise.
    """
    made = []
    for batch in images.split(BATCH):
        count = len(batch)
        drawn = pipe(
            image=batch.float() / 255,
            prompt=[prompt] * count,
            height=batch.shape[2],
            width=batch.shape[3],
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for _ in range(count)],
            output_type="pt",
            **SMALL_IMAGES,
        ).images
        made.append((drawn.float() * 255).round().to(torch.uint8))
    return torch.cat(made)


def look_up(images: Tensor, edit: str, drawings: list[int], candidates: Mapping[str, Tensor]) -> Found:
    """Look for each image among all candidates.

    Args:
        images: uint8 [N, 3, H, W].
        edit: that they should have.
        drawings: that they should show, N positions.
        candidates: by edit, all drawings after it, uint8 [D, 3, H, W].
    """
    flat_images = images.flatten(1).float()
    distances = {
        name: torch.cdist(flat_images, drawn.flatten(1).float()) for name, drawn in candidates.items()
    }
    own = distances[edit][torch.arange(len(images)), torch.tensor(drawings)]
    nearest = torch.stack([distance.amin(dim=1) for distance in distances.values()]).amin(dim=0)
    nearest_of_edit = distances[edit].amin(dim=1)
    return Found(
        right=own <= nearest, right_edit=nearest_of_edit <= nearest, right_drawing=own <= nearest_of_edit
    )


def draw_sheet(columns: list[Tensor], scale: int = 2) -> Image.Image:
    """Images beside each other, enlarged.

    Args:
        columns: uint8 [rows, 3, H, W] each.
        scale: how much larger.
    """
    rows = torch.stack(columns, dim=1)  # [rows, columns, 3, H, W]
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray(sheet.contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lora", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="held-out drawings, at most")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--edits", nargs="+", choices=sorted(PROMPTS), default=list(PROMPTS))
    parser.add_argument("--sheet", type=Path, help="the image to draw: a row per drawing")
    return parser.parse_args()


def describe_edit(edit: str, found: Found, made: Tensor, target: Tensor, before: Tensor) -> dict[str, Any]:
    """What is printed of one edit.

    Args:
        edit: its name.
        found: what the images were found to be.
        made: the images, uint8 [N, 3, H, W].
        target: what they should be.
        before: the drawings that were edited.
    """
    return {
        "edit": edit,
        "drawings": len(made),
        "top1": round(found.right.float().mean().item(), 3),
        "right_edit": round(found.right_edit.float().mean().item(), 3),
        "right_drawing": round(found.right_drawing.float().mean().item(), 3),
        "psnr": round(psnr(made, target), 2),
        "psnr_of_input": round(psnr(before, target), 2),
    }


def score_all(right_of: dict[str, list[bool]]) -> dict[str, float]:
    """The share of right images: of every edit of every drawing, and of one edit per drawing in turn."""
    every = [right for of_edit in right_of.values() for right in of_edit]
    edits = list(right_of.values())
    count = len(edits[0])
    in_turn = [edits[i % len(edits)][i] for i in range(count)]
    return {"pairs": statistics.fmean(in_turn), "all": statistics.fmean(every)}


def main() -> None:
    """Print a line of JSON for each edit, and one for all."""
    args = parse_arguments()
    _, images = load_drawings(args.work)
    held_out = list_held_out(len(images["flat"]))
    held_out = held_out[:: max(1, len(held_out) // args.count)][: args.count]
    candidates = {edit: apply_edit(edit, images) for edit in PROMPTS}
    before = images["flat"][held_out]
    pipe = load_editor(args.lora)

    columns = [before]
    right_of = {}
    for edit in args.edits:
        made = edit_images(pipe, PROMPTS[edit][0], before, args.steps, args.seed)
        found = look_up(made, edit, held_out, candidates)
        right_of[edit] = found.right.tolist()
        target = candidates[edit][held_out]
        print(json.dumps(describe_edit(edit, found, made, target, before)), flush=True)
        columns.append(made)
        if edit in STYLES:
            columns.append(target)
    print(json.dumps({"steps": args.steps, **score_all(right_of)}), flush=True)
    if args.sheet is not None:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        step = max(1, len(held_out) // SHEET_ROWS)
        draw_sheet([column[::step][:SHEET_ROWS] for column in columns]).save(args.sheet)


if __name__ == "__main__":
    main()
