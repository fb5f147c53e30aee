"""Small quantized files and their bases, by the formats' formulas; nothing of int8run is used in them.

Weights have columns of very different size, as real ones: unrotated they are far from normally distributed.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, COLUMNS = 192, 256
NAMES = [f"blocks.{number}.{layer}" for number in range(3) for layer in ("attn.to_q", "mlp.up")]
BLOCK = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1.0]])


def make_base(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, Tensor]:
    """A model's tensors: six weights, and a bias beside each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in NAMES:
        sizes = torch.randn(columns, generator=generator).exp()
        tensors[f"{name}.weight"] = 0.02 * sizes * torch.randn(rows, columns, generator=generator)
        tensors[f"{name}.bias"] = torch.randn(rows, generator=generator)
    return tensors


def make_hadamard(group_size: int) -> Tensor:
    """The regular matrix of ConvRot, by its published definition."""
    matrix = torch.ones(1, 1)
    while len(matrix) < group_size:
        matrix = torch.kron(matrix, BLOCK)
    return matrix / group_size**0.5


def rotate(weight: Tensor, group_size: int) -> Tensor:
    """Groups of columns times the matrix."""
    groups = weight.reshape(len(weight), -1, group_size)
    return (groups @ make_hadamard(group_size)).reshape(weight.shape)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`absmax / 127` of each row, ties to even."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def encode_marker(**fields: object) -> Tensor:
    """A `comfy_quant` tensor."""
    return torch.tensor(list(json.dumps({"format": "int8_tensorwise", **fields}).encode()), dtype=torch.uint8)


def make_int8(
    base: dict[str, Tensor], group_size: int = 0, marked_group_size: int | None = None
) -> dict[str, Tensor]:
    """INT8 rows of every weight of a base, with ComfyUI's markers.

    Args:
        base: the model's tensors.
        group_size: of ConvRot; 0: not rotated.
        marked_group_size: that the marker says; None: the true one.
    """
    marked = group_size if marked_group_size is None else marked_group_size
    tensors = dict(base)
    for name in NAMES:
        weight = base[f"{name}.weight"]
        if group_size:
            weight = rotate(weight, group_size)
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = quantize_rows(weight)
        rotation = {"convrot": True, "convrot_groupsize": marked} if marked else {}
        tensors[f"{name}.comfy_quant"] = encode_marker(**rotation)
    return tensors


def write_file(tensors: dict[str, Tensor], path: Path, note: Mapping[str, object] | None = None) -> Path:
    """A safetensors file, with int8run's note in its header where one is given."""
    metadata = None if note is None else {"int8run": json.dumps(note)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path
