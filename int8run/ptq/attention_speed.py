"""Whether INT8 attention is faster here than the float model's own, measured on random numbers.

The rule is that of everything INT8 (`backends.float_comparison`): float stays where it is clearly faster.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.float_comparison import FloatComparer, FloatComparison
from int8run.layers.int8_attention import Int8Attention
from int8run.models.attention_calls import compute_float_attention
from int8run.ptq.attention import AttentionShape, PlannedAttention
from int8run.utils.attention_call import AttentionCall

log = logging.getLogger(__name__)


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
        self.comparer = FloatComparer(cache, device)
        self.device, self.dtype = device, dtype
        self.float_attention = float_attention

    def compare(self, shape: AttentionShape, layer: Int8Attention) -> FloatComparison:
        """How fast INT8 is beside float; what was measured before is not measured again.

        Args:
            shape: of one call.
            layer: computes it in INT8.
        """
        key = self.build_key(shape, layer)
        found = self.comparer.look_up(key)
        if found is not None:
            return found
        if not self.comparer.found:
            log.info("timing INT8 attention on this machine, once for each shape")
        call = draw_attention_call(shape, self.device, self.dtype)
        found = self.comparer.measure(
            key,
            int8=partial(layer.attend, call),
            in_float=partial(compute_float_attention, call, self.float_attention),
        )
        if found.failure is not None:
            log.warning("INT8 attention of %s: %s", shape, found.failure)
        if found.not_measured:
            log.warning("INT8 attention of %s: %s", shape, found.not_measured)
        return found

    def build_key(self, shape: AttentionShape, layer: Int8Attention) -> str:
        """The key of an attention in the file of measured choices.

        Args:
            shape: of one call.
            layer: computes it in INT8.
        """
        sizes = "x".join(str(int(size)) for size in shape.sizes)
        mask = shape.mask or "none"
        if shape.mask_shape:
            mask += f" {'x'.join(map(str, shape.mask_shape))}"
        return (
            f"attention | {layer.backend!r} {layer.method.label} | {sizes} mask {mask} "
            f"causal {shape.is_causal} | {self.float_attention}"
        )


def draw_attention_call(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> AttentionCall:
    """Normal numbers of a shape, the same ones at each call, and a mask of the shape that was seen.

    Args:
        shape: of the call.
        device: where the numbers are drawn.
        dtype: of queries, keys and values, and of a mask that is added.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, tokens: int, width: int) -> Tensor:
        # tokens before heads, as the Linears before an attention leave them
        size = (shape.batch, tokens, heads, width)
        return torch.randn(size, generator=generator, device=device).to(dtype).transpose(1, 2)

    mask = None
    if shape.mask == "bool":
        mask = torch.ones(shape.mask_shape, dtype=torch.bool, device=device)
    elif shape.mask:
        mask = torch.zeros(shape.mask_shape, dtype=dtype, device=device)
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
        shape = attention.shapes[0]
        found = speed.compare(shape, attention.layer)
        attention.plan.speedup = found.speedup
        attention.plan.backends_left_out = found.not_measured
        place = f"at {shape.queries} x {shape.keys} tokens"
        reason = found.explain_float(attention.layer.backend.name, place)
        if reason:
            attention.leave_float(reason, is_choice=found.failure is None)
