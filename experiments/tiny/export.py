"""Write the trained base model as a diffusers FluxPipeline folder in float16.

python experiments/tiny/export.py --work work --out int8run/assets/tiny
"""

import argparse
import shutil
from pathlib import Path

import torch
from data import load_drawings, make_caption
from diffusers import FluxPipeline
from pipeline import build_pipeline, collect_trained_parts
from train import encode_images, fit_latent_scale, load_vae

# no single file of the repository should be larger
MAX_SHARD = "15MB"


def load_trained(work: Path) -> FluxPipeline:
    """The pipeline with the EMA weights of `<work>/base.pt`."""
    names, images = load_drawings(work)
    vae = load_vae(work)
    fit_latent_scale(vae, encode_images(vae, images["flat"]))
    pipe = build_pipeline([make_caption(name) for name in names], vae, work)
    modules = collect_trained_parts(pipe)
    ema = torch.load(work / "base.pt", weights_only=True, map_location="cpu")["ema"]
    missing, unexpected = modules.load_state_dict(ema, strict=False)
    parameters = {name for name, _ in modules.named_parameters()}
    assert not unexpected and not parameters & set(missing), (
        "base.pt does not fit the model; was pipeline.py changed?"
    )
    return pipe


def export_model(work: Path, out: Path) -> None:
    """Write the pipeline in float16, in place of what the folder has."""
    shutil.rmtree(out, ignore_errors=True)
    pipe = load_trained(work).to(torch.float16)
    pipe.save_pretrained(out, safe_serialization=True, max_shard_size=MAX_SHARD)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    export_model(**vars(parser.parse_args()))
