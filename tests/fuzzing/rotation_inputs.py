"""The parts of OFT and BOFT files of three programs, as they write them, for `lora_inputs`."""

from collections.abc import Mapping, Sequence
from math import prod
from random import Random
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
PROGRAMS = ("lycoris", "lycoris boft", "kohya", "kohya, fused", "peft oft", "peft boft")
PREFIXES: Mapping[str, Sequence[str]] = {
    "lycoris": ("lycoris_", "lora_unet_"),
    "lycoris boft": ("lycoris_", "lora_unet_"),
    "kohya": ("oft_unet_", "oft_te1_"),
    "kohya, fused": ("oft_unet_",),
    "peft oft": ("base_model.model.", "transformer."),
    "peft boft": ("base_model.model.", "transformer."),
}
# settings of PEFT's OFT that are not the most common ones
RARE_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "use_cayley_neumann": (True, False, None, "no"),
    "num_cayley_neumann_terms": (1, 2, 3, 4, 5, 8, 2.0, 0, 101, None, "5", True, float("inf")),
    "coft": (True, False),
    "eps": (0.05, 1.0, 0, -1, "x"),
    "block_share": (True, False),
    "peft_version": ("0.21.2", "0.18.0", "0.17.1", "1.0.0", "x", None, "0.18.0.dev0", "0"),
}


def choose_size(chance: Random, length: int, *, even: bool = False) -> int:
    """The size of blocks that a length can be cut into."""
    sizes = [size for size in range(2, length + 1) if length % size == 0 and not (even and size % 2)]
    return chance.choice(sizes)


def choose_stages(chance: Random, length: int, size: int) -> int:
    """How many stages of a butterfly fit."""
    most = 1
    while length % (size * 2**most) == 0:
        most += 1
    return chance.randint(1, most)


def choose_rotation_shapes(chance: Random, program: str, shape: Sequence[int]) -> Shapes:
    """The parts that a program writes for a weight.

    Args:
        chance: of the input.
        program: of PROGRAMS.
        shape: of the weight, [N, K, *kernel].
    """
    rows, columns = shape[0], prod(shape[1:])
    if program == "lycoris":
        size = choose_size(chance, rows)
        return {"oft_blocks": (rows // size, size, size), **choose_rescale(chance, shape)}
    if program == "lycoris boft":
        size = choose_size(chance, rows, even=True)
        stages = choose_stages(chance, rows, size)
        return {"oft_blocks": (stages, rows // size, size, size), **choose_rescale(chance, shape)}
    if program == "kohya":
        size = choose_size(chance, rows)
        return {"oft_blocks": (rows // size, size, size)}
    if program == "kohya, fused":
        size = choose_size(chance, rows // 2)
        return {f"oft_blocks.{i}": (rows // 2 // size, size, size) for i in range(2)}
    if program == "peft oft":
        size = choose_size(chance, columns)
        return {"oft_R.weight": (columns // size, size * (size - 1) // 2)}
    size = choose_size(chance, columns, even=True)
    stages = choose_stages(chance, columns, size)
    return {"boft_R": (stages, columns // size, size, size), "boft_s": (rows, 1)}


def choose_rescale(chance: Random, shape: Sequence[int]) -> Shapes:
    """LyCORIS's factors of the rows, or none."""
    if chance.random() < 0.5:
        return {}
    return {"rescale": (shape[0], *[1] * (len(shape) - 1))}


def choose_rotation_settings(chance: Random, program: str) -> dict[str, Any]:
    """PEFT's settings beside such a file."""
    if program == "peft boft":
        return {"peft_type": "BOFT", "boft_block_size": 2}
    settings: dict[str, Any] = {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": 2,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        "peft_version": "0.21.2",
    }
    for _ in range(chance.choice((0, 1, 1, 2))):
        name = chance.choice([*RARE_SETTINGS])
        settings[name] = chance.choice(RARE_SETTINGS[name])
    return settings
