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
from pathlib import Path

import numpy as np
import torch
from data import load_drawings, make_caption
from diffusers import FluxPipeline, FluxTransformer2DModel
from evaluate import STEPS, apply_lora, generate_images, list_untrained
from export import load_trained
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipeline import TRIGGERS, encode_captions
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import Trainer, learning_rate
from train_lora import TARGETS

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
Text = tuple[Tensor, Tensor, Tensor]


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
    """By name, the weights of the layers that a LoRA can change, with the LoRA at strength 1 (None.

    As they are).
    """
    pairs = load_file(lora) if lora is not None else {}
    weights = {n: m.weight.data for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    changed = [key.removesuffix(".lora_A.weight") for key in pairs if key.endswith(".lora_A.weight")]
    for key in changed:
        product = pairs[f"{key}.lora_B.weight"].float() @ pairs[f"{key}.lora_A.weight"].float()
        name = key.removeprefix("transformer.")
        weights[name] = weights[name] + product.to(weights[name].device)
    return weights


@torch.no_grad()
def make_targets(pipe: FluxPipeline, text: Text, seeds: range, path: Path) -> tuple[Tensor, Tensor]:
    """Noise and the latents that 16 steps make of it: [len(seeds) * captions, 64, 32] each.

    Every finished seed is kept.
    """
    states, pooled, text_ids = text
    saved = torch.load(path, weights_only=True) if path.exists() else {"noise": [], "latents": []}
    for seed in seeds[len(saved["noise"]) :]:
        noise = torch.randn(
            len(states), TOKENS_SIDE**2, CHANNELS, generator=torch.Generator().manual_seed(seed)
        )
        made = [
            sample_latents(pipe, n.to(states.device), (s, p, text_ids), STEPS).cpu()
            for n, s, p in zip(noise.split(64), states.split(64), pooled.split(64), strict=True)
        ]
        saved["noise"].append(noise.half())
        saved["latents"].append(torch.cat(made).half())
        torch.save(saved, path)
        print(f"{path.name}: seed {seed} of {seeds}", flush=True)
    return torch.cat(saved["noise"][: len(seeds)]).float(), torch.cat(saved["latents"][: len(seeds)]).float()


def train(
    work: Path,
    images: int,
    seeds: int,
    styles: list[str],
    loras: Path,
    batch: int,
    lr: float,
    out: Path,
    device: str,
) -> None:
    names, _ = load_drawings(work)
    trained = torch.load(work / "base.pt", weights_only=True, map_location="cpu")["names"]
    taught = [*trained, *list_untrained(names, trained)[::2]]
    pipe = load_trained(work).to(device)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    layers = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
    data = []
    for i, style in enumerate([None, *styles]):
        # a style was trained on the trained names only; every other caption says its trigger words
        captions = [make_caption(n) for n in (taught if style is None else trained)]
        if style is not None:
            captions[1::2] = [f"{c}, {TRIGGERS[style]}" for c in captions[1::2]]
        weights = styled_weights(pipe.transformer, None if style is None else loras / f"{style}.safetensors")
        data.append({"text": encode_captions(pipe, captions), "weights": weights})
        # far from the seeds that people, and evaluate.py, draw with
        first = 1_000_000 * (i + 1)
        use_weights(layers, weights)
        path = work / f"few_step_targets{f'_{style}' if style else ''}.pt"
        data[-1]["noise"], data[-1]["latents"] = make_targets(
            pipe, data[-1]["text"], range(first, first + seeds), path
        )
        use_weights(layers, data[0]["weights"])

    pipe.transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian")
    )
    trainer = Trainer(
        work / "few_step.pt", nn.ModuleDict({"transformer": pipe.transformer}), taught, ema_half_life=1_000
    )
    started, at_start, losses = time.time(), trainer.images, new_losses()
    while trainer.images < images:
        g = torch.Generator().manual_seed(trainer.images)
        steps = list(SCHEDULES)[
            int(torch.multinomial(torch.tensor(list(SCHEDULES.values())), 1, generator=g))
        ]
        styled = bool(styles) and torch.rand(1, generator=g).item() < STYLED
        one = data[1 + int(torch.randint(len(styles), (1,), generator=g))] if styled else data[0]
        states, pooled, text_ids = one["text"]
        pick = torch.randint(len(one["noise"]), (batch,), generator=g)
        use_weights(layers, one["weights"])
        made = sample_latents(
            pipe,
            one["noise"][pick].to(device),
            (states[pick % len(states)], pooled[pick % len(states)], text_ids),
            steps,
        )
        mse = (made - one["latents"][pick].to(device)).square().mean(dim=(1, 2))
        # decibels, in effect: each image counts alike, whether it is easy or not, in many steps or few
        trainer.step(mse.log().mean(), learning_rate(trainer.images, images, lr), batch)
        losses[steps, styled].append(mse.detach().sqrt().mean().item())
        if sum(len(each) for each in losses.values()) == 100:
            means = {n: sum(each) / max(1, len(each)) for n, each in losses.items()}
            trainer.curve.append((trainer.images, means[4, False]))
            rate = (trainer.images - at_start) / (time.time() - started)
            shown = ", ".join(f"{n} steps{' styled' * s} {mean:.4f}" for (n, s), mean in means.items())
            print(f"images {trainer.images} error with {shown}; {rate:.1f} images/s", flush=True)
            losses = new_losses()
            trainer.save()
    trainer.save()

    for parameter, average in zip(trainer.params, trainer.ema, strict=True):
        parameter.data.copy_(average)
    state = {
        f"transformer.{k}": v.to(torch.float16).contiguous()
        for k, v in get_peft_model_state_dict(pipe.transformer).items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        state,
        out,
        metadata={
            "modelspec.title": "few-step for int8run's tiny model",
            "modelspec.architecture": "int8run-tiny/lora",
            "modelspec.usage_hint": HINT,
            "modelspec.license": "MIT (Fluent Emoji, Microsoft Corporation)",
            "ss_base_model_version": "int8run-tiny",
        },
    )
    print(f"{out}: {out.stat().st_size / 1e3:.0f} KB, {len(state) // 2} modules")


