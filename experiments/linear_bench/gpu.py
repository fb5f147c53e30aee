"""INT8 linear layers on a CUDA GPU, bfloat16 in and out.

The Linears of one step of three models, every method interleaved.

    python experiments/linear_bench/gpu.py                   # all models, all methods
    python experiments/linear_bench/gpu.py --models flux --rounds 50
    python experiments/linear_bench/gpu.py --device cpu --only int8run   # a dry run on tiny sizes: no numbers

The tests of kernels and backends run first. A method whose error is above its limit is refused and not timed.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import methods
import ours
import torch
import torch.nn.functional as F
from case import Case, make_case
from gpu_clock import DRY_SHRINK, Call, Ceilings, Clock, make_clock, measure_ceilings
from gpu_tables import Size, format_size, format_steps
from shapes import MODELS, LayerShape
from sidebyside import (
    Reply,
    collect_facts,
    compute_quartiles,
    describe_error,
    describe_machine,
    is_wanted,
    run_gate,
    write_report,
)
from toolkit import ToolkitLinear
from torch import Tensor

from int8run.errors import BackendError
from int8run.kernels.hadamard.reference import regular_hadamard, rotate_groups

Forward = Callable[[Tensor], Tensor]
Build = Callable[[Case], Forward]
DTYPE = torch.bfloat16
BASE = "bf16 cuBLAS"
OURS = "int8run triton"
BEST_TILE = f"{OURS}, best tile"
LIMIT = 0.02
RANKS = (16, 64)
INPUTS = 4  # different x, so that none is in a cache
TILE_ROUNDS = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="methods with one of these words in their name"
    )
    parser.add_argument("--json", type=Path, default=Path("outputs/linear_bench_gpu.json"))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N; cpu: a dry run on tiny sizes")
    parser.add_argument(
        "--tiles",
        nargs="+",
        metavar="TILE",
        help="128x256x128/8/3 (block, warps, stages), /hopper for that kernel; default: all",
    )
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    parser.add_argument("--table", help="file that keeps the fastest tiles; else that of backend=auto")
    parser.add_argument("--no-tune", action="store_true", help="do not try the tiles of our kernel")
    return parser.parse_args()


def make_cublas(case: Case) -> Forward:
    """The base of all ratios."""
    return lambda x: F.linear(x, case.weight, case.bias)


def toolkit_triton(case: Case) -> Forward:
    """ComfyUI-INT8-Toolkit's Triton path, restated."""
    from toolkit_triton import ToolkitTritonLinear

    return ToolkitTritonLinear(case.linear()[0])


def toolkit_int_mm(case: Case) -> Forward:
    """ComfyUI-INT8-Toolkit's torch_int_mm path, restated."""
    return ToolkitLinear(case.linear()[0])


def comfy_kitchen(case: Case, group: int = 0) -> Forward:
    """comfy_kitchen.int8_linear with a scale per row; `group` rotates x inside it."""
    import comfy_kitchen

    weight = case.weight
    rotation = {}
    if group:
        hadamard = regular_hadamard(group).to(weight.device)
        weight = rotate_groups(weight.float(), hadamard.T)
        rotation = dict(convrot=True, convrot_groupsize=group)
    qdata, scale = comfy_kitchen.quantize_int8_rowwise(weight)
    return lambda x: comfy_kitchen.int8_linear(x, qdata, scale, case.bias, out_dtype=x.dtype, **rotation)


def int8run_int_mm(case: Case) -> Forward:
    """Our torch_int_mm backend, as the runner builds it."""
    return ours.int8_layer(case, ours.make_backend("torch_int_mm", "TorchIntMM"))


def int8run_triton(
    case: Case, outlier: str = "none", tile: Any = None, branch: Callable[..., Forward] | None = None
) -> Forward:
    """Our Triton backend, as the runner builds it.

    Args:
        case: the layer.
        outlier: `none` or `convrot`.
        tile: of the kernel; None: its own choice.
        branch: adds the case's LoRA to the layer.
    """
    layer = ours.int8_layer(case, ours.triton_backend(case.x.device, tile), outlier)
    return layer if branch is None else branch(case, layer)


