"""A checkpoint with the shapes of FLUX.1-dev's transformer and random bfloat16 weights (24 GB).

In shards, as a diffusers folder.

    python experiments/streaming/make_flux.py FOLDER [--doubles 19 --singles 38 --heads 24]

The numbers are normal with a deviation of 0.02, from one drawn block of 16 M that each tensor enters at
another place: as good as fresh ones for speed and for memory.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        count = count_bytes(*entry[1:])
        if size + count > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += count
    return shards


def repeat_block(count: int, start: int, block: torch.Tensor) -> Iterator[torch.Tensor]:
    """`count` numbers of the block, from `start` on and round again."""
    while count:
        start %= len(block)
        part = block[start : start + count]
        yield part
        count, start = count - len(part), 0


def list_entries(config: Mapping[str, Any]) -> list[TensorEntry]:
    """The tensors of a model of this config, in bfloat16 and in the model's order."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    return [TensorEntry(name, "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> int:
    """Write shards, their index and the config. Returns the bytes of the tensors."""
    shards = split_shards(list_entries(config))
    block = (torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    file_of_tensor: dict[str, str] = {}
    total = start = 0
    for number, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        with StreamWriter(folder / file, shard, {"format": "pt"}) as writer:
            for name, _, shape in shard:
                count = torch.Size(shape).numel()
                for piece in repeat_block(count, start, block):
                    writer.write(name, piece)
                start += count + 4099  # no tensor begins where another does
                file_of_tensor[name] = file
            writer.finish()
            total += writer.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": file_of_tensor}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
    write_json(folder / "config.json", {"_class_name": "FluxTransformer2DModel", **config})
    return total


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file as diffusers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--doubles", type=int, default=CONFIG["num_layers"], help="double blocks")
    parser.add_argument("--singles", type=int, default=CONFIG["num_single_layers"], help="single blocks")
    parser.add_argument(
        "--heads", type=int, default=CONFIG["num_attention_heads"], help="of 128 columns each"
    )
    arguments = parser.parse_args()
    config = {
        **CONFIG,
        "num_layers": arguments.doubles,
        "num_single_layers": arguments.singles,
        "num_attention_heads": arguments.heads,
    }
    total = write_checkpoint(arguments.folder, config)
    print(f"{arguments.folder}: {total} bytes")


if __name__ == "__main__":
    main()
