"""The parts of a run on a GPU that no other experiment measures; `run.py` starts each in its own process.

    python experiments/gpu/parts.py bandwidth --device cuda --json FILE

Rows are written to the file as they come. With `--device cpu` a part does the same on tiny sizes, with the
definition in the place of our kernels: its numbers mean nothing.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from grouped import measure_grouped
from operators import measure_attention, measure_convolutions
from part_report import ROWS, TIMED_ROUNDS, Report, choose_dtype, shrink

EXPERIMENTS = Path(__file__).parents[1]
REPOSITORY = EXPERIMENTS.parent
# two of the folders have a gpu.py: that of whole models is found first
FOLDERS = (REPOSITORY, REPOSITORY / "tests", EXPERIMENTS / "model_bench", EXPERIMENTS / "linear_bench")
sys.path[:0] = map(str, FOLDERS)

PRODUCTS = ((ROWS, 3072, 3072), (ROWS, 3072, 12288), (ROWS, 15360, 3072), (512, 3072, 3072))
# K, rotation and rank: rows that fit into registers, rows that are walked along, with a LoRA
QUANTIZATIONS = ((3072, 0, 0), (3072, 256, 0), (3072, 0, 64), (15360, 0, 0), (15360, 256, 0), (15360, 0, 64))
RANK = 64
MOST_PROCESSES = 16
GIB = 2**30


# -- import ------------------------------------------------------------------------------------------


def import_all(device: str, report: Report, words: Sequence[str]) -> None:
    """Import what every other part needs, and name the versions."""
    import diffusers
    import torch
    import triton

    import int8run.api
    import int8run.tasks.run
    from int8run.utils.hardware import describe_instructions, get_device_name

    del int8run  # imported to see that it can be
    place = torch.device(device)
    report.values = {
        "device": get_device_name(place),
        "has": describe_instructions(place),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
    }
    report.write()


# -- compile -----------------------------------------------------------------------------------------


def compile_tiles(device: str, report: Report, words: Sequence[str]) -> None:
    """Compile the default tiles and those that are asked for, each in a process; later parts find them."""
    if device == "cpu":
        compile_ahead(report)
        return
    import ours

    tiles = [*list_default_tiles(device), *map(ours.parse_tile, words)]
    with ProcessPoolExecutor(min(MOST_PROCESSES, len(tiles)), get_context("spawn")) as pool:
        futures = {pool.submit(compile_tile, device, tile): tile for tile in tiles}
        for future in as_completed(futures):
            report.add_row(tile=str(futures[future]), **future.result())


def compile_ahead(report: Report) -> None:
    """Compile one build for a Hopper GPU without one."""
    from support.static_builds import builds
    from support.static_gate import count

    build = builds("sm_90")[0]
    counts = count(build)
    report.add_row(tile=build.name, registers=counts.registers, spills=counts.spills)


def list_default_tiles(device: str) -> list[Any]:
    """The tile of each bucket of rows."""
    import torch

    from int8run.kernels.int8_linear.tile import BUCKETS, choose_tile
    from int8run.utils.hardware import get_gpu_architecture

    architecture = get_gpu_architecture(torch.device(device))
    return [choose_tile(architecture, rows) for rows in BUCKETS]


def compile_tile(device: str, tile: Any) -> dict[str, Any]:
    """Run one tile once without and with a LoRA branch, in its own process: seconds, or why it cannot."""
    import time

    import ours
    from case import make_case
    from sidebyside import describe_error

    started = time.perf_counter()
    try:
        for rank in (0, RANK):
            case = make_case(256, 3072, 3072, rank=rank, device=device, dtype=choose_dtype())
            layer = ours.int8_layer(case, ours.triton_backend(case.x.device, tile))
            if rank:
                layer = ours.with_branch(case, layer)
            error = case.error(layer(case.x))
    except Exception as failure:  # noqa: BLE001  whatever a compiler raises is the result of this tile
        return {"failed": describe_error(failure)}
    return {"seconds": time.perf_counter() - started, "error": error}


# -- torch's own product -----------------------------------------------------------------------------


def profile_int_mm(device: str, report: Report, words: Sequence[str]) -> None:
    """Which kernel `torch._int_mm` takes for each size of FLUX, by torch's profiler, and its time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    for size in PRODUCTS:
        m, k, n = (shrink(length, device) for length in size)
        q = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        torch._int_mm(q, weight.T)
        with profile(activities=[activity]) as profiled:
            torch._int_mm(q, weight.T)
            if device != "cpu":
                torch.cuda.synchronize(device)
        events = profiled.key_averages()
        slowest = max(events, key=lambda event: read_microseconds(event, device))
        spent = read_microseconds(slowest, device)
        size_name = f"{m}x{k}x{n}"
        report.add_row(size=size_name, kernel=slowest.key[:90], us=spent, tops=count_tera_ops(m, k, n, spent))