METHODS: dict[str, Build] = {
    BASE: make_cublas,
    "torchao eager": methods.torchao_eager,
    "torchao compile": methods.torchao_compile,
    "sdnq": methods.make_sdnq,
    "Toolkit triton": toolkit_triton,
    "Toolkit torch_int_mm": toolkit_int_mm,
    "comfy_kitchen": comfy_kitchen,
    "comfy_kitchen, convrot": partial(comfy_kitchen, group=256),
    "int8run torch_int_mm": int8run_int_mm,
    OURS: int8run_triton,
    f"{OURS}, convrot": partial(int8run_triton, outlier="convrot"),
}


def try_method(build: Build, case: Case) -> tuple[Forward | None, Reply]:
    """A method on one case: the call, and its error or why it is not timed."""
    try:
        forward = build(case)
        error = case.error(forward(case.x))
    except Exception as failure:  # noqa: BLE001  whatever a peer raises is its result here
        return None, {"failed": describe_error(failure)}
    if error <= LIMIT:
        return forward, {"error": error}
    return None, {"error": error, "refused": f"error {error:.4f}, the limit is {LIMIT:g}"}


def count_tera_ops(size: Size, seconds: float) -> float:
    """10^12 multiplications and additions per second."""
    m, k, n = size
    return 2 * m * k * n / seconds / 1e12


def tune_tiles(clock: Clock, case: Case, wanted: Sequence[str] | None) -> tuple[Any, list[Reply]]:
    """Time our product alone with every candidate tile, or those that are wanted.

    Returns:
        the fastest tile, None where none could run; and what each gave, the fastest first.
    """
    product = ours.triton_product(case)
    tiles = {str(tile): tile for tile in ours.triton_tiles(case, wanted)}
    calls: dict[str, Call] = {}
    records = {}
    for name, tile in tiles.items():
        call = partial(call_with_tile, product, tile)
        forward, record = try_method(lambda _, call=call: call, case)
        records[name] = {"tile": name, **record}
        if forward is not None:
            calls[name] = call
    if not calls:
        return None, list(records.values())

    seconds = clock.time_medians(calls, TILE_ROUNDS)
    size = (*case.x.shape, len(case.weight))
    for name, spent in seconds.items():
        records[name] |= {"us": 1e6 * spent, "tops": count_tera_ops(size, spent)}
    fastest_first = sorted(records.values(), key=lambda record: record.get("us", float("inf")))
    return tiles[min(seconds, key=seconds.__getitem__)], fastest_first


def call_with_tile(product: Callable[[Any], Tensor], tile: Any, _: object) -> Tensor:
    """Our product with one tile; the product has its x already."""
    return product(tile)


def measure_size(
    clock: Clock, ceilings: Ceilings, size: Size, args: argparse.Namespace, device: torch.device
) -> Reply:
    """Time all methods, the tiles and the LoRA branches on one size.

    Returns:
        `methods`: a record of each; `tiles`: one of each tile, where they were tried.
    """
    torch._dynamo.reset()
    case = make_case(*size, device=device, dtype=DTYPE)
    report: Reply = {}
    builds: dict[str, tuple[Build, Case]] = {name: (build, case) for name, build in METHODS.items()}
    if not args.no_tune and is_wanted(BEST_TILE, args.only):
        try:
            tile, report["tiles"] = tune_tiles(clock, case, args.tiles)
            builds[BEST_TILE] = (partial(int8run_triton, tile=tile), case)
            if tile is not None:
                ours.keep_tile(case, tile, args.table)
        except (ImportError, NotImplementedError) as error:
            print(f"no tiles to try: {error}", file=sys.stderr)
    for rank in RANKS:
        with_lora = make_case(*size, rank=rank, device=device, dtype=DTYPE)
        in_kernels = partial(int8run_triton, branch=ours.with_branch)
        as_two_products = partial(int8run_triton, branch=methods.make_naive_lora)
        builds[f"{OURS}, LoRA r{rank}"] = (in_kernels, with_lora)
        builds[f"{OURS}, naive LoRA r{rank}"] = (as_two_products, with_lora)

    inputs = [case.x, *(torch.randn_like(case.x) for _ in range(INPUTS - 1))]
    calls: dict[str, Call] = {}
    records: dict[str, Reply] = {}
    for name, (build, its_case) in builds.items():
        if name != BASE and not is_wanted(name, args.only):
            continue
        forward, records[name] = try_method(build, its_case)
        if forward is not None:
            calls[name] = partial(call_with_input, forward, inputs)

    seconds = clock.time_rounds(calls, args.rounds)
    add_times(records, seconds, size, ceilings)
    for name, call in calls.items():
        records[name]["launch_us"] = 1e6 * clock.time_launch(call)
    return report | {"methods": records}


