"""Quantized checkpoints of denoisers and text encoders, damaged at random, against the oracle of
`tests/text_encoders`."""

import re
from pathlib import Path
from random import Random

from text_encoders.compare_files import BASES, WHOLE, base, compare_encoder, compare_file, whole
from text_encoders.files import File
from text_encoders.mutations import MUTATIONS, Draft

from int8run.errors import FileError
from int8run.tasks.inspect_file import inspect_file

# layers of the small files under names of denoisers; also with the prefixes of whole checkpoints
DENOISER_NAMES = {
    r"encoder\.block\.0\.layer\.0\.SelfAttention\.q": "double_blocks.0.img_attn.proj",
    r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wi_0": "double_blocks.0.img_mlp.0",
    r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wo": "double_blocks.0.img_mlp.2",
    r"text_model\.encoder\.layers\.0\.self_attn\.q_proj": "transformer_blocks.0.attn.to_q",
    r"text_model\.encoder\.layers\.0\.mlp\.fc1": "transformer_blocks.0.ff.net.0.proj",
    r"text_model\.encoder\.layers\.0\.mlp\.fc2": "transformer_blocks.0.ff.net.2",
}
PREFIXES = ("", "", "model.diffusion_model.", "diffusion_model.")


def to_denoiser(file: File, prefix: str) -> File:
    """The same tensors under names of a denoiser."""

    def rename(key: str) -> str:
        for pattern, name in DENOISER_NAMES.items():
            key = re.sub(f"^{pattern}", name, key)
        return prefix + key

    renamed = file.rename(rename)
    renamed.words = {
        rename(f"{layer}.weight").removesuffix(".weight"): word for layer, word in renamed.words.items()
    }
    text = renamed.metadata.get("_quantization_metadata")
    if text is not None:
        for pattern, name in DENOISER_NAMES.items():
            text = re.sub(f'"{pattern}"', f'"{prefix}{name}"', text)
        renamed.metadata["_quantization_metadata"] = text
    return renamed


def damage(file: File, chance: Random, path: Path) -> Path:
    """Write a file with up to three things done to it."""
    draft = Draft(file)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        chance.choice(MUTATIONS)(draft, chance)
    return draft.write(path)


def check_denoiser(chance: Random, folder: Path) -> bool:
    """Read every layer of a checkpoint both ways. Returns whether it was read."""
    file = base(chance.choice([*BASES])).copy()
    path = damage(to_denoiser(file, chance.choice(PREFIXES)), chance, folder / "x.safetensors")
    was_read = compare_file(path) == "read"
    try:
        inspect_file(str(path))
    except FileError as error:
        assert "\n" not in str(error), error
    return was_read


def check_encoder(chance: Random, folder: Path) -> bool:
    """Build a text encoder and compare its weights. Returns whether it was built."""
    file = whole(chance.choice([*WHOLE])).copy()
    return compare_encoder(damage(file, chance, folder / "x.safetensors")) == "read"
