"""What each LoRA mode costs one FLUX-shaped layer, and how much of the LoRA arrives.

    python experiments/lora_modes/layers.py errors                 # errors, gain, clipping, memory
    # step time by total rank, time of a strength change
    python experiments/lora_modes/layers.py times --threads 1
    python experiments/lora_modes/layers.py times --device cuda    # the same on a GPU
    python experiments/lora_modes/layers.py times --quick --out OUT    # small layers and few rounds

Weights are normal numbers, a LoRA's factors too, scaled so that its change is a given share of the weight's
norm. Inputs have columns of different sizes, as in a transformer. Timings take turns in one process; run
them on a quiet machine.
"""

import argparse
import csv
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.base import Backend
from int8run.backends.cpu import Cpu
from int8run.backends.onednn import OneDnn
from int8run.backends.torch_int_mm import TorchIntMM
from int8run.backends.triton import Triton
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.lora import LoRA
from int8run.lora.apply import DynamicLayer, Int8LoraLayer
from int8run.lora.entries import Entry
from int8run.lora.load import LoraFile
from int8run.lora.stack import LoraStack
from int8run.outlier.base import OutlierMethod
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.quant.weight import quantize_weight
from int8run.utils.timing import time_in_turns

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Shape = tuple[int, int, int]  # rows of the input, columns and rows of the weight


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    error_shape: Shape = (512, 3072, 3072)
    shares: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    time_shapes: tuple[Shape, ...] = ((1024, 3072, 3072), (512, 3072, 12288))
    ranks: tuple[int, ...] = (16, 32, 64, 128, 256, 320)
    rounds: int = 31


GPU_SHAPES = ((4096, 3072, 3072), (4096, 3072, 12288), (4096, 12288, 3072))
QUICK = Sizes((32, 256, 256), shares=(0.03,), time_shapes=((32, 256, 256),), ranks=(16, 32), rounds=5)


def draw_normal(*shape: int, seed: int) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(rows: int, width: int) -> Tensor:
    """Rows whose columns differ in size: log-normal, a few ten times the median."""
    return draw_normal(rows, width, seed=1) * draw_normal(width, seed=2).mul(0.8).exp()


def make_lora(n: int, k: int, rank: int, share: float, weight: Tensor, seed: int = 3) -> LoRA:
    """A low-rank change whose norm is `share` of the weight's."""
    lora = LoRA(draw_normal(rank, k, seed=seed) / k**0.5, draw_normal(n, rank, seed=seed + 1))
    return LoRA(lora.lora_A, lora.lora_B * (share * weight.norm() / lora.compute_delta(weight).norm()))


def int8_layer(weight: Tensor, outlier: OutlierMethod, backend: Backend, dtype: torch.dtype) -> Int8Linear:
    """The weight in INT8."""
    transform = outlier.fit(weight, None).to(weight.device)
    return Int8Linear(
        QuantizedLayer(quantize_weight(transform.transform_weight(weight)), transform, None), backend, dtype
    )


