"""Train the tiny FLUX transformer with its two text encoders on the flat drawings, by flow matching.

    # CPU: a few hundred names
    python experiments/tiny/train.py --work work --images 400000
    python experiments/tiny/train.py --work work --images 4000000 --categories all     # GPU: every name

Needs the VAE of `train_vae.py`. Resumes from `<work>/base.pt`; a resumed run may ask for more images. The
learning rate is constant and falls to zero over the last quarter, so `--images` may grow between restarts.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import CATEGORIES, load_drawings, make_caption, pick_names, to_float
from diffusers import AutoencoderKL, FluxPipeline
from pipeline import build_pipeline, collect_trained_parts, encode_captions
from torch import Tensor, nn
from train_vae import CONFIG

CAPTION_DROPOUT, CAPITALISED = 0.1, 0.1


def vary_caption(text: str, dice: float) -> str:
    """Drop a caption (so that guidance has an unconditional model) or capitalise it, as people type.

    Dice: uniform in 0..1.
    """
    if dice < CAPTION_DROPOUT:
        return ""
    if dice < CAPTION_DROPOUT + CAPITALISED:
        return text.capitalize()
    return text


def load_vae(work: Path) -> AutoencoderKL:
    """The trained VAE (EMA weights), frozen."""
    vae = AutoencoderKL(**CONFIG)
    state = torch.load(work / "vae.pt", weights_only=True, map_location="cpu")
    vae.load_state_dict(state["ema"])
    return vae.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> latents [N, C, h, w], not yet scaled."""
    return torch.cat([vae.encode(to_float(p)).latent_dist.mode() for p in images.split(64)])


def fit_latent_scale(vae: AutoencoderKL, latents: Tensor) -> None:
    """Note in the VAE's config what brings these latents to mean 0 and deviation 1."""
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def scale_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The normalisation that the pipeline undoes before decoding."""
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4C], as FluxPipeline does."""
    b, c, h, w = latents.shape
    return FluxPipeline._pack_latents(latents, b, c, h, w)


def sample_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in (0, 1).

    Logit-normal towards high noise, where a caption decides the image; 10 % uniform.
    """
    normal = torch.sigmoid(torch.randn(count, generator=generator) + 0.5)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.1, uniform, normal)


def flow_loss(
    pipe: FluxPipeline, x0: Tensor, captions: list[str], generator: torch.Generator, *, train_text: bool
) -> Tensor:
    """Flow matching (arXiv:2210.02747): predict noise - x0 at x = (1 - sigma) x0 + sigma noise.

    Args:
        pipe: the model.
        x0: packed latents of the images, [B, 64, 32].
        captions: B texts.
        generator: of the noise and its levels.
        train_text: let gradients into the text encoders.
    """
    device = x0.device
    sigma = sample_sigma(len(x0), generator).to(device)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    s = sigma[:, None, None]
    with torch.autocast(device.type, torch.bfloat16):
        states, pooled, text_ids = encode_captions(pipe, captions, grad=train_text)
        side = int(x0.shape[1] ** 0.5)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
        velocity = pipe.transformer(
            hidden_states=(1 - s) * x0 + s * noise,
            timestep=sigma,
            guidance=None,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=text_ids.float(),
            img_ids=image_ids,
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - x0)).pow(2).mean()


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a run trains.

    Attributes:
        images: seen in all, those of earlier runs included.
        batch: images of a step.
        peak: the highest learning rate.
    """

    images: int
    batch: int
    peak: float

    def learning_rate(self, done: int) -> float:
        """Warm up over the first twentieth, stay, and fall linearly to zero over the last quarter.

        `done` counts images, as all of the schedule does.
        """
        warm = min(1.0, (done + 1) / (0.05 * self.images))
        left = min(1.0, (self.images - done) / (0.25 * self.images))
        return self.peak * warm * left


@dataclass(frozen=True)
class Examples:
    """What a model learns from.

    Attributes:
        latents: of the images, scaled and packed, [N, 64, 32].
        captions: N texts.
    """

    latents: Tensor
    captions: list[str]


