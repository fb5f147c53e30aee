"""A checkpoint with the shapes of FLUX.1-dev's transformer and random bfloat16 weights (24 GB).

In shards, as a diffusers folder.

    python experiments/streaming/make_flux.py FOLDER [--doubles 19 --singles 38]

The numbers are normal with a deviation of 0.02, from one drawn block of 16 M that each tensor enters at
another place: as good as fresh ones for speed and for memory.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from int8run.checkpoints.writer import StreamWriter, TensorEntry, count_bytes

CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
SHARD_BYTES = 10 * 10**9  # as diffusers cuts them
NUMBERS = 2**24


def split_shards(entries: list[TensorEntry]) -> list[list[TensorEntry]]:
    """Entries in the order of the model, cut where a shard is full."""
    found: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        count = count_bytes(*entry[1:])
        if size + count > SHARD_BYTES:
            found.append([])
            size = 0
        found[-1].append(entry)
        size += count
    return found


def repeat_block(count: int, start: int, block: torch.Tensor) -> Iterator[torch.Tensor]:
    """`count` numbers of the block, from `start` on and round again."""
    while count:
        start %= len(block)
        part = block[start : start + count]
        yield part
        count, start = count - len(part), 0


def write_checkpoint(folder: Path, doubles: int, singles: int) -> int:
    """Write the checkpoint. Returns its bytes."""
    config = {**CONFIG, "num_layers": doubles, "num_single_layers": singles}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    entries: list[TensorEntry] = [
        TensorEntry(name, "BF16", tuple(t.shape)) for name, t in model.state_dict().items()
    ]
    block = (torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    groups, places, total, start = split_shards(entries), {}, 0, 0
    for i, group in enumerate(groups):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-{len(groups):05}.safetensors"
        with StreamWriter(folder / name, group, {"format": "pt"}) as writer:
            for key, _, shape in group:
                count = torch.Size(shape).numel()
                for piece in repeat_block(count, start, block):
                    writer.write(key, piece)
                start += count + 4099  # no tensor begins where another does
                places[key] = name
            writer.finish()
            total += writer.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", **config}, indent=2) + "\n"
    )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--doubles", type=int, default=CONFIG["num_layers"])
    parser.add_argument("--singles", type=int, default=CONFIG["num_single_layers"])
    arguments = parser.parse_args()
    total = write_checkpoint(arguments.folder, arguments.doubles, arguments.singles)
    print(f"{arguments.folder}: {total} bytes")


if __name__ == "__main__":
    main()