def put_on(layer: Int8Linear, weight: Tensor, lora: LoRA, mode: str) -> LoraStack:
    """The LoRA on the layer by this mode, at strength 0."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    file = LoraFile(Path("planted.safetensors"), {"denoiser": {"0": LoraChange(lora)}}, (), {})
    file.__dict__["identity"] = "planted"
    stack = LoraStack(nn.Sequential(linear), mode=mode)
    entries = [Entry("planted", file)]
    stack.install(entries, stack.match_entries(entries))
    stack.attach(nn.Sequential(layer), float_weights=True)
    return stack


MODES: dict[str, tuple[str, Backend]] = {
    "dynamic, float branch": ("dynamic", Cpu(int8_branch=False)),
    "dynamic, int8 branch": ("dynamic", Cpu()),
    "bake": ("bake", Cpu()),
    "stochastic": ("stochastic", Cpu()),
}


@dataclass(frozen=True)
class Planted:
    """A layer, a LoRA whose size is known, and what it should do to an input.

    Args:
        share: the norm of the LoRA's change over the weight's.
        wanted: what the LoRA adds to the output, in float.
        merged: the output with the LoRA in the weight, in float.
    """

    weight: Tensor
    x: Tensor
    lora: LoRA
    share: float
    wanted: Tensor
    merged: Tensor


def plant_lora(weight: Tensor, x: Tensor, share: float) -> Planted:
    """A LoRA of rank 16 for the layer."""
    n, k = weight.shape
    lora = make_lora(n, k, 16, share, weight)
    delta = lora.compute_delta(weight)
    return Planted(weight, x, lora, share, wanted=x @ delta.T, merged=x @ (weight + delta).T)


def measure_mode(case: Planted, outlier: OutlierMethod, name: str) -> Row:
    """How much of the LoRA arrives in one mode, and what it costs; the LoRA is taken off again."""
    mode, backend = MODES[name]
    layer = int8_layer(case.weight, outlier, backend, torch.float32)
    before = layer(case.x)
    stack = put_on(layer, case.weight, case.lora, mode)
    stack.set_strengths([1.0])
    y = layer(case.x)
    effect = y - before
    row = {
        "outlier": outlier.name,
        "lora_share": case.share,
        "rms_steps": round(stack.sizes.compute_median_steps(0) or 0, 3),
        "mode": name,
        "effect_error": compute_relative_error(effect - case.wanted, case.wanted),
        "gain": ((effect * case.wanted).sum() / case.wanted.square().sum()).item(),
        "error_to_float_merge": compute_relative_error(y - case.merged, case.merged),
        "clipped_share": stack.clipped_share,
        "extra_bytes": extra_bytes(stack.layers["0"]),
    }
    stack.set_strengths([0.0])
    assert torch.equal(layer(case.x), before), "the undo must be exact"
    return row


def measure_errors(sizes: Sizes) -> Iterator[Row]:
    """How much of a LoRA arrives, by its size, the outlier method and the mode."""
    rows, k, n = sizes.error_shape
    weight, x = draw_normal(n, k, seed=0) / k**0.5, make_inputs(rows, k)
    for outlier in (NoOutlier(), ConvRot()):
        for share in sizes.shares:
            case = plant_lora(weight, x, share)
            for name in MODES:
                yield measure_mode(case, outlier, name)


def compute_relative_error(difference: Tensor, reference: Tensor) -> float:
    """RMS of a difference over that of the reference."""
    return (difference.norm() / reference.norm()).item()


def extra_bytes(layer: Int8LoraLayer) -> int:
    """Memory that a mode keeps beside the layer."""
    if isinstance(layer, DynamicLayer):
        return 0 if layer.branch is None else sum(t.nbytes for t in layer.branch.buffers())
    return layer.original.qdata.nbytes + layer.original.scale.nbytes


def list_backends(device: torch.device) -> dict[str, Backend]:
    """The backends that are timed on a device."""
    if device.type == "cuda":
        return {"triton": Triton(), "torch_int_mm": TorchIntMM()}
    return {
        "cpu": Cpu(),
        "cpu, float branch": Cpu(int8_branch=False),
        "onednn": OneDnn(),
        "torch_int_mm": TorchIntMM(),
    }


def time_layer(weight: Tensor, x: Tensor, backend: Backend, sizes: Sizes) -> Iterator[Row]:
    """A row for each rank: the layer with a branch and without take turns; then changes of the strength."""
    (n, k), device = weight.shape, weight.device
    plain = int8_layer(weight, ConvRot(), backend, x.dtype)
    calls: list[Callable[[], object]] = [partial(plain, x)]
    stacks = []
    for rank in sizes.ranks:
        layer = int8_layer(weight, ConvRot(), backend, x.dtype)
        stack = put_on(layer, weight, make_lora(n, k, rank, 0.03, weight.cpu()), "dynamic")
        stack.set_strengths([1.0])
        stacks.append(stack)
        calls.append(partial(layer, x))
    plain_seconds, *branch_seconds = time_in_turns(calls, device, sizes.rounds)
    quarter = sizes.rounds // 4
    for rank, stack, seconds in zip(sizes.ranks, stacks, branch_seconds, strict=True):
        ratios = sorted(own / base for own, base in zip(seconds, plain_seconds, strict=True))
        changes = [partial(stack.layers["0"].set_strengths, [strength]) for strength in (0.5, 1.0)]
        first_seconds, second_seconds = time_in_turns(changes, device, sizes.rounds)
        yield {
            "rank": rank,
            "work_share": round(rank * (k + n) / (k * n), 4),
            "time_ratio": round(statistics.median(ratios), 4),
            "low": round(ratios[quarter], 4),
            "high": round(ratios[-1 - quarter], 4),
            "plain_ms": round(1e3 * statistics.median(plain_seconds), 3),
            "change_ms": round(1e3 * statistics.median([*first_seconds, *second_seconds]), 4),
            "extra_bytes": extra_bytes(stack.layers["0"]),
        }


def measure_times(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Time of a layer with a branch over its time without, and time of a strength change.

    By shape, backend and total rank.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows, k, n in sizes.time_shapes:
        weight = (draw_normal(n, k, seed=0) / k**0.5).to(device)
        x = make_inputs(rows, k).to(device, dtype)
        for name, backend in list_backends(device).items():
            for row in time_layer(weight, x, backend, sizes):
                yield {"shape": f"{rows}x{k}x{n}", "backend": name, **row}


def format_value(value: object) -> str:
    """A cell for the terminal."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_rows(path: Path, rows: Iterator[Row]) -> None:
    """Rows into a table of results, and onto the terminal as they come."""
    written = []
    for row in rows:
        written.append(row)
        print(", ".join(f"{key} {format_value(value)}" for key, value in row.items()), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, written[0].keys())
        writer.writeheader()
        writer.writerows(written)


def choose_sizes(quick: bool, device: torch.device) -> Sizes:
    """The sizes of the README; on a GPU larger layers."""
    if quick:
        return QUICK
    return Sizes(time_shapes=GPU_SHAPES) if device.type == "cuda" else Sizes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("errors", "times"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--quick", action="store_true", help="small layers, few ranks and rounds")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = choose_sizes(arguments.quick, device)
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    processor = platform.processor() or platform.machine()
    print(f"{processor}, torch {torch.__version__}, {arguments.threads} threads, {device}")
    if arguments.what == "errors":
        write_rows(arguments.out / "errors.csv", measure_errors(sizes))
        return
    where = f"cpu_{arguments.threads}" if device.type == "cpu" else "gpu"
    write_rows(arguments.out / f"times_{where}.csv", measure_times(device, sizes))


if __name__ == "__main__":
    main()
