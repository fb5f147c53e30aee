"""What each LoRA mode costs one FLUX-shaped layer, and how much of the LoRA arrives.

    python experiments/lora_modes/layers.py errors                 # errors, gain, clipping, memory
    # step time by total rank, time of a strength change
    python experiments/lora_modes/layers.py times --threads 1
    python experiments/lora_modes/layers.py times --device cuda    # the same on a GPU

Weights are normal numbers, a LoRA's factors too, scaled so that its change is a given share of the weight's
norm. Inputs have columns of different sizes, as in a transformer. Timings take turns in one process; run
them on a quiet machine.
"""

import argparse
import csv
import platform
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.base import Backend
from int8run.backends.onednn import OneDnn
from int8run.backends.torch_int_mm import TorchIntMM
from int8run.backends.triton import Triton
from int8run.backends.vnni import Vnni
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.lora import LoRA
from int8run.lora.apply import DynamicLayer, Int8LoraLayer
from int8run.lora.load import LoraFile
from int8run.lora.stack import Entry, LoraStack
from int8run.outlier.base import OutlierMethod
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.quant.weight import quantize_weight
from int8run.utils.timing import time_in_turns

RESULTS = Path(__file__).parent / "results"
ERROR_SHAPE = (512, 3072, 3072)
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3)
TIME_SHAPES = ((1024, 3072, 3072), (512, 3072, 12288))
GPU_SHAPES = ((4096, 3072, 3072), (4096, 3072, 12288), (4096, 12288, 3072))
RANKS = (16, 32, 64, 128, 256, 320)
ROUNDS = 31


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
    "dynamic, float branch": ("dynamic", Vnni(int8_branch=False)),
    "dynamic, int8 branch": ("dynamic", Vnni()),
    "bake": ("bake", Vnni()),
    "stochastic": ("stochastic", Vnni()),
}


def measure_errors() -> Iterator[dict[str, Any]]:
    """How much of a LoRA arrives, by its size, the outlier method and the mode."""
    rows, k, n = ERROR_SHAPE
    weight, x = draw_normal(n, k, seed=0) / k**0.5, make_inputs(rows, k)
    for outlier in (NoOutlier(), ConvRot()):
        for share in SHARES:
            lora = make_lora(n, k, 16, share, weight)
            delta = lora.compute_delta(weight)
            wanted, merged = x @ delta.T, x @ (weight + delta).T
            for name, (mode, backend) in MODES.items():
                layer = int8_layer(weight, outlier, backend, torch.float32)
                before = layer(x)
                stack = put_on(layer, weight, lora, mode)
                stack.set_strengths([1.0])
                y = layer(x)
                effect = y - before
                yield {
                    "outlier": outlier.name,
                    "lora_share": share,
                    "rms_steps": round(stack.compute_median_steps(0) or 0, 3),
                    "mode": name,
                    "effect_error": compute_relative_error(effect - wanted, wanted),
                    "gain": ((effect * wanted).sum() / wanted.square().sum()).item(),
                    "error_to_float_merge": compute_relative_error(y - merged, merged),
                    "clipped_share": stack.clipped_share,
                    "extra_bytes": extra_bytes(stack.layers["0"]),
                }
                stack.set_strengths([0.0])
                assert torch.equal(layer(x), before), "the undo must be exact"


def compute_relative_error(difference: Tensor, reference: Tensor) -> float:
    """RMS of a difference over that of the reference."""
    return (difference.norm() / reference.norm()).item()


def extra_bytes(layer: Int8LoraLayer) -> int:
    """Memory that a mode keeps beside the layer."""
    if isinstance(layer, DynamicLayer):
        return 0 if layer.branch is None else sum(t.nbytes for t in layer.branch.buffers())
    return layer.original.qdata.nbytes + layer.original.scale.nbytes


def measure_times(device: torch.device) -> Iterator[dict[str, Any]]:
    """Time of a layer with a branch over its time without, and time of a strength change.

    By backend and total rank.
    """
    if device.type == "cuda":
        backends: dict[str, Backend] = {"triton": Triton(), "torch_int_mm": TorchIntMM()}
        shapes, dtype = GPU_SHAPES, torch.bfloat16
    else:
        backends = {
            "vnni": Vnni(),
            "vnni, float branch": Vnni(int8_branch=False),
            "onednn": OneDnn(),
            "torch_int_mm": TorchIntMM(),
        }
        shapes, dtype = TIME_SHAPES, torch.float32
    for rows, k, n in shapes:
        weight, x = (draw_normal(n, k, seed=0) / k**0.5).to(device), make_inputs(rows, k).to(device, dtype)
        for name, backend in backends.items():
            plain = int8_layer(weight, ConvRot(), backend, dtype)
            calls: list[Callable[[], object]] = [partial(plain, x)]
            stacks = []
            for rank in RANKS:
                layer = int8_layer(weight, ConvRot(), backend, dtype)
                stacks.append(put_on(layer, weight, make_lora(n, k, rank, 0.03, weight.cpu()), "dynamic"))
                stacks[-1].set_strengths([1.0])
                calls.append(partial(layer, x))
            seconds = time_in_turns(calls, device, ROUNDS)
            for rank, stack, taken in zip(RANKS, stacks, seconds[1:], strict=True):
                ratios = sorted(a / b for a, b in zip(taken, seconds[0], strict=True))
                moved = time_in_turns(
                    [partial(stack.layers["0"].set_strengths, [s]) for s in (0.5, 1.0)], device, ROUNDS
                )
                yield {
                    "shape": f"{rows}x{k}x{n}",
                    "backend": name,
                    "rank": rank,
                    "work_share": round(rank * (k + n) / (k * n), 4),
                    "time_ratio": round(statistics.median(ratios), 4),
                    "low": round(ratios[ROUNDS // 4], 4),
                    "high": round(ratios[-1 - ROUNDS // 4], 4),
                    "plain_ms": round(1e3 * statistics.median(seconds[0]), 3),
                    "change_ms": round(1e3 * statistics.median(moved[0] + moved[1]), 4),
                    "extra_bytes": extra_bytes(stack.layers["0"]),
                }


def write_rows(name: str, rows: Iterator[dict[str, Any]]) -> None:
    """Rows into a table of results, and onto the terminal as they come."""
    found = []
    for row in rows:
        found.append(row)
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            ),
            flush=True,
        )
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0].keys())
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("errors", "times"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {asked.threads} threads, "
        f"{asked.device}"
    )
    if asked.what == "errors":
        write_rows("errors.csv", measure_errors())
    else:
        where = "gpu" if asked.device != "cpu" else f"cpu_{asked.threads}"
        write_rows(f"times_{where}.csv", measure_times(torch.device(asked.device)))