class Trainer:
    """Parameters, optimiser, EMA and curve of one run, with save and resume in one file."""

    def __init__(self, path: Path, modules: nn.ModuleDict, names: list[str], ema_half_life: int):
        self.path = path
        self.names = names
        self.half_life = ema_half_life
        trained = {key: value for key, value in modules.named_parameters() if value.requires_grad}
        self.keys = list(trained)
        self.params = list(trained.values())
        self.ema = [param.detach().clone() for param in self.params]
        self.opt = torch.optim.AdamW(self.params, lr=0.0, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        self.images = 0
        self.curve: list[tuple[int, float]] = []
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        assert state["names"] == self.names, (
            f"{self.path} was trained on other names; use another --work or the same --categories"
        )
        for param, average, key in zip(self.params, self.ema, self.keys, strict=True):
            param.data.copy_(state["model"][key])
            average.copy_(state["ema"][key])
        self.opt.load_state_dict(state["opt"])
        self.images = state["images"]
        self.curve = state["curve"]
        print(f"resumed at {self.images} images", flush=True)

    def save(self) -> None:
        """Write what `_resume` reads, in place of the file that there is."""
        detached = [param.detach() for param in self.params]
        state = {
            "model": dict(zip(self.keys, detached, strict=True)),
            "ema": dict(zip(self.keys, self.ema, strict=True)),
            "opt": self.opt.state_dict(),
            "names": self.names,
            "images": self.images,
            "curve": self.curve,
        }
        unfinished = self.path.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(self.path)

    def step(self, loss: Tensor, lr: float, batch: int) -> None:
        """Follow the gradient of a loss over `batch` images, and the average follows."""
        for group in self.opt.param_groups:
            group["lr"] = lr
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.images += batch
        # the average follows young weights quickly and old ones slowly
        decay = 0.5 ** (batch / min(self.half_life, self.images / 10))
        torch._foreach_lerp_(self.ema, [param.detach() for param in self.params], 1 - decay)

    def use_average(self) -> None:
        """Put the averaged weights into the model, for good."""
        for param, average in zip(self.params, self.ema, strict=True):
            param.data.copy_(average)


def fit_model(
    trainer: Trainer, pipe: FluxPipeline, examples: Examples, schedule: Schedule, *, train_text: bool
) -> None:
    """The loop shared by the base model and the LoRAs.

    Each batch is drawn anew from all examples; a line and a checkpoint now and then.
    """
    started = time.time()
    at_start = trainer.images
    count = len(examples.captions)
    losses = []
    while trainer.images < schedule.images:
        generator = torch.Generator().manual_seed(trainer.images)
        pick = torch.randperm(count, generator=generator)[: schedule.batch]
        dice = torch.rand(len(pick), generator=generator)
        captions = [examples.captions[i] for i in pick.tolist()]
        texts = [vary_caption(caption, d) for caption, d in zip(captions, dice.tolist(), strict=True)]
        loss = flow_loss(pipe, examples.latents[pick], texts, generator, train_text=train_text)
        trainer.step(loss, schedule.learning_rate(trainer.images), len(pick))
        losses.append(loss.item())
        if len(losses) == 50:
            trainer.curve.append((trainer.images, sum(losses) / len(losses)))
            rate = (trainer.images - at_start) / (time.time() - started)
            print(f"images {trainer.images} loss {trainer.curve[-1][1]:.4f} {rate:.1f} images/s", flush=True)
            losses = []
            if len(trainer.curve) % 2 == 0:
                trainer.save()
    trainer.save()


def train_model(work: Path, categories: tuple[str, ...], schedule: Schedule, device: str) -> None:
    """Train the transformer and both text encoders on the flat drawings of some categories.

    Args:
        work: has the VAE; gets `base.pt`.
        categories: of emoji, or ("all",).
        schedule: images, batch and learning rate.
        device: where to train.
    """
    names, images = load_drawings(work)
    vae = load_vae(work)
    latents = encode_images(vae, images["flat"])
    fit_latent_scale(vae, latents)
    chosen = pick_names(work, names, categories)
    pipe = build_pipeline([make_caption(name) for name in names], vae, work).to(device)
    modules = collect_trained_parts(pipe).train()
    chosen_names = [names[i] for i in chosen]
    trainer = Trainer(work / "base.pt", modules, chosen_names, ema_half_life=20_000)
    x0 = pack_latents(scale_latents(vae, latents[chosen])).to(device)
    examples = Examples(x0, [make_caption(name) for name in chosen_names])
    fit_model(trainer, pipe, examples, schedule, train_text=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True, help="images seen in all, earlier runs included")
    parser.add_argument("--categories", nargs="+", default=CATEGORIES, help="emoji categories, or: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    schedule = Schedule(args.images, args.batch, peak=args.lr)
    train_model(args.work, tuple(args.categories), schedule, args.device)
