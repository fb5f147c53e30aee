"""Train the tiny VAE: 64x64x3 <-> 16x16x8, on every drawing in every style.

    python experiments/tiny/train_vae.py --work work --steps 8000

Resumes from `<work>/vae.pt`. Leaves the weights, the EMA weights and the loss curve there.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import STYLES, load_drawings, to_float
from diffusers import AutoencoderKL

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=8,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    sample_size=64,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
KL_WEIGHT = 1e-6


def reconstruction_loss(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 plus L1 of the image's differences: flat drawings live from their edges. Both [B, 3, H, W]."""
    edges = sum(F.l1_loss(out.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(out, x) + F.mse_loss(out, x) + edges


class VaeTrainer:
    """The VAE, its EMA, optimiser and curve, with save and resume in one file."""

    def __init__(self, path: Path, lr: float, device: str):
        torch.manual_seed(0)
        self.path = path
        self.peak_lr = lr
        self.vae = AutoencoderKL(**CONFIG).to(device)
        self.ema = copy.deepcopy(self.vae).requires_grad_(requires_grad=False)
        self.opt = torch.optim.AdamW(self.vae.parameters(), lr=lr, weight_decay=1e-4)
        self.done = 0
        self.curve: list[tuple[int, float]] = []
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=device)
            self.vae.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.opt.load_state_dict(state["opt"])
            self.done = state["step"]
            self.curve = state["curve"]

    def save(self) -> None:
        """Write the state, in place of the file that there is."""
        state = {
            "model": self.vae.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.opt.state_dict(),
            "step": self.done,
            "curve": self.curve,
        }
        unfinished = self.path.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(self.path)

    def step(self, x: torch.Tensor, steps: int) -> float:
        """One step of `steps` on images [B, 3, H, W] in -1..1. Returns the reconstruction's loss."""
        warm = min(1.0, (self.done + 1) / 200)
        left = min(1.0, (steps - self.done) / steps / 0.3)
        for group in self.opt.param_groups:
            group["lr"] = self.peak_lr * warm * left
        posterior = self.vae.encode(x).latent_dist
        loss = reconstruction_loss(self.vae.decode(posterior.sample()).sample, x)
        (loss + KL_WEIGHT * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.done += 1
        decay = min(0.999, self.done / (self.done + 9))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.vae.parameters()), 1 - decay)
        return loss.item()


def train(work: Path, steps: int, batch: int, lr: float, device: str) -> None:
    """Train until so many steps are done in all, those of earlier runs included.

    Args:
        work: has the drawings; gets `vae.pt`.
        steps: in all.
        batch: images of a step.
        lr: the highest learning rate.
        device: where to train.
    """
    _, drawings = load_drawings(work)
    images = torch.cat([drawings[style] for style in STYLES])
    trainer = VaeTrainer(work / "vae.pt", lr, device)
    started = time.time()
    running = 0.0
    while trainer.done < steps:
        generator = torch.Generator().manual_seed(trainer.done)
        pick = torch.randint(len(images), (batch,), generator=generator)
        running += trainer.step(to_float(images[pick]).to(device), steps)
        done = trainer.done
        if done % 200 == 0:
            trainer.curve.append((done, running / 200))
            running = 0.0
            print(f"step {done} loss {trainer.curve[-1][1]:.4f} {time.time() - started:.0f} s", flush=True)
        if done % 1000 == 0 or done == steps:
            trainer.save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(**vars(parser.parse_args()))
