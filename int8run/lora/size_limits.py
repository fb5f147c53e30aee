"""Changes that float32 cannot hold: finite parts of a file whose product, or a norm of it, is not finite.

The largest possible entry of a change follows from the largest entries of its parts, so nothing is multiplied
out. It is far above what training ends at, and a file beyond it is damaged.
"""

from collections.abc import Mapping

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.key_parsing import LOHA_PARTS, LOKR_PARTS

# of a change at strength 1; norms of rows with such entries are finite in float32, and so is 20 times as much
LARGEST_CHANGE = 1e15
# of the norm of a row; norms of weights are about 1
LARGEST_MAGNITUDE = 1e6

FACTOR_PARTS = ("down", "up", "mid", *LOHA_PARTS, *LOKR_PARTS)
DENSE_PARTS = ("diff", "w_norm", "weight", "diff_b", "b_norm")
MAGNITUDE_PARTS = ("dora_scale", "magnitude")


def check_size(peaks: Mapping[str, float], change: LoraChange) -> None:
    """Check that what a module's parts make together is finite.

    Args:
        peaks: the largest magnitude of each part.
        change: what they make.

    Raises:
        LoraError: with the part or product that is too large; a sentence without its subject.
    """
    for part in MAGNITUDE_PARTS:
        if peaks.get(part, 0) > LARGEST_MAGNITUDE:
            raise LoraError(
                f"has DoRA norms up to {peaks[part]:.3g}; at most {LARGEST_MAGNITUDE:g} can be computed "
                "with, the file is broken"
            )
    largest = max(bound_product(peaks, change), *(peaks.get(part, 0) for part in DENSE_PARTS))
    if largest > LARGEST_CHANGE:
        raise LoraError(
            f"changes a weight by up to {largest:.3g} (alpha / rank times its factors); at most "
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
