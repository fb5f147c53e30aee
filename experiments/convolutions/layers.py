"""What INT8 convolutions lose, by how their input is rounded, and how fast they are beside float.

    python experiments/convolutions/layers.py errors
    python experiments/convolutions/layers.py speed --rounds 7

`errors` prints a table of output SQNRs: layers of SD1.5 and SDXL at full size with random weights, and all of
the tiny VAE's decoder. `speed` times every convolution of a UNet's step on one thread, each shape once, float
and INT8 in turn; the sums count each shape as often as it occurs. `--channels N` leaves out what has more
channels.
"""

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from shapes import UNETS, ConvCase, ConvShape, list_shapes, make_case, read_tiny_vae
from torch import Tensor

from int8run.kernels.cpu import conv
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, rotate_groups
from int8run.kernels.int8_conv.reference import quantize_pixels
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise

GROUP = 64  # channels that share a scale, and channels that are rotated together
CHANNELS = (1, 2, 3)  # the dimensions that one scale covers: all of an image
WARMUP = 1
INT8_CALLS = ("INT8", "INT8, rotated", "INT8, NCHW")
HEADS = ("times", "GOP", "float32 ms", "× bfloat16", "× INT8", "× rotated", "× from NCHW", "GOP/s")
Round = Callable[[Tensor], Tensor]


# -- errors ----------------------------------------------------------------------------------------


