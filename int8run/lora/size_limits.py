"""Changes that float32 cannot hold: finite parts of a file whose product, or a norm of it, is not finite.

The largest possible entry of a change follows from the largest entries of its parts, so nothing is multiplied
out. It is far above what training ends at, and a file beyond it is damaged.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.build_oft import OFT_PARTS
from int8run.lora.key_parsing import LOHA_PARTS, LOKR_PARTS
from int8run.lora.parse import get_part_name

# of a change at strength 1 and of each of its factors; norms of rows with such entries are finite in float32,
# and so is 20 times as much
LARGEST_CHANGE = 1e15
# of the norm of a row; norms of weights are about 1
LARGEST_MAGNITUDE = 1e6
# of blocks that become rotations, and of factors of their rows
LARGEST_ROTATION = 1e6

FACTOR_PARTS = ("down", "up", "mid", *LOHA_PARTS, *LOKR_PARTS)
# where it is not `LARGEST_CHANGE`; an alpha alone changes nothing
LARGEST_BY_PART = {
    "alpha": math.inf,
    **dict.fromkeys(("dora_scale", "magnitude"), LARGEST_MAGNITUDE),
    **dict.fromkeys(OFT_PARTS, LARGEST_ROTATION),
}


def check_peaks(peaks: Mapping[str, float]) -> None:
    """Check that a module's parts can be computed with.

    Args:
        peaks: the largest magnitude of each part.

    Raises:
        LoraError: with the part that is too large; a sentence without its subject.
    """
    for part, peak in peaks.items():
        largest = LARGEST_BY_PART.get(part, LARGEST_CHANGE)
        if peak > largest:
            raise LoraError(
                f"has values up to {peak:.3g} in its {get_part_name(part)}; at most {largest:g} can be "
                "computed with, the file is broken"
            )


def check_product(peaks: Mapping[str, float], change: LoraChange) -> None:
    """Check that what a module's parts make together is finite.

    Args:
        peaks: the largest magnitude of each part.
        change: what they make.

    Raises:
        LoraError: with the largest number that it may have; a sentence without its subject.
    """
    bound = bound_product(peaks, change)
    if bound > LARGEST_CHANGE:
        raise LoraError(
            f"changes a weight by up to {bound:.3g} (alpha / rank times its factors); at most "
            f"{LARGEST_CHANGE:g} can be computed with, the file is broken"
        )


def bound_product(peaks: Mapping[str, float], change: LoraChange) -> float:
    """No entry of a product of factors is larger, and none of a bias that is scaled with them."""
    delta = change.weight_delta
    if delta is None:
        return 0.0
    factors = [peaks[part] for part in FACTOR_PARTS if part in peaks]
    if not factors:
        return 0.0
    # a product of matrices sums over their inner size, which is the rank
    bound = float((delta.rank or 1) ** (len(factors) - 1))
    for factor in factors:
        bound *= factor
    return abs(delta.scale) * max(bound, peaks.get("up_bias", 0.0))


def check_fits(values: Tensor, dtype: torch.dtype) -> None:
    """Check that numbers are finite in the dtype that a layer keeps them in.

    Raises:
        LoraError: with both numbers; a sentence without its subject.
    """
    if dtype != torch.float16:
        return  # the others hold what float32 holds
    largest, limit = values.abs().max().item(), torch.finfo(dtype).max
    if not largest <= limit:
        raise LoraError(
            f"gets values up to {largest:.3g} by the LoRAs, and float16 holds at most {limit:g}; load the "
            "model in bfloat16 or float32, or take a smaller strength"
        )
