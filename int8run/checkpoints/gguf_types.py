"""The types of tensors in GGUF files: plain numbers, and blocks of numbers that share a scale.

Numbers and names are those of ggml (https://github.com/ggml-org/ggml, `ggml.h`). `gguf_header` looks types
up, and `gguf_blocks` turns blocks into numbers.
"""

from typing import NamedTuple


class BlockType(NamedTuple):
    """How numbers are packed: so many in a block of so many bytes, scales included."""

    name: str
    numbers: int
    nbytes: int


# number of the type -> safetensors' name of the same
PLAIN_TYPES = {
    0: "F32",
    1: "F16",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    30: "BF16",
}
BLOCK_TYPES = {
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
}
# known and not read: of so few bits that an INT8 model made of them says little about the model
UNREAD_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
READ_NAMES = ("F32", "F16", "BF16", *(block.name for block in BLOCK_TYPES.values()))
