"""How many bits the weight of each layer gets (`int8.bits`), and why some layers have others.

`int8run.ptq.quantize` rounds each layer to the bits of its plan.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from int8run.backends.row_decoder import RowDecoder
from int8run.layers.grouped_int8_linear import GroupedInt8Linear
from int8run.layers.int8_conv import Int8Layer
from int8run.layers.plan import ATTENTION, CONV, LayerPlan
from int8run.quant.grouped_rounding import GroupLayout
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


def assign_bits(plans: Sequence[LayerPlan], layout: GroupLayout | None) -> None:
    """Note in the plans which bits their weights get; log those that cannot have the bits that were asked.

    Args:
        plans: of the layers that are quantized here.
        layout: of weights of 4 or 6 bits; None: 8 bits were asked for.
    """
    if layout is None:
        return
    plans = [plan for plan in plans if plan.kind != ATTENTION]
    for plan in plans:
        plan.bits_reason = find_bits_obstacle(plan, layout) or ""
        plan.bits = 8 if plan.bits_reason else layout.bits
    warn_other_bits(plans, layout.bits)


def warn_other_bits(plans: Sequence[LayerPlan], bits: int | str) -> None:
    """Log the layers that have 8 bits because they cannot have those that were asked for."""
    counts = Counter(plan.bits_reason for plan in plans if plan.bits_reason)
    if counts:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in counts.items())
        log.warning(
            "int8.bits=%s: %d of %s have 8 bits (%s)",
            bits,
            counts.total(),
            count_noun(len(plans), "layer"),
            reasons,
        )


def find_bits_obstacle(plan: LayerPlan, layout: GroupLayout) -> str | None:
    """Why a layer cannot have the bits of a layout; None: it can."""
    if plan.kind == CONV:
        return "convolutions have 8 bits"
    return layout.find_obstacle(plan.in_features)


def report_decoding(layers: Iterable[Int8Layer]) -> None:
    """Log how the layers of 4 and 6 bits are decoded: in the product, or some rows at a time.

    Args:
        layers: of one model.
    """
    ways: Counter[str] = Counter()
    for layer in layers:
        if isinstance(layer, GroupedInt8Linear):
            ways[describe_decoding(layer)] += 1
    for way, count in ways.items():
        log.info("%s %s", count_noun(count, "layer"), way)


def describe_decoding(layer: GroupedInt8Linear) -> str:
    """How one layer is decoded, as the end of a sentence."""
    where = f"of {layer.bits} bits on backend {layer.backend.name}"
    if isinstance(layer.multiplier, RowDecoder):
        return f"{where}: decoded to int8 at each call, some rows at a time"
    return f"{where}: decoded inside the product"
