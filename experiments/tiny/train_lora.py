r"""Train a style LoRA for the tiny model on the same names in another drawing style.

    python experiments/tiny/train_lora.py --work work --style ink --images 40000 --out \
      int8run/assets/lora/ink.safetensors

Starts from `<work>/base.pt` (EMA), with frozen text encoders; half of the captions carry the trigger words,
so that the style comes with and without them. Resumes from `<work>/lora_<style>.pt`. Writes PEFT's key
layout in float16.
"""

import argparse
from pathlib import Path

import torch
from data import load_drawings, make_caption
from export import load_trained
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipeline import TRIGGERS
from safetensors.torch import save_file
from torch import nn
from train import Trainer, encode_pictures, fit_model, pack_latents, scale_latents

RANK = 8
# every Linear inside the blocks that a diffusers or kohya LoRA would train
TARGETS = (
    r".*transformer_blocks\.\d+\."
    r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2|proj_mlp|proj_out)"
)


def train_style_lora(
    work: Path, style: str, images: int, batch: int, lr: float, out: Path, device: str
) -> None:
    names, pictures = load_drawings(work)
    trained = torch.load(work / "base.pt", weights_only=True, map_location="cpu")["names"]
    index = [names.index(n) for n in trained]
    pipe = load_trained(work).to(device)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)
    pipe.transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian")
    )
    x0 = pack_latents(scale_latents(pipe.vae, encode_pictures(pipe.vae, pictures[style][index]))).to(device)
    # the second half of the data says the trigger words
    captions = [make_caption(n) for n in trained] + [f"{make_caption(n)}, {TRIGGERS[style]}" for n in trained]
    trainer = Trainer(
        work / f"lora_{style}.pt",
        nn.ModuleDict({"transformer": pipe.transformer}),
        list(trained),
        ema_half_life=4_000,
    )
    fit_model(trainer, pipe, torch.cat([x0, x0]), captions, images, batch, lr, train_text=False)

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
            "modelspec.title": f"{style} for int8run's tiny model",
            "modelspec.architecture": "int8run-tiny/lora",
            "modelspec.trigger_phrase": TRIGGERS[style],
            "modelspec.license": "MIT (Fluent Emoji, Microsoft Corporation)",
            "ss_base_model_version": "int8run-tiny",
        },
    )
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {len(state) // 2} modules")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--style", choices=sorted(TRIGGERS), required=True)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train_style_lora(**vars(parser.parse_args()))