def call_with_input(forward: Forward, inputs: Sequence[Tensor], number: int) -> Tensor:
    """Call a layer with the input of a round."""
    return forward(inputs[number % len(inputs)])


def add_times(
    records: Mapping[str, Reply], seconds: Mapping[str, Sequence[float]], size: Size, ceilings: Ceilings
) -> None:
    """Write the times of methods into their records, and what follows from them.

    Args:
        records: of all methods.
        seconds: of each method that was timed, round by round.
        size: M, K and N.
        ceilings: what the GPU can reach.
    """
    for name, its_seconds in seconds.items():
        spent = median(its_seconds)
        least, limited_by = ceilings.limit(size, int8=name != BASE)
        ratios = [base / own for base, own in zip(seconds[BASE], its_seconds, strict=True)]
        records[name] |= {
            "us": 1e6 * spent,
            "ratio": asdict(compute_quartiles(ratios)),
            "tops": count_tera_ops(size, spent),
            "limit_share": least / spent,
            "limited_by": limited_by,
        }
        if name.startswith(f"{OURS}, ") and OURS in seconds:
            extra = [own / plain - 1 for plain, own in zip(seconds[OURS], its_seconds, strict=True)]
            records[name]["extra"] = asdict(compute_quartiles(extra))


def group_by_size(models: Mapping[str, Sequence[LayerShape]]) -> dict[Size, list[LayerShape]]:
    """The layers of all models by their size: each size is measured once."""
    by_size: dict[Size, list[LayerShape]] = {}
    for shapes in models.values():
        for shape in shapes:
            by_size.setdefault(shape.size, []).append(shape)
    return by_size


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "this benchmark needs a CUDA GPU; on a CPU run experiments/linear_bench/bench.py", file=sys.stderr
        )
        sys.exit(BackendError.exit_code)
    if not args.no_gate:
        run_gate()
    facts = collect_facts(device)
    print(describe_machine(facts))
    clock = make_clock(device)
    ceilings = measure_ceilings(clock, device)
    print(
        f"measured ceilings: bf16 {ceilings.bf16_ops / 1e12:.0f} TFLOPS, "
        f"int8 {ceilings.int8_ops / 1e12:.0f} TOPS ({ceilings.int8_from}), "
        f"copy {ceilings.bytes / 1e12:.2f} TB/s\n"
    )

    models = {name: MODELS[name]() for name in args.models}
    if device.type == "cpu":
        print("a dry run on a CPU: sizes are tiny, and the definition runs in the place of our kernels")
        models = {name: [shape.shrink(DRY_SHRINK) for shape in shapes] for name, shapes in models.items()}
    reports: dict[Size, Reply] = {}
    saved = []
    for size, shapes in group_by_size(models).items():
        report = reports[size] = measure_size(clock, ceilings, size, args, device)
        print(f"{format_size(shapes, report)}\n", flush=True)
        saved.append({"layers": [asdict(shape) for shape in shapes], **report})
        # after each size, so that a run that is cut off leaves what it has
        write_report(args.json, facts | {"ceilings": asdict(ceilings), "sizes": saved})
    print(f"{format_steps(models, reports, BASE)}\n\nwritten to {args.json}")


if __name__ == "__main__":
    main()
