"""The part of a run on a GPU that checks and times weights of 4 and 6 bits; `parts.py` starts it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from part_report import ROWS, TIMED_ROUNDS, Report, shrink

# rows, in and out: one row, few, and FLUX's image and text tokens
PRODUCTS = ((1, 3072, 12288), (16, 3072, 12288), (512, 3072, 3072), (ROWS, 3072, 12288), (ROWS, 12288, 3072))


def measure_grouped(device: str, report: Report, words: Sequence[str]) -> None:
    """Products with 4 and 6 bits against those with the int8 weight that they decode to: equal, and how fast.

    The input is quantized before; both products take the tiles that the backend chooses.
    """
    import ours
    import torch
    from gpu_clock import make_clock

    from int8run.backends.row_decoder import choose_multiplier
    from int8run.quant.grouped_rounding import GroupLayout, draw_grouped_weight

    place = torch.device(device)
    generator = torch.Generator(place).manual_seed(0)
    clock, backend = make_clock(place), ours.triton_backend(place)
    for size in PRODUCTS:
        m, k, n = (max(shrink(length, device), 1 if length == size[0] else 256) for length in size)
        x = backend.quantize(torch.randn(m, k, device=place))
        for bits in (4, 6):
            weight = draw_grouped_weight(n, k, GroupLayout(bits), generator)
            multiplier = choose_multiplier(backend, weight)
            decoded = weight.decode()
            w_scale = weight.scale[:, 0].contiguous()
            grouped = partial(
                multiply, multiplier.grouped_linear, x, multiplier.pack_grouped_weight(weight), w_scale
            )
            int8 = partial(multiply, backend.linear, x, backend.pack_weight(decoded), w_scale)
            times = clock.time_medians({"grouped": grouped, "int8": int8}, TIMED_ROUNDS)
            report.add_row(
                size=f"{m}x{k}x{n}",
                bits=bits,
                by=type(multiplier).__name__,
                equal=torch.equal(grouped(0), int8(0)),
                grouped_us=1e6 * times["grouped"],
                int8_us=1e6 * times["int8"],
                ratio=times["grouped"] / times["int8"],
                bytes_ratio=weight.nbytes / decoded.qdata.nbytes,
            )


def multiply(product: Any, x: Any, packed: Any, w_scale: Any, number: int) -> Any:
    """One product, as a layer calls it."""
    import torch

    return product(x, packed, w_scale, dtype=torch.bfloat16)
