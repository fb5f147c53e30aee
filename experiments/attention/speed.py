"""INT8 attention against torch's attention in float32 and bfloat16, at the sizes of known models.

    python experiments/attention/speed.py --rounds 5 --threads 1

Each round calls every variant once, in turn; a ratio is taken per round, from the CPU time of the process. A
variant is timed only if its result is close to torch's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.kernels.cpu.attention import int8_attention
from int8run.kernels.cpu.instructions import AUTO
from int8run.models.loader import read_library_versions
from int8run.report.run_files import collect_environment

MIN_SQNR_DB = 30.0  # of Gaussian queries, keys and values


class Size(NamedTuple):
    """One attention of a model; heads are a slice of those that it has."""

    heads: int
    queries: int
    keys: int
    width: int


SIZES = {
    "FLUX, 4 of 24 heads": Size(4, 4608, 4608, 128),
    "Wan 14B, 1 of 40 heads": Size(1, 32760, 32760, 128),
    "SDXL": Size(10, 4096, 4096, 64),
    "SDXL, cross": Size(10, 4096, 77, 64),
    "SD1.5, 4 of 8 heads": Size(4, 4096, 4096, 40),
    "tiny, batch 1": Size(6, 80, 80, 64),
}
Operands = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[], Tensor]


def make_operands(size: Size, dtype: torch.dtype) -> Operands:
    """q, k and v [1, heads, tokens, width], laid out as a model's projections write them."""
    lengths = (size.queries, size.keys, size.keys)
    q, k, v = (torch.randn(1, n, size.heads, size.width).to(dtype).transpose(1, 2) for n in lengths)
    return q, k, v


def make_variants(size: Size, rotation: int, instructions: str) -> dict[str, Attention]:
    """Each way to compute the same attention; float32 is the first."""
    single = make_operands(size, torch.float32)
    half = tuple(x.bfloat16() for x in single)
    fitting = rotation if rotation and size.width % rotation == 0 else 0
    variants: dict[str, Attention] = {
        "float32": lambda: F.scaled_dot_product_attention(*single),
        "bfloat16": lambda: F.scaled_dot_product_attention(*half),
        "INT8": lambda: int8_attention(*single, instructions=instructions),
        "INT8 of bfloat16": lambda: int8_attention(*half, instructions=instructions),
    }
    if fitting:
        variants[f"INT8, rotated by {fitting}"] = lambda: int8_attention(
            *single, rotation=fitting, instructions=instructions
        )
    variants["INT8, keys centered"] = lambda: int8_attention(
        *single, center_keys=True, instructions=instructions
    )
    return variants


def compute_sqnr_db(actual: Tensor, expected: Tensor) -> float:
    """Signal over error, in dB."""
    error = (actual.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / error))


def time_variants(variants: dict[str, Attention], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each round, of each variant whose first result was close to that of the first one."""
    expected = variants["float32"]()
    checked = {}
    for name, attend in variants.items():
        sqnr = compute_sqnr_db(attend(), expected)
        if sqnr < MIN_SQNR_DB:
            print(f"{name} is not timed: {sqnr:.1f} dB", flush=True)
            continue
        checked[name] = attend
    seconds: dict[str, list[float]] = {name: [] for name in checked}
    for _ in range(rounds):
        for name, attend in checked.items():
            started = time.process_time()
            attend()
            seconds[name].append(time.process_time() - started)
    return seconds


@torch.no_grad()
def measure_speed(sizes: list[str], rounds: int, threads: int, rotation: int, instructions: str) -> None:
    """Print a row for each size and variant."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    facts = collect_environment(torch.device("cpu"), read_library_versions())
    print(
        f"{facts['cpu']}, {threads} threads, torch {facts['versions']['torch']}, kernels: {instructions}, "
        f"{rounds} rounds\n"
    )
    print("| size | heads × queries × keys × width | attention | GOP/s | times float32 |")
    print("|---|---|---|---|---|")
    for name in sizes:
        size = SIZES[name]
        operations = 4 * size.heads * size.queries * size.keys * size.width
        seconds = time_variants(make_variants(size, rotation, instructions), rounds)
        for variant, each in seconds.items():
            ratios = [single / own for single, own in zip(seconds["float32"], each, strict=True)]
            speed = operations / statistics.median(each) / 1e9
            shape = " × ".join(map(str, size))
            print(
                f"| {name} | {shape} | {variant} | {speed:.0f} | {statistics.median(ratios):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rotation", type=int, default=64, help="where it divides the width")
    parser.add_argument("--instructions", default=AUTO, help="an instruction set of the CPU kernels")
    measure_speed(**vars(parser.parse_args()))
