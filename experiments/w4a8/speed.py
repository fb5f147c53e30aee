"""Time of one layer with weights of 4 and 6 bits beside the same with 8, and beside float; calls take turns.

    python experiments/w4a8/speed.py --rounds 21

Each round calls every variant once, in turn. Ratios are of the medians. Run it on a quiet machine.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.backends.registry import list_usable_backends, make_backend
from int8run.backends.row_decoder import RowDecoder
from int8run.layers.grouped_int8_linear import GroupedInt8Linear, make_int8_linear
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.metrics.layers import count_tensor_bytes
from int8run.outlier.convrot import ConvRot
from int8run.quant.grouped_rounding import GroupLayout, draw_grouped_weight
from int8run.quant.grouped_weight import LayerWeight
from int8run.quant.weight import quantize_weight
from int8run.utils.timing import time_in_turns

# of FLUX.1, [in_features, out_features], and rows of images of 256 to 1024 pixels with their text
SHAPES = ("3072x3072", "3072x12288", "12288x3072")
ROWS = (1, 16, 768, 4608)
BITS = (8, 6, 4)
HEAD = (
    "in x out", "rows", "bits", "weight, MB", "ms", "time over 8 bits", "float / this", "how decoded",
)  # fmt: skip


def draw_weight(bits: int, outputs: int, inputs: int, device: torch.device) -> LayerWeight:
    """A random weight."""
    generator = torch.Generator(device).manual_seed(0)
    if bits == 8:
        return quantize_weight(torch.randn(outputs, inputs, generator=generator, device=device))
    return draw_grouped_weight(outputs, inputs, GroupLayout(bits), generator)


def describe_decoding(layer: Int8Linear) -> str:
    """How a layer makes int8 of its weight."""
    if not isinstance(layer, GroupedInt8Linear):
        return ""
    return "some rows at each call" if isinstance(layer.multiplier, RowDecoder) else "in the product"


@torch.no_grad()
def measure_shape(shape: str, rows: int, backend: str, dtype: torch.dtype, rounds: int) -> None:
    """Print the rows of one layer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, outputs = map(int, shape.split("x"))
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    transform = ConvRot().fit(weight[:1]).to(device)
    layers = {}
    for bits in BITS:
        quantized = QuantizedLayer(draw_weight(bits, outputs, inputs, device), transform, bias=None)
        layers[bits] = make_int8_linear(quantized, make_backend(backend), dtype)
    calls: list[Callable[[], Tensor]] = [partial(F.linear, x, weight)]
    calls += [partial(layer, x) for layer in layers.values()]
    for call in calls:
        call()
    float_s, *seconds = map(statistics.median, time_in_turns(calls, device, rounds))
    for (bits, layer), own_s in zip(layers.items(), seconds, strict=True):
        megabytes = count_tensor_bytes(layer.buffers(recurse=False)) / 1e6
        cells = [
            shape, rows, bits, f"{megabytes:.1f}", f"{1e3 * own_s:.2f}", f"{own_s / seconds[0]:.2f}×",
            f"{float_s / own_s:.2f}×", describe_decoding(layer),
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_table(arguments: argparse.Namespace) -> None:
    """A table for the backend."""
    print(f"{arguments.backend}, {arguments.dtype}, {torch.get_num_threads()} threads\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for shape in arguments.shapes:
        for rows in arguments.rows:
            dtype = getattr(torch, arguments.dtype)
            measure_shape(shape, rows, arguments.backend, dtype, arguments.rounds)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = [name for name in list_usable_backends(device) if name not in ("auto", "float")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    best = "triton" if "triton" in usable else "cpu" if "cpu" in usable else usable[0]
    parser.add_argument("--backend", choices=usable, default=best)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=21)
    return parser.parse_args(words)


if __name__ == "__main__":
    print_table(parse_arguments())
