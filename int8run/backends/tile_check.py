"""Whether a fast tile computes what it should, before the tuner of `backends/triton.py` keeps it.

It runs on the GPU that the tile was timed on, once for each shape. The numbers are whole and small enough
that every sum is exact in float32, in whatever order: results are compared to the last bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.backends.run_errors import find_run_failure
from int8run.kernels.int8_linear import reference
from int8run.kernels.int8_linear.tile import PORTABLE, Tile, choose_tile
from int8run.utils.hardware import get_gpu_architecture

SEED = 0
# of the weight: sums of 131,072 products stay below 2**22
LARGEST_WEIGHT = 15
RANK, LARGEST_FACTOR, LARGEST_BIAS = 32, 3, 63
# of the output: rows and columns that the CPU computes, too
SAMPLED_ROWS, SAMPLED_COLUMNS = 64, 256


@dataclass(frozen=True)
class Product:
    """The arguments of `kernel.int8_linear`, by their names there."""

    q: Tensor
    x_scale: Tensor
    qdata: Tensor
    w_scale: Tensor
    bias: Tensor
    h: Tensor
    up: Tensor
    strengths: Tensor

    def multiply(self, tile: Tile) -> Tensor:
        """The result of the kernel with a tile, float32 [M, N]."""
        from int8run.kernels.int8_linear.kernel import int8_linear

        return int8_linear(
            self.q,
            self.x_scale,
            self.qdata,
            self.w_scale,
            group=0,
            bias=self.bias,
            h=self.h,
            up=self.up,
            out_dtype=torch.float32,
            tile=tile,
            strengths=self.strengths,
        )

    def multiply_sample(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Some rows and columns of the result by the definition, on the CPU.

        Args:
            rows: their numbers, on the CPU.
            columns: the same.
        """
        on_device = columns.to(self.q.device)
        q = self.q[rows.to(self.q.device)].cpu()
        branch = (self.h.cpu()[rows] * self.strengths.cpu()) @ self.up.cpu()[columns].float().T
        y = reference.int8_linear(
            q,
            self.x_scale.cpu()[rows],
            self.qdata[on_device].cpu(),
            self.w_scale.cpu()[columns],
            self.bias.cpu()[columns],
        )
        return y + branch


def find_wrong_tile(tile: Tile, shape: tuple[int, int, int], device: torch.device) -> str | None:
    """Why a fast tile must not be kept; None where its results are right.

    Only tiles of another kernel are run: those of the portable one differ in order of exact sums alone.

    Args:
        tile: that was fast.
        shape: rows, input features, output features.
        device: that it was timed on.
    """
    if tile.kernel == PORTABLE:
        return None
    differences: list[str | None] = []
    failure = find_run_failure(lambda: differences.append(find_difference(tile, shape, device)), device)
    return failure if failure is not None else differences[0]


def find_difference(tile: Tile, shape: tuple[int, int, int], device: torch.device) -> str | None:
    """How results with a tile differ from the definition's or from the default tile's; None: not at all."""
    rows, _, out_features = shape
    product = make_product(shape, device)
    y = product.multiply(tile)
    default = product.multiply(choose_tile(get_gpu_architecture(device), rows))
    sampled_rows, sampled_columns = spread(rows, SAMPLED_ROWS), spread(out_features, SAMPLED_COLUMNS)
    expected = product.multiply_sample(sampled_rows, sampled_columns)
    for name, result in (("its", y), ("the portable kernel's", default)):
        found = result[sampled_rows.to(device)][:, sampled_columns.to(device)]
        if not torch.equal(found.cpu(), expected):
            return f"{name} sums differ from the definition's"
    return None if torch.equal(y, default) else "its sums differ from the portable kernel's"


def spread(length: int, count: int) -> Tensor:
    """At most `count` numbers from 0 to `length - 1`, the first and the last among them."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).round().long()


def make_product(shape: tuple[int, int, int], device: torch.device) -> Product:
    """Random arguments with bias and branch: the same ones each time, and nobody else's are changed."""
    rows, in_features, out_features = shape
    generator = torch.Generator(device=device).manual_seed(SEED)

    def draw(largest: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.empty(size, dtype=dtype, device=device)
        return values.random_(-largest, largest + 1, generator=generator)

    def draw_power(*size: int) -> Tensor:
        return draw(1, *size).abs() + 1  # 1 or 2

    return Product(
        q=draw(127, rows, in_features, dtype=torch.int8),
        x_scale=draw_power(rows, 1),
        qdata=draw(LARGEST_WEIGHT, out_features, in_features, dtype=torch.int8),
        w_scale=draw_power(out_features),
        bias=draw(LARGEST_BIAS, out_features),
        h=draw(LARGEST_FACTOR, rows, RANK),
        up=draw(LARGEST_FACTOR, out_features, RANK).to(torch.bfloat16),
        strengths=draw_power(RANK),
    )
