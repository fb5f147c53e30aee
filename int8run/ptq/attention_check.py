"""Whether a backend computes INT8 attention rightly on this machine, before a model is given to it.

`pipeline.quantize_attention` takes the first backend that passes. Kernels that cannot be built, fail, or
compute something else are left out with the reason.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from int8run.backends.attention import AttentionBackend, choose_attention_method
from int8run.backends.run_errors import find_run_failure
from int8run.layers.int8_attention import Int8Attention
from int8run.models.attention_calls import compute_float_attention
from int8run.quant.weight import sqnr_db
from int8run.utils.attention_call import AttentionCall

# random numbers have about 40 dB; a wrong rotation or scale, less than 20
MIN_SQNR_DB = 25.0
NUM_TOKENS = 67  # no multiple of what kernels take at a time


@torch.no_grad()
def find_attention_fault(
    backend: AttentionBackend, widths: Iterable[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a backend is of no use here; None: it computes what it should.

    Args:
        backend: to check.
        widths: of heads of keys and of values that the model has.
        device: where the model runs.
        dtype: of the float model.
    """
    for width, value_width in widths:
        if backend.unsupported_width_reason(width, value_width) is not None:
            continue
        layer = Int8Attention(backend, choose_attention_method(width))
        call = draw_masked_call(width, value_width, device, dtype)
        failure = find_run_failure(partial(layer.attend, call), device)
        if failure is not None:
            return failure
        found = sqnr_db(compute_float_attention(call).float(), layer.attend(call).float())
        if not found >= MIN_SQNR_DB:  # also for NaN
            return f"computes something else at heads of {width} channels ({found:.0f} dB)"
    return None


def draw_masked_call(width: int, value_width: int, device: torch.device, dtype: torch.dtype) -> AttentionCall:
    """Random queries, keys and values of two heads, with a mask that leaves out the last keys."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(channels: int) -> Tensor:
        return torch.randn(1, 2, NUM_TOKENS, channels, generator=generator, device=device).to(dtype)

    mask = torch.arange(NUM_TOKENS, device=device) < NUM_TOKENS - 5
    return AttentionCall(draw(width), draw(width), draw(value_width), attn_mask=mask[None, None, None])
