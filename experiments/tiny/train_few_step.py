r"""Train a LoRA that lets the tiny model draw in 4, 2 or 1 steps what it otherwise draws in 16.

    python experiments/tiny/train_few_step.py --work work --images 7200 --out \
      int8run/assets/lora/few_step.safetensors

No drawings are needed, only captions: the model's own 16-step images are the targets, without a style and
with each of the style LoRAs of --styles. The LoRA is trained through the whole Euler sampler of 4, 2 or 1
steps, from the same noise to the same latents. Captions are the trained names and every other one of the
names that were not trained on; the rest stay for measuring. Targets are kept in
`<work>/few_step_targets*.pt`; resumes from `<work>/few_step.pt`. Writes PEFT's key layout in float16, and
with --strip an image of what the LoRA does (float model).
"""

import argparse
import copy
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from data import load_drawings, load_trained_names, make_caption
from diffusers import FluxPipeline, FluxTransformer2DModel
from evaluate import STEPS, apply_lora, generate_images, list_untrained
from export import load_trained
from PIL import Image
from pipeline import TRIGGERS, encode_captions
from safetensors.torch import load_file
from torch import Tensor, nn
from train import Schedule, Trainer
from train_lora import add_trained_lora, save_lora

from int8run.report.image_files import make_image_grid

RANK = 4
# steps of the sampler that a batch is trained through, and how often
SCHEDULES = {4: 0.6, 2: 0.25, 1: 0.15}
# of the batches, this share has a style LoRA in the model
STYLED = 0.4
# the best strength by the number of steps
STRENGTHS = {4: 0.5, 2: 1.0, 1: 1.0}
# for the file's header; the strengths are measured, see README.md
HINT = "FlowMatchEulerDiscreteScheduler, 4 steps at strength 0.5, or 2 or 1 steps at strength 1; no guidance"
TOKENS_SIDE, CHANNELS = 8, 32
# what the image shows: a trained name, one that neither model nor LoRA has seen, and the styles
ROWS = (
    ("sunflower", None),
    ("airplane arrival", None),
    ("fox, ink style", "ink"),
    ("octopus, ink style", "ink"),
    ("birthday cake, gloss style", "gloss"),
)
Text = tuple[Tensor, Tensor, Tensor]  # what `encode_captions` returns


def noise_levels(pipe: FluxPipeline, steps: int) -> Tensor:
    """The noise levels of the pipeline's own scheduler, zero at the end: [steps + 1]."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return pipe.scheduler.sigmas


def sample_latents(pipe: FluxPipeline, noise: Tensor, text: Text, steps: int) -> Tensor:
    """Euler from noise to latents, both packed [B, 64, 32], as the pipeline does.

    Gradients pass through every step.
    """
    states, pooled, text_ids = text
    image_ids = FluxPipeline._prepare_latent_image_ids(
        1, TOKENS_SIDE, TOKENS_SIDE, noise.device, torch.float32
    )
    x = noise
    for level, following in itertools.pairwise(noise_levels(pipe, steps).to(noise.device)):
        with torch.autocast(noise.device.type, torch.bfloat16):
            velocity = pipe.transformer(
                hidden_states=x,
                timestep=level.expand(len(x)),
                guidance=None,
                pooled_projections=pooled,
                encoder_hidden_states=states,
                txt_ids=text_ids.float(),
                img_ids=image_ids,
                return_dict=False,
            )[0]
        x = x + (following - level) * velocity.float()
    return x


def styled_weights(transformer: FluxTransformer2DModel, lora: Path | None) -> dict[str, Tensor]:
    """The weights of all linear layers by name, changed by a LoRA at strength 1 (None: as they are)."""
    weights = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            weights[name] = module.weight.data
    if lora is None:
        return weights
    pairs = load_file(lora)
    for down_key, down in pairs.items():
        if not down_key.endswith(".lora_A.weight"):
            continue
        key = down_key.removesuffix(".lora_A.weight")
        product = pairs[f"{key}.lora_B.weight"].float() @ down.float()
        name = key.removeprefix("transformer.")
        weights[name] = weights[name] + product.to(weights[name].device)
    return weights


def use_weights(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Put weights into the layers, without a copy."""
    for name, weight in weights.items():
        layers[name].weight.data = weight


