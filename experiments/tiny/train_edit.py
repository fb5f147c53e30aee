r"""Train a LoRA that makes the tiny model edit an image, as FLUX.1 Kontext does.

    python experiments/tiny/train_edit.py --work work --images 100000 --out \
      int8run/assets/lora/edit.safetensors

The input image's latents follow those of the result in the sequence, with 1 as the first coordinate of their
position (`FluxKontextPipeline`). Text encoders and VAE are the shipped model's and stay as they are, so
everything that they compute is computed once and kept in `<work>/edit_latents.pt`. Resumes from
`<work>/edit.pt`; a resumed run may ask for more images, and `--images` of those seen writes what there is.
Writes PEFT's key layout in float16.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import load_drawings
from diffusers import FluxPipeline
from edits import PROMPTS, apply_edit, list_held_out, list_shares, mirror_all
from pipeline import encode_captions
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train import Schedule, Trainer, encode_images, pack_latents, sample_sigma, scale_latents
from train_lora import TARGETS, add_trained_lora, save_lora

SHIPPED = Path(__file__).parents[2] / "int8run" / "assets" / "tiny"
RANK = 64
# the modulations too: through them a prompt reaches every layer
EDIT_TARGETS = TARGETS.removesuffix(")") + r"|norm\.linear|norm1\.linear|norm1_context\.linear)"
CAPITALISED = 0.1


@dataclass(frozen=True)
class Pairs:
    """All that is trained on, as the transformer sees it.

    Attributes:
        sources: latents of the flat drawings, scaled and packed, [N, 64, 32] float16.
        targets: what each edit makes of them, [edits, N, 64, 32] float16, in the order of PROMPTS.
        states: T5 states of the prompts, [P, TOKENS, C].
        pooled: CLIP's vectors of the prompts, [P, C].
        prompts_of: positions among the P prompts, by edit.
        shares: how often each edit is trained, [edits].
    """

    sources: Tensor
    targets: Tensor
    states: Tensor
    pooled: Tensor
    prompts_of: list[list[int]]
    shares: Tensor


@dataclass(frozen=True)
class Batch:
    """B edits: packed latents of source and target, [B, 64, 32], and the prompt's states and vector."""

    source: Tensor
    target: Tensor
    states: Tensor
    pooled: Tensor


def encode_drawings(work: Path, pipe: FluxPipeline) -> tuple[list[str], Tensor, Tensor]:
    """Latents of all drawings that may be trained on, mirrored ones too, computed once.

    Returns:
        the trained names, and sources and targets as in Pairs.
    """
    cache = work / "edit_latents.pt"
    if not cache.exists():
        names, images = load_drawings(work)
        held_out = set(list_held_out(len(names)))
        chosen = [i for i in range(len(names)) if i not in held_out]
        trained = {style: drawings[chosen] for style, drawings in images.items()}

        def encode(images: Tensor) -> Tensor:
            latents = scale_latents(pipe.vae, encode_images(pipe.vae, images))
            return pack_latents(latents).to(torch.float16)

        both = (trained, mirror_all(trained))
        sources = torch.cat([encode(drawings["flat"]) for drawings in both])
        targets = [torch.cat([encode(apply_edit(edit, drawings)) for drawings in both]) for edit in PROMPTS]
        saved = {
            "names": [names[i] for i in chosen],
            "sources": sources,
            "targets": torch.stack(targets),
        }
        torch.save(saved, cache)
    saved = torch.load(cache, weights_only=True)
    return saved["names"], saved["sources"], saved["targets"]


