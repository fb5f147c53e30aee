"""Which attentions of a denoiser become INT8: planned from one traced step, measured on real activations.

`pipeline.quantize_attention` calls these in turn and writes the plans into `layers.csv`. Nothing here knows
where a model comes from.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from int8run.backends.attention import AttentionBackend, choose_attention_method
from int8run.errors import ConfigError
from int8run.generate.capture_attention import watch_attention
from int8run.layers.int8_attention import Int8Attention
from int8run.layers.plan import ATTENTION, LayerPlan
from int8run.utils.attention_call import AttentionCall

log = logging.getLogger(__name__)

OWN_PRODUCTS = "multiplies its matrices itself, not by torch's scaled_dot_product_attention"


class AttentionShape(NamedTuple):
    """What one call of an attention multiplies.

    Args:
        batch: B.
        heads: of the queries.
        kv_heads: of keys and values.
        queries: tokens of the queries.
        keys: tokens of keys and values.
        width: of a head of queries and keys.
        value_width: of a head of values.
        mask: dtype of the mask; empty: there is none.
        is_causal: whether row i attends to keys 0 .. i only.
        mask_shape: of the mask, broadcast to [B, Hq, Lq, Lk]; empty: there is none.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    mask: str = ""
    is_causal: bool = False
    mask_shape: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """All numbers but those of the mask."""
        return (
            self.batch,
            self.heads,
            self.kv_heads,
            self.queries,
            self.keys,
            self.width,
            self.value_width,
        )

    @property
    def macs(self) -> int:
        """Multiply-adds of both products, masked ones included."""
        return self.batch * self.heads * self.queries * self.keys * (self.width + self.value_width)

    def __str__(self) -> str:
        """`24 heads, 4608 x 512 tokens`, as `layers.csv` shows it beside the widths."""
        heads = f"{self.heads} heads"
        if self.kv_heads != self.heads:
            heads = f"{self.heads} heads on {self.kv_heads}"
        return f"{heads}, {self.queries} x {self.keys} tokens"


def read_shape(call: AttentionCall) -> AttentionShape:
    """The shape of a call whose tensors have four dimensions."""
    batch, heads, queries, width = call.query.shape
    mask = "" if call.attn_mask is None else str(call.attn_mask.dtype).removeprefix("torch.")
    return AttentionShape(
        batch=batch,
        heads=heads,
        kv_heads=call.key.shape[1],
        queries=queries,
        keys=call.key.shape[2],
        width=width,
        value_width=call.value.shape[3],
        mask=mask,
        is_causal=call.is_causal,
        mask_shape=() if call.attn_mask is None else tuple(call.attn_mask.shape),
    )


def find_call_reason(call: AttentionCall) -> str | None:
    """Why a call cannot be computed in INT8; None: it can."""
    tensors = (call.query, call.key, call.value)
    num_dims = {tensor.dim() for tensor in tensors}
    if num_dims != {4}:
        return f"its queries have {call.query.dim()} dimensions, not 4"
    if call.dropout_p:
        return f"drops {call.dropout_p:.0%} of its probabilities at random"
    if len({tensor.shape[0] for tensor in tensors}) > 1:
        return "its queries and keys are of different batches"
    if call.query.shape[1] % call.key.shape[1]:
        return f"{call.query.shape[1]} heads of queries cannot share {call.key.shape[1]} heads of keys"
    return None


@dataclass
class AttentionTrace:
    """What one module computed in the traced step.

    Args:
        shapes: of its calls, with the number of each.
        reason: why INT8 cannot have it; None: it can.
    """

    shapes: Counter[AttentionShape] = field(default_factory=Counter)
    reason: str | None = None

    @property
    def macs(self) -> int:
        """Multiply-adds of all calls."""
        return sum(shape.macs * count for shape, count in self.shapes.items())

    @property
    def widths(self) -> tuple[int, int]:
        """Width of a head of keys and of values; zeros where no call was understood."""
        for shape in self.shapes:
            return shape.width, shape.value_width
        return 0, 0


@dataclass(frozen=True)
class TracedAttentions:
    """The attentions of a denoiser, by the name of the module that computes them.

    Fill it with `watch_attention(denoiser, traced.note_call, traced.note_softmax)`.
    """

    traces: dict[str, AttentionTrace] = field(default_factory=dict)
    own_products: dict[str, None] = field(default_factory=dict)  # a set that keeps its order

    def note_call(self, name: str, call: AttentionCall, output: Tensor) -> None:
        """Note an attention that a module computed."""
        trace = self.traces.setdefault(name, AttentionTrace())
        reason = find_call_reason(call)
        if reason is not None:
            trace.reason = reason
            return
        shape = read_shape(call)
        if trace.shapes and trace.widths != (shape.width, shape.value_width):
            trace.reason = "its calls have heads of different widths"
        trace.shapes[shape] += 1

    def note_softmax(self, name: str) -> None:
        """Note a module that computes a softmax itself."""
        self.own_products[name] = None

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-adds of each module's attention."""
        return {name: trace.macs for name, trace in self.traces.items()}

    def list_names(self) -> list[str]:
        """The modules that compute attention, those that multiply themselves included."""
        return [*self.traces, *(name for name in self.own_products if name not in self.traces)]