def new_losses() -> dict[tuple[int, bool], list[float]]:
    """An empty list for every number of steps, without and with a style."""
    return {(n, styled): [] for styled in (False, True) for n in SCHEDULES}


def draw_strip(work: Path, loras: Path, few_step: Path, out: Path) -> None:
    """Draw ROWS in 16 steps, and in 4, 2 and 1 steps without and with the few-step LoRA."""
    trained = load_trained(work)
    trained.set_progress_bar_config(disable=True)
    columns: dict[str, list[Image.Image]] = {}
    for steps, strength in ((STEPS, 0.0), *((n, s) for n, best in STRENGTHS.items() for s in (0.0, best))):
        made = columns.setdefault(
            f"{steps} step{'s' * (steps > 1)}{f', few_step {strength:g}' * (strength > 0)}", []
        )
        for prompt, style in ROWS:
            pipe = copy.deepcopy(trained)
            if style is not None:
                apply_lora(pipe, loras / f"{style}.safetensors", 1.0)
            if strength > 0:
                apply_lora(pipe, few_step, strength)
            made.append(
                Image.fromarray(
                    generate_images(pipe, [prompt], 0, steps)[0].permute(1, 2, 0).contiguous().numpy()
                )
            )
    rows = [(prompt, [made[i] for made in columns.values()]) for i, (prompt, _) in enumerate(ROWS)]
    make_image_grid(rows, list(columns)).save(out)


def use_weights(layers: dict[str, nn.Module], weights: dict[str, Tensor]) -> None:
    """Put weights into the layers, without a copy."""
    for name, weight in weights.items():
        layers[name].weight.data = weight


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
    parser.add_argument("--strip", type=Path, help="the picture to draw")
    args = vars(parser.parse_args())
    picture = args.pop("strip")
    train(**args)
    if picture is not None:
        draw_strip(args["work"], args["loras"], args["out"], picture)