def round_around_zero(x: Tensor, dims: Sequence[int]) -> Tensor:
    """What int8 keeps of x with one scale for all of some dimensions."""
    scale = (x.abs().amax(dims, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round() * scale


def round_around_center(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The same around the middle of the range."""
    high, low = x.amax(dims, keepdim=True), x.amin(dims, keepdim=True)
    center = (high + low) / 2
    scale = ((high - low) / 254).clamp(min=1e-30)
    return ((x - center) / scale).round() * scale + center


def round_by_groups(x: Tensor) -> Tensor:
    """A scale for each pixel and GROUP channels."""
    if x.shape[1] % GROUP:
        return round_around_zero(x, [1])
    return round_around_zero(x.unflatten(1, (-1, GROUP)), [2]).flatten(1, 2)


def round_pixels(x: Tensor) -> Tensor:
    """What the kernels do."""
    pixels = quantize_pixels(x)
    return pixels.q * pixels.scale + pixels.center


WAYS: dict[str, Round] = {
    "image": lambda x: round_around_zero(x, CHANNELS),
    "image, center": lambda x: round_around_center(x, CHANNELS),
    f"pixel, groups of {GROUP}": round_by_groups,
    "pixel": lambda x: round_around_zero(x, [1]),
    "pixel, center": round_pixels,
}


def round_weight(weight: Tensor) -> Tensor:
    """What int8 keeps of a weight, with a scale for each output channel."""
    q, scale = quantize_rowwise(weight.flatten(1))
    return (q * scale).view_as(weight)


def measure_sqnr(expected: Tensor, y: Tensor) -> float:
    """The ratio of the output's power to the error's, in dB; the bias belongs to neither."""
    error = (expected.double() - y.double()).square().mean()
    return 10 * torch.log10(expected.double().square().mean() / error).item()


def measure_ways(case: ConvCase) -> list[float]:
    """The output's SQNR for each of WAYS, and rotated."""
    unbiased = ConvCase(case.source, case.name, case.x, case.weight, None, case.stride, case.padding)
    expected = unbiased.compute(case.x, case.weight)
    weight = round_weight(case.weight)
    found = [measure_sqnr(expected, unbiased.compute(way(case.x), weight)) for way in WAYS.values()]
    group = find_rotation(case.x)
    if group == 0:
        return [*found, math.nan]
    rotation = Rotation(regular_hadamard(group))
    x, rotated = rotate_channels(case.x, rotation), rotate_channels(case.weight, rotation)
    return [*found, measure_sqnr(expected, unbiased.compute(round_pixels(x), round_weight(rotated)))]


def find_rotation(x: Tensor) -> int:
    """Channels that are rotated together, which divide those of x: [B, C, H, W]; 0: none."""
    return next((group for group in (GROUP, 16, 4) if x.shape[1] % group == 0), 0)


def rotate_channels(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate groups of channels; x: [B, C, H, W] or a weight [O, C, kH, kW]."""
    return rotate_groups(x.movedim(1, -1), rotation.matrix).movedim(-1, 1)


def choose_shapes(model: str, most_channels: int) -> list[ConvShape]:
    """The shapes with most work of a UNet, those of each kernel and of each place among them."""
    by_kind: dict[tuple[int, int, bool], ConvShape] = {}
    counted = list_shapes(model)
    for shape in sorted(counted, key=lambda each: counted[each] * each.multiply_adds, reverse=True):
        if shape.channels <= most_channels:
            by_kind.setdefault((shape.kernel[0], shape.height, shape.after_silu), shape)
    return list(by_kind.values())


def print_errors(models: Sequence[str], most_channels: int) -> None:
    """One row for each layer, and the mean and the worst of the tiny VAE."""
    print("| model | layer | " + " | ".join([*WAYS, "pixel, center, rotated"]) + " |")
    print("|---" * (len(WAYS) + 3) + "|")
    for model in models:
        for shape in choose_shapes(model, most_channels):
            print_row(model, shape.name, measure_ways(make_case(model, shape)))
    trained = [measure_ways(case) for case in read_tiny_vae()]
    columns = [[row[i] for row in trained if not math.isnan(row[i])] for i in range(len(trained[0]))]
    print_row("tiny VAE", f"{len(trained)} trained ones, mean", [statistics.mean(each) for each in columns])
    print_row("tiny VAE", "the worst of them", [min(each) for each in columns])


def print_row(model: str, layer: str, numbers: Sequence[float]) -> None:
    """A row of the table of errors."""
    cells = [f"{number:.1f}" for number in numbers]
    print(f"| {model} | {layer} | " + " | ".join(cells) + " |", flush=True)


# -- speed -----------------------------------------------------------------------------------------


def make_calls(case: ConvCase) -> dict[str, Callable[[], Tensor]]:
    """The convolution in each dtype and layout."""
    x, weight = case.x, case.weight
    last = torch.channels_last
    x_last, weight_last = x.contiguous(memory_format=last), weight.contiguous(memory_format=last)
    x_bf16, weight_bf16 = x_last.bfloat16(), weight_last.bfloat16()
    bias_bf16 = None if case.bias is None else case.bias.bfloat16()
    q, scale = quantize_rowwise(weight.flatten(1))
    packed, w_scale = conv.pack_conv_weight(q.view_as(weight)), scale[:, 0].contiguous()
    options = {"kernel": weight.shape[2:], "stride": case.stride, "padding": case.padding}
    return {
        "float32, NCHW": lambda: case.compute(x, weight),
        "float32, last": lambda: case.compute(x_last, weight_last),
        "bfloat16": lambda: F.conv2d(x_bf16, weight_bf16, bias_bf16, case.stride, case.padding),
        "INT8": lambda: conv.int8_conv(x_last, packed, w_scale, case.bias, **options),
        "INT8, rotated": lambda: conv.int8_conv(
            x_last, packed, w_scale, case.bias, rotation=find_rotation(x), **options
        ),
        "INT8, NCHW": lambda: conv.int8_conv(x, packed, w_scale, case.bias, **options),
        "INT8 of bfloat16": lambda: conv.int8_conv(x_bf16, packed, w_scale, case.bias, **options),
    }


@torch.no_grad()
def time_case(case: ConvCase, rounds: int) -> dict[str, float]:
    """The median seconds of the thread's own time for each call, in turn."""
    calls = make_calls(case)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + WARMUP):
        for name, call in calls.items():
            started = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - started)
    return {name: statistics.median(each[WARMUP:]) for name, each in seconds.items()}


def print_speed(model: str, rounds: int, most_channels: int) -> None:
    """A row for each shape, and the sums over a step."""
    totals: dict[str, float] = defaultdict(float)
    work = layers = 0
    print(f"\n| {model}: layer | " + " | ".join(HEADS) + " |")
    print("|---" * (1 + len(HEADS)) + "|")
    counted = list_shapes(model)
    for shape in sorted(counted, key=lambda each: counted[each] * each.multiply_adds, reverse=True):
        if shape.channels > most_channels:
            continue
        found, count = time_case(make_case(model, shape), rounds), counted[shape]
        fastest = min(found["float32, NCHW"], found["float32, last"])
        for name, seconds in {**found, "float32": fastest}.items():
            totals[name] += count * seconds
        work += count * shape.multiply_adds
        layers += count
        print_times(shape.name, str(count), 2 * shape.multiply_adds, {**found, "float32": fastest})
    print_times("all of a step", str(layers), 2 * work, totals)
    ratio = totals["bfloat16"] / totals["INT8 of bfloat16"]
    print(f"\nWith bfloat16 in and out, INT8 is {ratio:.2f} times as fast as bfloat16.")


def print_times(name: str, count: str, operations: int, seconds: dict[str, float]) -> None:
    """A row of the table of times; ratios are of the fastest float32."""
    base = seconds["float32"]
    ratios = [base / seconds[each] for each in ("bfloat16", *INT8_CALLS)]
    cells = [f"{operations / 1e9:.2f}", f"{1e3 * base:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
    rate = operations / seconds["INT8"] / 1e9
    print(f"| {name} | {count} | " + " | ".join(cells) + f" | {rate:.0f} |", flush=True)


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["errors", "speed"])
    parser.add_argument("--models", nargs="+", choices=UNETS, default=UNETS)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--channels", type=int, default=1_000_000, help="leave out layers with more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table == "errors":
        print_errors(arguments.models, arguments.channels)
        return
    for model in arguments.models:
        print_speed(model, arguments.rounds, arguments.channels)


if __name__ == "__main__":
    main()