@torch.no_grad()
def make_targets(pipe: FluxPipeline, text: Text, seeds: range, path: Path) -> tuple[Tensor, Tensor]:
    """Noise and the latents that 16 steps make of it: [len(seeds) * captions, 64, 32] each.

    Every finished seed is kept.
    """
    states, pooled, text_ids = text
    saved: dict[str, list[Tensor]] = {"noise": [], "latents": []}
    if path.exists():
        saved = torch.load(path, weights_only=True)
    for seed in seeds[len(saved["noise"]) :]:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(states), TOKENS_SIDE**2, CHANNELS, generator=generator)
        made = []
        for n, s, p in zip(noise.split(64), states.split(64), pooled.split(64), strict=True):
            made.append(sample_latents(pipe, n.to(states.device), (s, p, text_ids), STEPS).cpu())
        saved["noise"].append(noise.half())
        saved["latents"].append(torch.cat(made).half())
        torch.save(saved, path)
        print(f"{path.name}: seed {seed} of {seeds}", flush=True)
    count = len(seeds)
    return torch.cat(saved["noise"][:count]).float(), torch.cat(saved["latents"][:count]).float()


@dataclass(frozen=True)
class Teacher:
    """The model in one style, and what it draws in 16 steps.

    Attributes:
        text: of its C captions, encoded.
        weights: of the transformer's linear layers, with the style's LoRA in them.
        noise: N = seeds * C starts, [N, 64, 32].
        latents: what becomes of them, [N, 64, 32].
    """

    text: Text
    weights: dict[str, Tensor]
    noise: Tensor
    latents: Tensor

    def pick_text(self, pick: Tensor) -> Text:
        """The text of some of the N images."""
        states, pooled, text_ids = self.text
        caption = pick % len(states)
        return states[caption], pooled[caption], text_ids


def list_taught(work: Path) -> list[str]:
    """The trained names, and every other one of those that were not trained on."""
    names, _ = load_drawings(work)
    trained = load_trained_names(work)
    return trained + list_untrained(names, trained)[::2]


def list_captions(work: Path, style: str | None) -> list[str]:
    """What is asked for in a style: trained names alone; every other caption says its trigger words."""
    if style is None:
        return [make_caption(name) for name in list_taught(work)]
    captions = [make_caption(name) for name in load_trained_names(work)]
    captions[1::2] = [f"{caption}, {TRIGGERS[style]}" for caption in captions[1::2]]
    return captions


def make_teachers(pipe: FluxPipeline, args: argparse.Namespace) -> list[Teacher]:
    """The model without a style, then with each of them. Its weights are left as they were."""
    layers = collect_layers(pipe.transformer)
    plain = styled_weights(pipe.transformer, None)
    teachers = []
    for i, style in enumerate([None, *args.styles]):
        path = args.work / "few_step_targets.pt"
        weights = plain
        if style is not None:
            path = args.work / f"few_step_targets_{style}.pt"
            weights = styled_weights(pipe.transformer, args.loras / f"{style}.safetensors")
        text = encode_captions(pipe, list_captions(args.work, style))
        # far from the seeds that people, and evaluate.py, draw with
        first = 1_000_000 * (i + 1)
        use_weights(layers, weights)
        noise, latents = make_targets(pipe, text, range(first, first + args.seeds), path)
        use_weights(layers, plain)
        teachers.append(Teacher(text, weights, noise, latents))
    return teachers


def collect_layers(transformer: FluxTransformer2DModel) -> dict[str, nn.Module]:
    """The linear layers by name; to be asked before a LoRA is added, which renames them."""
    return {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}


