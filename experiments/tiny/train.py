"""Train the tiny FLUX transformer with its two text encoders on the flat drawings, by flow matching.

    # CPU: a few hundred names
    python experiments/tiny/train.py --work work --images 400000
    python experiments/tiny/train.py --work work --images 4000000 --categories all     # GPU: every name

Needs the VAE of `train_vae.py`. Resumes from `<work>/base.pt`; a resumed run may ask for more images. The
learning rate is constant and falls to zero over the last quarter, so `--images` may grow between restarts.
"""

import argparse
import time
from pathlib import Path

import torch
from data import CATEGORIES, load_drawings, make_caption, pick_names, to_float
from diffusers import AutoencoderKL, FluxPipeline
from pipeline import build_pipeline, encode_captions
from torch import Tensor, nn
from train_vae import CONFIG

CAPTION_DROPOUT, CAPITALISED = 0.1, 0.1


def vary_caption(text: str, dice: float) -> str:
    """Drop a caption (so that guidance has an unconditional model) or capitalise it, as people type.

    Dice: uniform in 0..1.
    """
    if dice < CAPTION_DROPOUT:
        return ""
    return text.capitalize() if dice < CAPTION_DROPOUT + CAPITALISED else text


def load_vae(work: Path) -> AutoencoderKL:
    """The trained VAE (EMA weights), frozen."""
    vae = AutoencoderKL(**CONFIG)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True, map_location="cpu")["ema"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> latents [N, C, h, w], not yet scaled."""
    return torch.cat([vae.encode(to_float(p)).latent_dist.mode() for p in pictures.split(64)])


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
    pipe: FluxPipeline, x0: Tensor, captions: list[str], generator: torch.Generator, train_text: bool
) -> Tensor:
    """Flow matching (Lipman et al.

    2022; rectified flow): predict noise - x0 at x = (1 - sigma) x0 + sigma noise. x0: packed.
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


def learning_rate(done: int, images: int, peak: float) -> float:
    """Warm up over the first twentieth, stay, and fall linearly to zero over the last quarter.

    Counted in images.
    """
    return peak * min(1.0, (done + 1) / (0.05 * images)) * min(1.0, (images - done) / (0.25 * images))


class Trainer:
    """Parameters, optimiser, EMA and curve of one run, with save and resume in one file."""

    def __init__(self, path: Path, modules: nn.ModuleDict, names: list[str], ema_half_life: int):
        self.path, self.modules, self.names, self.half_life = path, modules, names, ema_half_life
        self.params = [p for p in modules.parameters() if p.requires_grad]
        self.keys = [n for n, p in modules.named_parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.params]
        self.opt = torch.optim.AdamW(self.params, lr=0.0, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        self.images, self.curve = 0, []
        if path.exists():
            state = torch.load(path, weights_only=True, map_location="cpu")
            assert state["names"] == names, (
                f"{path} was trained on other names; use another --work or the same --categories"
            )
            for p, e, key in zip(self.params, self.ema, self.keys, strict=True):
                p.data.copy_(state["model"][key])
                e.copy_(state["ema"][key])
            self.opt.load_state_dict(state["opt"])
            self.images, self.curve = state["images"], state["curve"]
            print(f"resumed at {self.images} images", flush=True)

    def save(self) -> None:
        weights = lambda tensors: dict(zip(self.keys, (t.detach() for t in tensors), strict=True))  # noqa: E731
        state = dict(
            model=weights(self.params),
            ema=weights(self.ema),
            opt=self.opt.state_dict(),
            names=self.names,
            images=self.images,
            curve=self.curve,
        )
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)

    def step(self, loss: Tensor, lr: float, batch: int) -> None:
        for group in self.opt.param_groups:
            group["lr"] = lr
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.images += batch
        # the average follows young weights quickly and old ones slowly
        decay = 0.5 ** (batch / min(self.half_life, self.images / 10))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)


def fit_model(
    trainer: Trainer,
    pipe: FluxPipeline,
    x0: Tensor,
    captions: list[str],
    images: int,
    batch: int,
    lr: float,
    train_text: bool,
) -> None:
    """The loop shared by the base model and the LoRAs.

    Whole shuffled epochs, a line and a checkpoint now and then.
    """
    started, at_start, losses = time.time(), trainer.images, []
    while trainer.images < images:
        g = torch.Generator().manual_seed(trainer.images)
        pick = torch.randperm(len(x0), generator=g)[: min(batch, len(x0))]
        dice = torch.rand(len(pick), generator=g)
        texts = [vary_caption(captions[i], d) for i, d in zip(pick.tolist(), dice.tolist(), strict=True)]
        loss = flow_loss(pipe, x0[pick], texts, g, train_text)
        trainer.step(loss, learning_rate(trainer.images, images, lr), len(pick))
        losses.append(loss.item())
        if len(losses) == 50:
            trainer.curve.append((trainer.images, sum(losses) / len(losses)))
            rate = (trainer.images - at_start) / (time.time() - started)
            print(f"images {trainer.images} loss {trainer.curve[-1][1]:.4f} {rate:.1f} images/s", flush=True)
            losses = []
            if len(trainer.curve) % 2 == 0:
                trainer.save()
    trainer.save()


def train_model(
    work: Path, images: int, categories: tuple[str, ...], batch: int, lr: float, device: str
) -> None:
    names, pictures = load_drawings(work)
    vae = load_vae(work)
    latents = encode_pictures(vae, pictures["flat"])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    chosen = pick_names(work, names, categories)
    pipe = build_pipeline([make_caption(n) for n in names], vae, work).to(device)
    modules = nn.ModuleDict(
        {n: getattr(pipe, n) for n in ("transformer", "text_encoder", "text_encoder_2")}
    ).train()
    trainer = Trainer(work / "base.pt", modules, [names[i] for i in chosen], ema_half_life=20_000)
    x0 = pack_latents(scale_latents(vae, latents[chosen])).to(device)
    fit_model(trainer, pipe, x0, [make_caption(names[i]) for i in chosen], images, batch, lr, train_text=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True, help="images seen in all, earlier runs included")
    parser.add_argument("--categories", nargs="+", default=CATEGORIES, help="emoji categories, or: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train_model(**{**vars(args), "categories": tuple(args.categories)})
