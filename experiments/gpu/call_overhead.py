"""How long Python takes for one call of an INT8 layer on `backend=triton`, without a GPU.

    python experiments/gpu/call_overhead.py

The kernels are replaced by functions that return at once, so that what is left is int8run's own Python and
the memory that it asks torch for. In turn with it, the same layer as `nn.Linear` and as `F.linear`, on an
input so small that its product takes next to nothing. Triton's own launcher is not in these times.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # this working tree

import torch
import torch.nn.functional as F
from torch import nn

from int8run.backends.triton import Triton
from int8run.kernels.int8_linear import kernel as product
from int8run.kernels.int8_linear.tile import Tile
from int8run.kernels.quantize_rowwise import kernel as quantization
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.outlier.base import OutlierMethod
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.quant.weight import quantize_weight

ROWS, COLUMNS = 4, 64


class NoKernel:
    """Takes the place of a Triton kernel: it can be launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        """Return at once."""


@contextmanager
def replaced_kernels() -> Iterator[None]:
    """Launch nothing inside of this."""
    with (
        patch.object(product, "int8_linear_kernel", NoKernel()),
        patch.object(quantization, "quantize_row_kernel", NoKernel()),
        patch.object(quantization, "quantize_row_matrix_kernel", NoKernel()),
    ):
        yield


def make_int8(linear: nn.Linear, method: OutlierMethod) -> Int8Linear:
    """The layer on `backend=triton`."""
    transform = method.fit(linear.weight)
    weight = quantize_weight(transform.transform_weight(linear.weight))
    backend = Triton(tile=Tile(16, 32, 64, warps=4))
    return Int8Linear(QuantizedLayer(weight, transform, linear.bias), backend, torch.float32)


def measure_in_turn(calls: dict[str, Callable[[], object]], rounds: int, per_round: int) -> dict[str, float]:
    """Microseconds of a call by name: the lower quartile of rounds that take turns.

    Args:
        calls: what to time.
        rounds: how often each has its turn.
        per_round: calls in a turn.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(per_round):
                call()
            times[name].append((time.perf_counter() - start) / per_round * 1e6)
    return {name: sorted(taken)[len(taken) // 4] for name, taken in times.items()}


@torch.no_grad()
def main() -> None:
    """Print the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    x = torch.randn(ROWS, COLUMNS)
    linear = nn.Linear(COLUMNS, COLUMNS).requires_grad_(requires_grad=False)
    plain, rotated = make_int8(linear, NoOutlier()), make_int8(linear, ConvRot())
    calls = {
        "F.linear": lambda: F.linear(x, linear.weight, linear.bias),
        "nn.Linear": lambda: linear(x),
        "Int8Linear": lambda: plain(x),
        "Int8Linear, rotated": lambda: rotated(x),
    }
    with replaced_kernels():
        times = measure_in_turn(calls, rounds=rounds, per_round=20)
    print(f"{'':20} microseconds   of nn.Linear")
    for name, microseconds in times.items():
        print(f"{name:20} {microseconds:12.1f} {microseconds / times['nn.Linear']:13.2f}")


if __name__ == "__main__":
    main()