class Errors:
    """What batches were off by since the last line was printed, by steps and with or without a style."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, bool], list[float]] = {}
        for styled in (False, True):
            for steps in SCHEDULES:
                self.found[steps, styled] = []

    def count(self) -> int:
        """How many batches there were."""
        return sum(len(errors) for errors in self.found.values())

    def mean(self, steps: int, *, styled: bool) -> float:
        """Over the batches of one kind; 0 where there were none."""
        errors = self.found[steps, styled]
        return sum(errors) / max(1, len(errors))

    def describe(self) -> str:
        """The means of all kinds of batches."""
        texts = []
        for steps, styled in self.found:
            kind = f"{steps} steps"
            if styled:
                kind += " styled"
            texts.append(f"{kind} {self.mean(steps, styled=styled):.4f}")
        return ", ".join(texts)


def draw_steps(generator: torch.Generator) -> int:
    """One of the numbers of steps, as often as SCHEDULES says."""
    shares = torch.tensor(list(SCHEDULES.values()))
    drawn = int(torch.multinomial(shares, 1, generator=generator))
    return list(SCHEDULES)[drawn]


def draw_teacher(teachers: list[Teacher], generator: torch.Generator) -> Teacher:
    """The first teacher, or by the share STYLED one of the others."""
    plain, *styled = teachers
    if styled and torch.rand(1, generator=generator).item() < STYLED:
        return styled[int(torch.randint(len(styled), (1,), generator=generator))]
    return plain


def fit_few_step(
    trainer: Trainer,
    pipe: FluxPipeline,
    layers: Mapping[str, nn.Module],
    teachers: list[Teacher],
    schedule: Schedule,
) -> None:
    """Train the LoRA that is in the pipeline to end in few steps where a teacher ends in 16.

    Args:
        trainer: of the LoRA.
        pipe: the model.
        layers: its linear layers, whose weights each batch's teacher replaces.
        teachers: the first without a style.
        schedule: images, batch and learning rate.
    """
    started = time.time()
    at_start = trainer.images
    errors = Errors()
    while trainer.images < schedule.images:
        generator = torch.Generator().manual_seed(trainer.images)
        steps = draw_steps(generator)
        teacher = draw_teacher(teachers, generator)
        pick = torch.randint(len(teacher.noise), (schedule.batch,), generator=generator)
        use_weights(layers, teacher.weights)
        noise = teacher.noise[pick].to(pipe.device)
        made = sample_latents(pipe, noise, teacher.pick_text(pick), steps)
        mse = (made - teacher.latents[pick].to(pipe.device)).square().mean(dim=(1, 2))  # [B]
        # decibels, in effect: each image counts alike, whether it is easy or not, in many steps or few
        trainer.step(mse.log().mean(), schedule.learning_rate(trainer.images), schedule.batch)
        errors.found[steps, teacher is not teachers[0]].append(mse.detach().sqrt().mean().item())
        if errors.count() == 100:
            trainer.curve.append((trainer.images, errors.mean(4, styled=False)))
            rate = (trainer.images - at_start) / (time.time() - started)
            print(f"images {trainer.images} error with {errors.describe()}; {rate:.1f} images/s", flush=True)
            errors = Errors()
            trainer.save()
    trainer.save()


def train(args: argparse.Namespace) -> None:
    """Train the LoRA from the command line's words, and write it."""
    pipe = load_trained(args.work).to(args.device)
    layers = collect_layers(pipe.transformer)
    teachers = make_teachers(pipe, args)
    add_trained_lora(pipe, RANK)
    trainer = Trainer(
        args.work / "few_step.pt",
        nn.ModuleDict({"transformer": pipe.transformer}),
        list_taught(args.work),
        ema_half_life=1_000,
    )
    fit_few_step(trainer, pipe, layers, teachers, Schedule(args.images, args.batch, peak=args.lr))
    trainer.use_average()
    count = save_lora(pipe.transformer, args.out, "few-step", {"modelspec.usage_hint": HINT})
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} KB, {count} modules")


def list_columns() -> list[tuple[int, float]]:
    """The strip's columns: 16 steps, then few steps without and with the LoRA at its best strength."""
    columns = [(STEPS, 0.0)]
    for steps, strength in STRENGTHS.items():
        columns += [(steps, 0.0), (steps, strength)]
    return columns


def name_column(steps: int, strength: float) -> str:
    """What stands above a column."""
    name = f"{steps} step"
    if steps > 1:
        name += "s"
    if strength > 0:
        name += f", few_step {strength:g}"
    return name


def draw_strip(args: argparse.Namespace) -> None:
    """Draw ROWS in 16 steps, and in 4, 2 and 1 steps without and with the few-step LoRA."""
    trained = load_trained(args.work)
    trained.set_progress_bar_config(disable=True)
    columns = list_columns()
    rows = []
    for prompt, style in ROWS:
        images = []
        for steps, strength in columns:
            pipe = copy.deepcopy(trained)
            if style is not None:
                apply_lora(pipe, args.loras / f"{style}.safetensors", 1.0)
            if strength > 0:
                apply_lora(pipe, args.out, strength)
            drawn = generate_images(pipe, [prompt], 0, steps)[0]
            images.append(Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy()))
        rows.append((prompt, images))
    make_image_grid(rows, [name_column(*column) for column in columns]).save(args.strip)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=7_200)
    parser.add_argument("--seeds", type=int, default=2, help="noises per caption")
    parser.add_argument("--styles", nargs="*", default=sorted(TRIGGERS), choices=sorted(TRIGGERS))
    parser.add_argument(
        "--loras", type=Path, default=Path("int8run/assets/lora"), help="where the style LoRAs lie"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--strip", type=Path, help="the image to draw")
    args = parser.parse_args()
    train(args)
    if args.strip is not None:
        draw_strip(args)