def read_microseconds(event: Any, device: str) -> float:
    """Time of a profiled kernel itself."""
    return float(event.self_cpu_time_total if device == "cpu" else event.self_device_time_total)


def count_tera_ops(m: int, k: int, n: int, microseconds: float) -> float:
    """10^12 multiplications and additions per second."""
    return 2e-6 * m * k * n / max(microseconds, 1e-3)


# -- bandwidth ---------------------------------------------------------------------------------------


def measure_bandwidth(device: str, report: Report, words: Sequence[str]) -> None:
    """Bytes per second of the quantization: x is read and its integers are written, once at best."""
    import ours
    import torch
    from gpu_clock import make_clock

    from int8run.kernels.hadamard.reference import Rotation, regular_hadamard

    place, dtype = torch.device(device), choose_dtype()
    clock, backend = make_clock(place), ours.triton_backend(place)
    for width, rotation, rank in QUANTIZATIONS:
        rows, k = shrink(ROWS, device), shrink(width, device)
        x = torch.randn(rows, k, device=place, dtype=dtype)
        group = min(rotation, 16) if device == "cpu" else rotation
        matrix = Rotation(regular_hadamard(group).to(place), False) if group else None
        down = torch.randn(rank, k, device=place, dtype=dtype) if rank else None
        call = partial(quantize_once, backend, x, matrix, down)
        seconds = clock.time_medians({"quantize": call}, TIMED_ROUNDS)["quantize"]
        report.add_row(
            rows=rows, k=k, rotation=group, rank=rank, us=1e6 * seconds, gb_per_s=3e-9 * rows * k / seconds
        )


def quantize_once(backend: Any, x: Any, rotation: Any, down: Any, number: int) -> object:
    """The quantization of one layer's input, as the layer calls it."""
    return backend.quantize(x, rotation=rotation, down=down)


# -- offload -----------------------------------------------------------------------------------------


def measure_offload(device: str, report: Report, words: Sequence[str]) -> None:
    """A step of an INT8 FLUX whose blocks wait in memory: its time, and how much of the GPU it takes."""
    import flux
    import gpu as model_gpu
    import torch

    from int8run.layers.assemble import copy_sharing_tensors
    from int8run.pipeline.offload import GROUP_STREAM, find_offload_device, set_offload

    place = torch.device(device)
    size = flux.SIZES["tiny" if device == "cpu" else "full"]
    model, call = flux.make_model(size, device, choose_dtype())
    int8_model = model_gpu.quantize_with_triton(model, call, "family")
    del model
    for mode in ("none", "group", GROUP_STREAM):
        if mode == GROUP_STREAM and device == "cpu":
            report.add_row(mode=mode, skipped="a CPU has no streams")
            continue
        moved = copy_sharing_tensors(int8_model.to(find_offload_device(mode, place)))
        set_offload(SimpleNamespace(components={"transformer": moved}), mode, place)
        with torch.no_grad():
            for _ in range(2):  # with streams the first step finds out the order of the blocks
                moved(**call)
            seconds = min(model_gpu.time_step(moved, call) for _ in range(3))
            workspace = model_gpu.measure_workspace(moved, call)
        resident = 0 if device == "cpu" else torch.cuda.memory_allocated(place)
        report.add_row(mode=mode, ms=1000 * seconds, resident_gib=resident / GIB, step_gib=workspace / GIB)
        del moved


# -- one product -------------------------------------------------------------------------------------


def run_product(device: str, report: Report, words: Sequence[str]) -> None:
    """One layer of FLUX, once: what a profiler of the GPU looks at."""
    import ours
    import torch
    from case import make_case

    m, k, n = (shrink(length, device) for length in PRODUCTS[1])
    case = make_case(m, k, n, device=device, dtype=choose_dtype())
    layer = ours.int8_layer(case, ours.triton_backend(torch.device(device)))
    report.add_row(size=f"{m}x{k}x{n}", error=case.error(layer(case.x)))


PARTS: Mapping[str, Callable[[str, Report, Sequence[str]], None]] = {
    "import": import_all,
    "compile": compile_tiles,
    "int_mm": profile_int_mm,
    "bandwidth": measure_bandwidth,
    "grouped": measure_grouped,
    "attention": measure_attention,
    "convolutions": measure_convolutions,
    "offload": measure_offload,
    "product": run_product,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiles", nargs="+", default=[], help="of `compile`, beside the defaults")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    args.json.unlink(missing_ok=True)
    PARTS[args.part](args.device, Report(args.json), args.tiles)


if __name__ == "__main__":
    main()
