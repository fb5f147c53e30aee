"""Building a full-size model for a run from a float checkpoint that is never in memory: time and peak memory.

    python experiments/streaming/make_flux.py CHECKPOINT
    python experiments/streaming/build.py CHECKPOINT WORK [--device cuda] [--size 256] [int8run's words ...]

Puts random text encoders of one layer and a VAE of a few kilobytes around the checkpoint, so that the
denoiser is all there is to measure, and runs `int8run metrics.baseline=none` on it: one step, one picture.
Resident memory is sampled every 20 ms; on a GPU the run's own `memory/peak_bytes` counts what torch
allocated there.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from measure import watch_process
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from int8run.models.resolve_weights import ASSETS_FOLDER
from int8run.utils.hardware import get_device_name

COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make_pipeline_folder(checkpoint: Path, folder: Path) -> None:
    """A diffusers folder whose transformer is a link to the checkpoint."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers = {
        name: AutoTokenizer.from_pretrained(ASSETS_FOLDER / "tiny" / name)
        for name in ("tokenizer", "tokenizer_2")
    }
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizers["tokenizer"]),
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=12,
        projection_dim=768,
    )
    t5 = T5Config(
        vocab_size=len(tokenizers["tokenizer_2"]),
        d_model=4096,
        d_kv=64,
        d_ff=64,
        num_layers=1,
        num_heads=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    CLIPTextModel(clip).bfloat16().save_pretrained(folder / "text_encoder")
    T5EncoderModel(t5).bfloat16().save_pretrained(folder / "text_encoder_2")
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bfloat16().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(
        folder / "scheduler"
    )
    link = folder / "transformer"
    if not link.exists():
        link.symlink_to(checkpoint.absolute())
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", **COMPONENTS}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=256, help="height and width of the picture, in pixels")
    arguments, words = parser.parse_known_args()
    make_pipeline_folder(arguments.checkpoint, arguments.work / "model")
    out = arguments.work / "out"
    command = [
        "int8run",
        "model=flux",
        f"model.location={arguments.work / 'model'}",
        "metrics.baseline=none",
        "sampler.steps=1",
        f"sampler.height={arguments.size}",
        f"sampler.width={arguments.size}",
        "prompts.prompts=[fox]",
        f"device={arguments.device}",
        "~model.sampling.extra",
        "+model.sampling.extra={max_sequence_length: 16}",
        "tracker=none",
        "progress=false",
        "cache.limit_gb=0",
        f"hydra.run.dir={out}",
        *words,
    ]
    watched = watch_process(command)
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    size = sum(os.path.getsize(file) for file in arguments.checkpoint.glob("*.safetensors"))
    print(
        json.dumps(
            {
                "device": get_device_name(torch.device(arguments.device)),
                "torch": torch.__version__,
                "checkpoint_bytes": size,
                **watched,
                **{
                    name: metrics[name]
                    for name in sorted(metrics)
                    if name.startswith(("build/", "memory/", "speed/step", "quant/layers"))
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
