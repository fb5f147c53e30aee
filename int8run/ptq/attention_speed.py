"""Whether INT8 attention is faster here than the float model's own, measured on random numbers.

The rule is that of Linears (`backends.auto`): float stays where it is clearly faster. The ratios are kept in
the file of measured choices.
"""

import logging
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from int8run.backends.auto import MIN_FLOAT_GAIN, SCATTERS
from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.run_errors import find_run_failure
from int8run.layers.int8_attention import Int8Attention
from int8run.models.attention_calls import compute_float_attention
from int8run.ptq.attention import AttentionShape, PlannedAttention
from int8run.ptq.layer_costs import parse_ratio
from int8run.utils.attention_call import AttentionCall
from int8run.utils.timing import is_steady, time_in_turns

log = logging.getLogger(__name__)

ROUNDS = 7


class AttentionSpeed:
    """Times of INT8 attention and of the float model's, each shape measured once.

    Args:
        cache: ratios measured before.
        device: where the attentions run.
        dtype: of the float model.
        float_attention: `attention=` of the config, which the float model computes with.
    """

    def __init__(
        self, cache: AutotuneCache, device: torch.device, dtype: torch.dtype, float_attention: str = "native"
    ):
        self.cache, self.device, self.dtype = cache, device, dtype
        self.float_attention = float_attention
        self.measured: dict[str, str] = {}

    def find_float_reason(self, shape: AttentionShape, layer: Int8Attention) -> tuple[str, float | None]:
        """Why float is to compute an attention of this shape; empty: INT8 pays, or nothing clear is known.

        Args:
            shape: of one call.
            layer: computes it in INT8.

        Returns:
            The reason, and the time of float over that of INT8, where it could be measured.
        """
        entry = self.look_up(shape, layer)
        text, _, note = entry.partition(" ")
        speedup = parse_ratio(text)
        if speedup is None:
            return entry, None
        if note == SCATTERS or speedup * MIN_FLOAT_GAIN > 1:
            return "", speedup
        tokens = f"{shape.queries} x {shape.keys} tokens"
        return f"float is {1 / speedup:.2f} times as fast as {layer.backend.name} at {tokens} here", speedup

    def look_up(self, shape: AttentionShape, layer: Int8Attention) -> str:
        """`1.84`: float takes that many times as long; `0.93 scatters`; or why INT8 cannot run here."""
        sizes = "x".join(str(int(size)) for size in shape[:7])
        key = (
            f"attention | {layer.backend!r} {layer.method.label} | {sizes} mask {shape.mask or 'none'} "
            f"causal {shape.is_causal} | {self.float_attention}"
        )
        if key not in self.measured:
            found = self.cache.get(key)
            self.measured[key] = self.measure(key, shape, layer) if found is None else found
        return self.measured[key]

    @torch.no_grad()
    def measure(self, key: str, shape: AttentionShape, layer: Int8Attention) -> str:
        """Time both in turns; what can be trusted is kept for later runs.

        Args:
            key: of the entry in the cache.
            shape: of one call.
            layer: computes it in INT8.
        """
        if not self.measured:
            log.info("timing INT8 attention on this machine, once for each shape")
        call = self.draw_call(shape)
        int8 = partial(layer.attend, call)
        failure = find_run_failure(int8, self.device)
        if failure is not None:
            log.warning("INT8 attention of %s: %s", shape, failure)
            return f"{layer.backend.name} cannot run it here: {failure}"
        in_float = partial(compute_float_attention, call, self.float_attention)
        float_seconds, int8_seconds = time_in_turns([in_float, int8], self.device, ROUNDS)
        speedup = round(statistics.median(float_seconds) / statistics.median(int8_seconds), 3)
        is_clear = min(int8_seconds) >= MIN_FLOAT_GAIN * statistics.median(float_seconds)
        entry = str(speedup)
        if not is_clear and speedup * MIN_FLOAT_GAIN <= 1:
            entry = f"{speedup} {SCATTERS}"
        if not is_steady(float_seconds) or not is_steady(int8_seconds):
            # times of a busy machine take nothing out of INT8
            return f"{speedup} {SCATTERS}"
        return self.cache.put(key, entry)

    def draw_call(self, shape: AttentionShape) -> AttentionCall:
        """Normal numbers of a shape, drawn on the device, the same ones at each call."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(heads: int, tokens: int, width: int) -> Tensor:
            # tokens before heads, as the Linears before an attention leave them
            size = (shape.batch, tokens, heads, width)
            return torch.randn(size, generator=generator, device=self.device).to(self.dtype).transpose(1, 2)

        mask = None
        if shape.mask:
            mask = torch.ones(shape.batch, 1, 1, shape.keys, dtype=torch.bool, device=self.device)
            if shape.mask != "bool":
                mask = torch.zeros_like(mask, dtype=self.dtype)
        return AttentionCall(
            query=draw(shape.heads, shape.queries, shape.width),
            key=draw(shape.kv_heads, shape.keys, shape.width),
            value=draw(shape.kv_heads, shape.keys, shape.value_width),
            attn_mask=mask,
            is_causal=shape.is_causal,
            enable_gqa=shape.heads != shape.kv_heads,
        )


def leave_slow_float(planned: Sequence[PlannedAttention], speed: AttentionSpeed) -> None:
    """Keep attentions float that are faster so on this machine.

    Args:
        planned: are changed; each is timed at the call with the most multiply-adds.
        speed: measures.
    """
    for attention in planned:
        if attention.layer is None:
            continue
        reason, speedup = speed.find_float_reason(attention.shapes[0], attention.layer)
        attention.plan.speedup = speedup
        if reason:
            attention.leave_float(reason, is_choice=speedup is not None)
