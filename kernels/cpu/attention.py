"""INT8 attention on CPUs as a torch operator, `int8run::cpu_attention`; see attention.h.

The definition is `int8run.kernels.int8_attention.reference`. The operator is registered by hand, as those of
`linear.py` are.
"""

import ctypes

import torch
from torch import Tensor

from int8run.kernels.cpu.instructions import AUTO
from int8run.kernels.cpu.library import check_status, load_attention_library
from int8run.kernels.int8_attention.reference import check_attention_shapes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASK_DTYPES = DTYPES | {torch.bool: 3}

ops = torch.library.Library("int8run", "FRAGMENT")
ops.define(
    "cpu_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, int rotation, "
    "bool center_keys, str instructions) -> Tensor"
)


class Operand(ctypes.Structure):
    """A tensor [batch, heads, tokens, channels], channels side by side; as in attention_operands.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 3),
    )


class Mask(ctypes.Structure):
    """What is added to scores [batch, heads, queries, keys]; as in attention_mask.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 4),
    )


class Attention(ctypes.Structure):
    """A call; as in attention.h."""

    _fields_ = (
        ("q", Operand),
        ("k", Operand),
        ("v", Operand),
        ("output", Operand),
        ("mask", Mask),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("value_width", ctypes.c_int64),
        ("rotation", ctypes.c_int64),
        ("is_causal", ctypes.c_int64),
        ("center_keys", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rotation: int = 0,
    center_keys: bool = False,
    instructions: str = AUTO,
) -> Tensor:
    """INT8 attention on a CPU; arguments and result are those of the reference, `int8_attention.reference`.

    Queries, keys and values are float of any dtype and may have any strides. `instructions` is the name of an
    instruction set, or `auto`.

    Returns:
        [B, Hq, Lq, Dv] in q's dtype, laid out as [B, Lq, Hq, Dv].

    Raises:
        ValueError: for shapes, a mask or a rotation that do not fit.
        MemoryError: when there is none for packed keys and values.
    """
    op = torch.ops.int8run.cpu_attention.default
    output: Tensor = op(q, k, v, mask, is_causal, scale, rotation, center_keys, instructions)
    return output


def describe_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    rotation: int = 0,
    center_keys: bool = False,
) -> Attention:
    """What the kernel is told; the tensors must live until it has run.

    Args:
        q: [B, Hq, Lq, D] of a dtype in DTYPES, channels side by side; as k, v and output.
        k: [B, Hkv, Lk, D].
        v: [B, Hkv, Lk, Dv].
        output: [B, Hq, Lq, Dv], which is written.
        mask: [Lq, Lk] or [B, Hq, Lq, Lk] of a dtype in MASK_DTYPES, or None.
        is_causal: as for `int8_attention`, like all that follow.
        scale: of the scores.
        rotation: channels of a rotated group.
        center_keys: whether the mean of all keys is subtracted.
    """
    batch, heads, queries, width = q.shape
    key_heads, keys, value_width = v.shape[1:]
    return Attention(
        q=_describe(q),
        k=_describe(k),
        v=_describe(v),
        output=_describe(output),
        mask=Mask() if mask is None else _describe_mask(mask.expand(batch, heads, queries, keys)),
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        queries=queries,
        keys=keys,
        width=width,
        value_width=value_width,
        rotation=rotation,
        is_causal=is_causal,
        center_keys=center_keys,
        threads=torch.get_num_threads(),
        scale=width**-0.5 if scale is None else scale,
    )


def _attention_impl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    rotation: int,
    center_keys: bool,
    instructions: str,
) -> Tensor:
    check_attention_shapes(q, k, v, rotation)
    dtype = q.dtype
    # each is kept until the call is over: it may be a copy
    q, k, v = (_as_operand(each) for each in (q, k, v))
    output = _make_output(q, v)
    if mask is not None:
        mask = _as_mask(mask, (*q.shape[:3], k.shape[2]))
    call = describe_call(
        q, k, v, output, mask, is_causal=is_causal, scale=scale, rotation=rotation, center_keys=center_keys
    )
    check_status(load_attention_library(instructions).functions.int8run_attention(ctypes.byref(call)))
    return output.to(dtype)


def _make_output(q: Tensor, v: Tensor) -> Tensor:
    # heads of a token lie side by side, as the layer after the attention reads them
    batch, heads, queries, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)


def _as_operand(tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES:
        tensor = tensor.float()
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _as_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    # a view with a stride of 0 along what the mask does not have
    if mask.dtype not in MASK_DTYPES:
        mask = mask.float()
    try:
        return mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(f"a mask {list(mask.shape)} cannot be broadcast to {list(shape)}") from error


def _describe(tensor: Tensor) -> Operand:
    return Operand(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride()[:3])


def _describe_mask(mask: Tensor) -> Mask:
    return Mask(mask.data_ptr(), MASK_DTYPES[mask.dtype], mask.stride())


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    rotation: int,
    center_keys: bool,
    instructions: str,
) -> Tensor:
    return _make_output(q, v)


ops.impl("cpu_attention", _attention_impl, "CPU")
torch.library.register_fake("int8run::cpu_attention", _attention_fake, lib=ops)
