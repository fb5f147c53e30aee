"""Building a full-size model for a run from a float checkpoint that is never in memory: time and peak memory.

    python experiments/streaming/make_flux.py CHECKPOINT
    python experiments/streaming/build.py CHECKPOINT WORK [--device cuda] [--size 256] [int8run's words ...]

Puts random text encoders of one layer and a VAE of a few kilobytes around the checkpoint, so that the
denoiser is all there is to measure, and runs `int8run metrics.baseline=none` on it: one step, one image.
Resident memory is sampled every 20 ms; on a GPU the run's own `memory/peak_bytes` counts what torch
allocated there.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from measure import INT8RUN, watch_process
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from int8run.utils.hardware import get_device_name
from int8run.utils.paths import ASSETS_FOLDER

COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_tokenizers(folder: Path) -> tuple[int, int]:
    """Put the tiny model's tokenizers into the folder. Returns the sizes of CLIP's and T5's vocabulary."""
    sizes = []
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(ASSETS_FOLDER / "tiny" / name)
        tokenizer.save_pretrained(folder / name)
        sizes.append(len(tokenizer))
    return sizes[0], sizes[1]


def save_text_encoders(folder: Path, clip_vocabulary: int, t5_vocabulary: int) -> None:
    """Random encoders of one layer, as wide as FLUX needs them."""
    clip = CLIPTextConfig(
        vocab_size=clip_vocabulary,
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=12,
        projection_dim=768,
    )
    t5 = T5Config(
        vocab_size=t5_vocabulary,
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


def save_vae(folder: Path) -> None:
    """A random VAE with FLUX's latents and hardly any weights."""
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


def make_pipeline_folder(checkpoint: Path, folder: Path) -> None:
    """A diffusers folder whose transformer is a link to the checkpoint."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    clip_vocabulary, t5_vocabulary = save_tokenizers(folder)
    save_text_encoders(folder, clip_vocabulary, t5_vocabulary)
    save_vae(folder)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.save_pretrained(folder / "scheduler")
    link = folder / "transformer"
    if not link.exists():
        link.symlink_to(checkpoint.absolute())
    index = {"_class_name": "FluxPipeline", **COMPONENTS}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def run_once(arguments: argparse.Namespace, overrides: list[str], out: Path) -> dict[str, float]:
    """One image by int8run in a process of its own. Returns its seconds and peak memory."""
    command = [
        *INT8RUN,
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
        *overrides,
    ]
    return watch_process(command)


def read_reported_metrics(out: Path) -> dict[str, float]:
    """What the run itself measured of building, memory and steps."""
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    reported = ("build/", "memory/", "speed/step", "quant/layers")
    return {name: metrics[name] for name in sorted(metrics) if name.startswith(reported)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=256, help="height and width of the image, in pixels")
    arguments, overrides = parser.parse_known_args()
    make_pipeline_folder(arguments.checkpoint, arguments.work / "model")
    out = arguments.work / "out"
    watched = run_once(arguments, overrides, out)
    report = {
        "device": get_device_name(torch.device(arguments.device)),
        "torch": torch.__version__,
        "checkpoint_bytes": sum(file.stat().st_size for file in arguments.checkpoint.glob("*.safetensors")),
        **watched,
        **read_reported_metrics(out),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
