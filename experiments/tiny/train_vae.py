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


def train(work: Path, steps: int, batch: int, lr: float, device: str) -> None:
    _, pictures = load_drawings(work)
    x_all = torch.cat([pictures[s] for s in STYLES])
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG).to(device)
    ema = copy.deepcopy(vae).requires_grad_(False)
    opt = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    done, curve, path = 0, [], work / "vae.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        vae.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        done, curve = state["step"], state["curve"]

    started, running = time.time(), 0.0
    for step in range(done, steps):
        warm, left = min(1.0, (step + 1) / 200), (steps - step) / steps
        for group in opt.param_groups:
            group["lr"] = lr * warm * min(1.0, left / 0.3)
        g = torch.Generator().manual_seed(step)
        x = to_float(x_all[torch.randint(len(x_all), (batch,), generator=g)]).to(device)
        posterior = vae.encode(x).latent_dist
        loss = reconstruction_loss(vae.decode(posterior.sample()).sample, x)
        (loss + KL_WEIGHT * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(vae.parameters()), 1 - decay)
        running += loss.item()
        if (step + 1) % 200 == 0:
            curve.append((step + 1, running / 200))
            running = 0.0
            print(f"step {step + 1} loss {curve[-1][1]:.4f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            state = {
                "model": vae.state_dict(),
                "ema": ema.state_dict(),
                "opt": opt.state_dict(),
                "step": step + 1,
                "curve": curve,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(**vars(parser.parse_args()))