def encode_prompts(pipe: FluxPipeline) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Every prompt, and every prompt capitalised: states, pooled vectors and prompts_of of Pairs."""
    texts: list[str] = []
    prompts_of = []
    for prompts in PROMPTS.values():
        first = len(texts)
        texts += list(prompts) + [prompt.capitalize() for prompt in prompts]
        prompts_of.append(list(range(first, len(texts))))
    states, pooled, _ = encode_captions(pipe, texts)
    return states, pooled, prompts_of


def draw_batch(pairs: Pairs, size: int, generator: torch.Generator) -> Batch:
    """Edits of drawings, each of them any, and prompts that ask for them, mostly not capitalised."""
    edits = torch.multinomial(pairs.shares, size, replacement=True, generator=generator)
    drawings = torch.randint(len(pairs.sources), (size,), generator=generator)
    chosen = []
    for edit, dice in zip(edits.tolist(), torch.rand(size, 2, generator=generator).tolist(), strict=True):
        prompts = pairs.prompts_of[edit]
        half = len(prompts) // 2
        position = int(dice[0] * half)
        if dice[1] < CAPITALISED:
            position += half
        chosen.append(prompts[position])
    return Batch(
        source=pairs.sources[drawings].float(),
        target=pairs.targets[edits, drawings].float(),
        states=pairs.states[chosen],
        pooled=pairs.pooled[chosen],
    )


def make_position_ids(side: int) -> Tensor:
    """Positions of the result's tokens, and of the reference's behind them: FluxKontextPipeline's."""
    own = FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)
    reference = own.clone()
    reference[..., 0] = 1
    return torch.cat([own, reference])


def edit_loss(transformer: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Flow matching as in train.py, with the clean source behind the noisy target."""
    device = next(transformer.parameters()).device
    target, source = batch.target.to(device), batch.source.to(device)
    sigma = sample_sigma(len(target), generator).to(device)
    noise = torch.randn(target.shape, generator=generator).to(device)
    s = sigma[:, None, None]
    noisy = (1 - s) * target + s * noise
    tokens = target.shape[1]
    # for so few tokens the fused attention of a CPU is slow backwards
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = transformer(
            hidden_states=torch.cat([noisy, source], dim=1),
            timestep=sigma,
            guidance=None,
            pooled_projections=batch.pooled.to(device),
            encoder_hidden_states=batch.states.to(device),
            txt_ids=torch.zeros(batch.states.shape[1], 3, device=device),
            img_ids=make_position_ids(int(tokens**0.5)).to(device),
            return_dict=False,
        )[0]
    return (velocity[:, :tokens].float() - (noise - target)).pow(2).mean()


def fit_edits(trainer: Trainer, transformer: nn.Module, pairs: Pairs, schedule: Schedule) -> None:
    """Train until `schedule.images` are seen, with a line and a checkpoint now and then."""
    started = time.time()
    at_start = trainer.images
    losses: list[float] = []
    while trainer.images < schedule.images:
        generator = torch.Generator().manual_seed(trainer.images)
        loss = edit_loss(transformer, draw_batch(pairs, schedule.batch, generator), generator)
        trainer.step(loss, schedule.learning_rate(trainer.images), schedule.batch)
        losses.append(loss.item())
        if len(losses) == 50:
            trainer.curve.append((trainer.images, sum(losses) / len(losses)))
            rate = (trainer.images - at_start) / (time.time() - started)
            print(f"images {trainer.images} loss {trainer.curve[-1][1]:.4f} {rate:.1f} images/s", flush=True)
            losses = []
            trainer.save()
    trainer.save()


def load_model() -> FluxPipeline:
    """The shipped model in float32, with a fresh LoRA."""
    pipe = FluxPipeline.from_pretrained(SHIPPED, dtype=torch.float32)
    torch.manual_seed(0)
    add_trained_lora(pipe, RANK, EDIT_TARGETS)
    return pipe


def train_edit_lora(work: Path, schedule: Schedule, style_share: float, out: Path, device: str) -> None:
    """Train the LoRA and write it.

    Args:
        work: has the drawings; keeps the state of the run.
        schedule: images, batch and learning rate.
        style_share: how often an edit is a style, 0 to 1.
        out: the LoRA's file.
        device: where to train.
    """
    pipe = load_model()
    names, sources, targets = encode_drawings(work, pipe)
    states, pooled, prompts_of = encode_prompts(pipe)
    pairs = Pairs(sources, targets, states, pooled, prompts_of, list_shares(style_share))
    transformer = pipe.transformer.to(device)
    trainer = Trainer(
        work / "edit.pt", nn.ModuleDict({"transformer": transformer}), names, ema_half_life=4_000
    )
    fit_edits(trainer, transformer, pairs, schedule)
    trainer.use_average()
    count = save_lora(transformer, out, "edit", {"modelspec.usage_hint": "with FluxKontextPipeline"})
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {count} modules")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--style-share", type=float, default=0.5, help="how often an edit is a style")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    schedule = Schedule(args.images, args.batch, peak=args.lr)
    train_edit_lora(args.work, schedule, args.style_share, args.out, args.device)
