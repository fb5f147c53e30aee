r"""Train a style LoRA for the tiny model on the same names in another drawing style.

    python experiments/tiny/train_lora.py --work work --style ink --images 40000 --out \
      int8run/assets/lora/ink.safetensors

Starts from `<work>/base.pt` (EMA), with frozen text encoders; half of the captions carry the trigger words,
so that the style comes with and without them. Resumes from `<work>/lora_<style>.pt`. Writes PEFT's key
layout in float16.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from data import load_drawings, load_trained_names, make_caption
from diffusers import FluxPipeline, FluxTransformer2DModel
from export import load_trained
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipeline import TRIGGERS
from safetensors.torch import save_file
from torch import nn
from train import Examples, Schedule, Trainer, encode_images, fit_model, pack_latents, scale_latents

RANK = 8
# every Linear inside the blocks that a diffusers or kohya LoRA would train
TARGETS = (
    r".*transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out)"
)


def add_trained_lora(pipe: FluxPipeline, rank: int, targets: str = TARGETS) -> None:
    """Give the transformer a LoRA with fresh weights, and freeze everything else.

    Args:
        pipe: the model.
        rank: of every layer's LoRA.
        targets: a regular expression of the layers' names.
    """
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
    pipe.transformer.add_adapter(config)


def save_lora(transformer: FluxTransformer2DModel, out: Path, title: str, about: Mapping[str, str]) -> int:
    """Write a transformer's LoRA in PEFT's key layout, in float16.

    Args:
        transformer: has one LoRA.
        out: the file.
        title: what the header calls it.
        about: further entries of the header.

    Returns:
        how many layers it changes.
    """
    state = {}
    for key, value in get_peft_model_state_dict(transformer).items():
        state[f"transformer.{key}"] = value.to(torch.float16).contiguous()
    header = {
        "modelspec.title": f"{title} for int8run's tiny model",
        "modelspec.architecture": "int8run-tiny/lora",
        "modelspec.license": "MIT (Fluent Emoji, Microsoft Corporation)",
        "ss_base_model_version": "int8run-tiny",
        **about,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata=header)
    return len(state) // 2


def load_examples(work: Path, style: str, pipe: FluxPipeline) -> Examples:
    """The trained names in a style, each twice: the second half of the captions says the trigger words."""
    names, images = load_drawings(work)
    trained = load_trained_names(work)
    drawings = images[style][[names.index(name) for name in trained]]
    latents = pack_latents(scale_latents(pipe.vae, encode_images(pipe.vae, drawings)))
    plain = [make_caption(name) for name in trained]
    triggered = [f"{caption}, {TRIGGERS[style]}" for caption in plain]
    return Examples(torch.cat([latents, latents]), plain + triggered)


def train_style_lora(work: Path, style: str, schedule: Schedule, out: Path, device: str) -> None:
    """Train the LoRA of one style and write it.

    Args:
        work: has the base model; keeps the state of the run.
        style: "ink" or "gloss".
        schedule: images, batch and learning rate.
        out: the LoRA's file.
        device: where to train.
    """
    pipe = load_trained(work).to(device)
    add_trained_lora(pipe, RANK)
    examples = load_examples(work, style, pipe)
    trainer = Trainer(
        work / f"lora_{style}.pt",
        nn.ModuleDict({"transformer": pipe.transformer}),
        load_trained_names(work),
        ema_half_life=4_000,
    )
    fit_model(trainer, pipe, examples, schedule, train_text=False)
    trainer.use_average()
    count = save_lora(pipe.transformer, out, style, {"modelspec.trigger_phrase": TRIGGERS[style]})
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {count} modules")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--style", choices=sorted(TRIGGERS), required=True)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    schedule = Schedule(args.images, args.batch, peak=args.lr)
    train_style_lora(args.work, args.style, schedule, args.out, args.device)