@dataclass
class PlannedAttention:
    """What happens to the attention of one module.

    Args:
        plan: its row in `layers.csv`.
        shapes: of its calls, those with the most multiply-adds first.
        macs: multiply-adds of all its calls in one step.
        layer: what computes it in INT8; None: it stays float.
    """

    plan: LayerPlan
    shapes: Sequence[AttentionShape]
    layer: Int8Attention | None
    macs: int = 0

    def leave_float(self, reason: str, *, is_choice: bool = False) -> None:
        """Keep it float after all.

        Args:
            reason: why.
            is_choice: whether INT8 could have computed it well.
        """
        measured = dict(self.plan.measured)
        self.plan.skip(reason)
        self.plan.measured.update(measured)  # what was measured is the reason
        self.plan.is_float_by_choice = is_choice
        self.layer = None


def list_int8_attentions(planned: Sequence[PlannedAttention]) -> dict[str, Int8Attention]:
    """What computes those in INT8, by the name of the module."""
    layers = {}
    for attention in planned:
        if attention.layer is not None:
            layers[attention.plan.name] = attention.layer
    return layers


def plan_traced(
    traced: TracedAttentions, find_skip_reason: Callable[[str], str | None]
) -> list[PlannedAttention]:
    """A plan for every module that computes attention; `give_backend` makes them INT8.

    Args:
        traced: what one step showed.
        find_skip_reason: gives the family's reason to keep a module of that name float, or None.
    """
    names = traced.list_names()
    planned = []
    for name in names:
        trace = traced.traces.get(name, AttentionTrace(reason=OWN_PRODUCTS))
        reason = trace.reason or find_skip_reason(name)
        if reason is None and any(other.startswith(f"{name}.") for other in names):
            reason = "other attentions run inside it"
        width, value_width = trace.widths
        shapes = sorted(trace.shapes, key=lambda shape: shape.macs, reverse=True)
        plan = LayerPlan(
            name=name,
            in_features=width,
            out_features=value_width,
            skip_reason=reason,
            kind=ATTENTION,
            shape="; ".join(map(str, shapes)),
        )
        planned.append(PlannedAttention(plan, shapes, layer=None, macs=trace.macs))
    return planned


def give_backend(planned: Sequence[PlannedAttention], backend: AttentionBackend, *, asked: str) -> None:
    """Let a backend compute the attentions that have no reason to stay float.

    Args:
        planned: are changed.
        backend: takes them.
        asked: `backend=` of the config, for the table.
    """
    for attention in planned:
        plan = attention.plan
        if plan.skip_reason is not None:
            continue
        reason = backend.unsupported_width_reason(plan.in_features, plan.out_features)
        if reason is not None:
            attention.leave_float(reason)
            continue
        method = choose_attention_method(plan.in_features)
        plan.outlier = method.label
        plan.rounding = "absmax"
        plan.backend_asked = asked
        plan.backend_used = backend.name
        plan.instructions = backend.instruction_set
        attention.layer = Int8Attention(backend, method)


class SignalAndNoise:
    """Sums of squares of what an attention computes in float, and of INT8's error, over several calls."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, expected: Tensor, output: Tensor) -> None:
        """Add one call."""
        self.signal += expected.double().pow(2).sum().item()
        self.noise += (expected.double() - output.double()).pow(2).sum().item()

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in dB; infinity when equal."""
        if self.noise == 0:
            return math.inf
        if self.signal == 0:
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


@torch.no_grad()
def measure_attentions(
    denoiser: nn.Module, calls: Sequence[Mapping[str, Any]], planned: Sequence[PlannedAttention]
) -> None:
    """Note the SQNR of each INT8 attention's output in its plan: both get the same queries, keys and values.

    Of several calls it is that of the worst.

    Args:
        denoiser: whose activations they are; its own attention is float.
        calls: its arguments at different steps, by name.
        planned: of its attentions; those that stay float are not measured.

    Raises:
        ConfigError: where INT8 computes NaN or infinity and float does not.
    """
    layers = {attention.plan.name: attention.layer for attention in planned}
    sums: dict[str, SignalAndNoise] = {}  # of one call
    least: dict[str, float] = {}

    def measure(name: str, call: AttentionCall, expected: Tensor) -> None:
        layer = layers.get(name)
        if layer is None:
            return
        output = layer.attend(call)
        if torch.isfinite(expected).all() and not torch.isfinite(output).all():
            raise ConfigError(
                f"{name}: the INT8 attention computes NaN or infinity where the float one does not, in the "
                "first steps; set int8.attention=float, or choose another backend="
            )
        sums.setdefault(name, SignalAndNoise()).add(expected, output)

    with watch_attention(denoiser, measure):
        for call in calls:
            sums.clear()
            denoiser(**call)
            for name, added in sums.items():
                least[name] = choose_worse(least.get(name, math.inf), added.sqnr_db)
    for attention in planned:
        if attention.plan.name in least:
            attention.plan.measured["output_sqnr_db"] = least[attention.plan.name]


def choose_worse(first: float, second: float) -> float:
    """The lower of two ratios; NaN is the worst."""
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return min(first, second)


def leave_inexact_float(planned: Sequence[PlannedAttention], limit_db: float) -> None:
    """Keep attentions float whose INT8 output has not enough SQNR, for `int8.attention=auto`.

    Args:
        planned: are changed.
        limit_db: the least SQNR.
    """
    for attention in planned:
        sqnr_db = attention.plan.measured.get("output_sqnr_db", math.inf)
        if attention.layer is not None and not sqnr_db >= limit_db:  # also for NaN
            attention.leave_float(
                f"its output has {sqnr_db:.1f} dB in INT8, int8.attention_min_sqnr_db asks for {limit_db:g}"
            )
