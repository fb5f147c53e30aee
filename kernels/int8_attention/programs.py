"""What the programs of INT8 attention compute: the Triton kernels behind `kernel.py`, which launches them.

- `quantize_heads_kernel` rounds queries or keys per token, rotated or about a mean: 32 tokens of one head for
  each program.
- `attention_kernel` computes BLOCK_M rows of one head's output. Its queries stay; keys and values pass by,
  BLOCK_N tokens at a time, with `stages` such steps in flight:

                          keys [Lk, D]      BLOCK_D
                                         +-----------+
                      BLOCK_N tokens     |  step 0   |   int8, one scale for each token
                                         +-----------+
                                         |  step 1   |
        queries [Lq, D]                  |    ...    |
                   +-----------+         +-----------------------+
    BLOCK_M tokens |           |         | scores of a step      |  = q . k^T, int32 sums
                   +-----------+         +-----------------------+
                   int8, BLOCK_D         BLOCK_N
                                                 |  exp(score - running maximum), rounded to the values' dtype
                                                 v
        output [Lq, Dv]  +-----------+    p . v, float32 sums     values [Lk, Dv]: BLOCK_N x BLOCK_V in 16 bit
                         +-----------+

Heads are padded to a power of two: queries and keys with zeros in memory, where they are written once and
read often, values by a mask.
"""

import triton
import triton.language as tl

from int8run.kernels.quantize_rowwise.row_programs import (
    PART,
    _hadamard_signs,
    _load_transformed,
    _reduce_magnitude,
    _round_to_int8,
    _scale_from_magnitude,
)

LOG2E = tl.constexpr(1.4426950408889634)
MEAN_ROWS = tl.constexpr(16)  # of a matrix of one mean: the smallest tensor-core product


# -- queries and keys to int8 ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["L"])
def quantize_heads_kernel(
    x_ptr,  # [B, H, L, D], neighboring channels side by side
    mean_ptr,  # float32 [B * H, D]: what is subtracted from every token of a head
    q_ptr,  # int8 [B * H, L, BLOCK_D]
    scale_ptr,  # float32 [B * H, L]
    L,
    D,
    heads,
    stride_xb,
    stride_xh,
    stride_xl,
    HAS_MEAN: tl.constexpr,
    ROTATION: tl.constexpr,  # channels of a rotated group; 0: none
    SYLVESTER: tl.constexpr,
    PRECISION: tl.constexpr,  # of the rotation's product
    MEAN_PRECISION: tl.constexpr,  # of the rotation of the mean
    EVEN_D: tl.constexpr,  # whether PARTS * 64 channels are D
    PARTS: tl.constexpr,  # parts of 64 channels
    BLOCK_D: tl.constexpr,  # D up to a power of two
    BLOCK_L: tl.constexpr,
):
    """BLOCK_L tokens of one head."""
    blocks = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)  # of all in the batch
    tokens = pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    # past the end, the last token again: never stored, so the load needs no mask for them
    safe_tokens = tl.minimum(tokens, L - 1).to(tl.int64)
    x_head = x_ptr + head // heads * stride_xb + head % heads * stride_xh
    signs = _hadamard_signs(ROTATION, SYLVESTER, x_ptr.dtype.element_ty)  # [64, 64]
    parts = _load_transformed(
        x_head + safe_tokens[:, None] * stride_xl,
        0,
        None,
        D,
        -1,
        signs,
        False,  # noqa: FBT003
        False,  # noqa: FBT003
        ROTATION,
        SYLVESTER,
        PRECISION,
        EVEN_D,
        PARTS,
    )
    if HAS_MEAN:
        # after the rotation, which is linear: so what enters its product stays in x's dtype
        means = _load_transformed(
            mean_ptr + head * D + tl.zeros([MEAN_ROWS, 1], tl.int32),
            0,
            None,
            D,
            -1,
            _hadamard_signs(ROTATION, SYLVESTER, tl.float32),
            False,  # noqa: FBT003
            False,  # noqa: FBT003
            ROTATION,
            SYLVESTER,
            MEAN_PRECISION,
            EVEN_D,
            PARTS,
        )
        centered = ()
        for i in tl.static_range(PARTS):
            mean = tl.max(means[i], axis=0)  # all rows are the same
            centered = centered + (parts[i] - mean[None, :],)  # type: ignore[assignment]  # noqa: RUF005
        parts = centered
    magnitude = _reduce_magnitude(tl.zeros([BLOCK_L, PART], tl.int32), parts, PARTS)
    scale, inverse = _scale_from_magnitude(tl.max(magnitude, axis=1))  # [BLOCK_L]
    tl.store(scale_ptr + head * L + tokens, scale, mask=tokens < L)
    for i in tl.static_range(PARTS):
        channels = i * PART + tl.arange(0, PART)[None, :]
        q = _round_to_int8(parts[i] * inverse[:, None])
        q_ptrs = q_ptr + (head * L + tokens)[:, None] * BLOCK_D + channels
        tl.store(q_ptrs, q, mask=(tokens < L)[:, None] & (channels < BLOCK_D))


# -- attention -------------------------------------------------------------------------------------


@triton.jit
def _mask_scores(
    scores,  # [BLOCK_M, BLOCK_N]
    q_scale,  # [BLOCK_M]
    first_row,  # of scores
    first_key,
    mask_ptr,  # of this head
    LQ,
    LK,
    stride_mq,
    stride_mk,
    MASK: tl.constexpr,
    ROW_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """-inf where a row must not attend to a key. A float mask is added; scores are made whole for it."""
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    allowed = (keys < LK - first_key)[None, :]
    if CAUSAL:
        allowed = allowed & (first_key + keys[None, :] <= first_row + rows[:, None])
    if MASK != "none":
        # one large offset for all, small ones beside it: those of a whole tile would fill the registers
        mask_ptr += tl.cast(first_key, tl.int64) * stride_mk
        # past the end, the last one again
        offsets = (tl.minimum(keys, LK - 1 - first_key) * stride_mk)[None, :]  # [1, BLOCK_N]
        if ROW_MASK:
            mask_ptr += tl.cast(first_row, tl.int64) * stride_mq
            offsets = offsets + (tl.minimum(rows, LQ - 1 - first_row) * stride_mq)[:, None]
        mask = tl.load(mask_ptr + offsets)
        if MASK == "bool":
            allowed = allowed & (mask != 0)
        else:
            scores = scores * q_scale[:, None] + mask.to(tl.float32)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def _visit_keys(
    output,  # float32 [BLOCK_M, BLOCK_V]: the sum of the weighted values so far
    weights,  # float32 [BLOCK_M]: the sum of the weights so far
    maximum,  # float32 [BLOCK_M]: the largest score so far
    first,  # key to visit, a multiple of BLOCK_N
    last,  # key not to visit any more
    q,  # int8 [BLOCK_M, BLOCK_D]
    q_scale,  # float32 [BLOCK_M]
    k_ptr,  # int8 [LK, BLOCK_D] of this head
    k_scale_ptr,  # float32 [LK] of this head
    v_ptr,  # [LK, DV] of this head
    mask_ptr,
    scale,
    first_row,
    LQ,
    LK,
    DV,
    stride_vl,
    stride_mq,
    stride_mk,
    MASKED: tl.constexpr,  # whether some scores do not count
    MASK: tl.constexpr,
    ROW_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The keys from `first` on, BLOCK_N at a time. Returns output, weights and maximum with them."""
    # Scores are in units of their row's scale, which the exponent's factor makes up for. It is positive, so
    # that the largest score stays the largest.
    factor = q_scale * LOG2E
    if MASK == "float":
        factor = tl.zeros_like(q_scale) + LOG2E
    channels = tl.arange(0, BLOCK_D)[None, :]
    v_channels = tl.arange(0, BLOCK_V)[None, :]
    for start in range(first, last, BLOCK_N):
        places = tl.arange(0, BLOCK_N)
        if MASKED:
            # past the end, the last key again: its weight is 0, so that the loads need no mask
            places = tl.minimum(places, LK - 1 - start)
        offset = tl.cast(start, tl.int64)
        k = tl.load(k_ptr + offset * BLOCK_D + (places[:, None] * BLOCK_D + channels))  # [BLOCK_N, BLOCK_D]
        k_scale = tl.load(k_scale_ptr + start + places)
        # [BLOCK_M, BLOCK_D] . [BLOCK_D, BLOCK_N] -> int32 [BLOCK_M, BLOCK_N]
        products = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
        scores = products.to(tl.float32) * (k_scale * scale)[None, :]
        if MASKED:
            scores = _mask_scores(
                scores,
                q_scale,
                first_row,
                start,
                mask_ptr,
                LQ,
                LK,
                stride_mq,
                stride_mk,
                MASK,
                ROW_MASK,
                CAUSAL,
                BLOCK_M,
                BLOCK_N,
            )
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        base = new_maximum
        if MASKED:
            # a row that has attended to nothing so far: -inf minus -inf would be NaN
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        p = tl.exp2((scores - base[:, None]) * factor[:, None])
        shrink = tl.exp2((maximum - base) * factor)  # what earlier weights are worth under the new maximum
        weights = weights * shrink + tl.sum(p, axis=1)
        maximum = new_maximum

        v_ptrs = v_ptr + offset * stride_vl + (places[:, None] * stride_vl + v_channels)
        v = tl.load(v_ptrs) if EVEN_V else tl.load(v_ptrs, mask=v_channels < DV, other=0.0)
        # [BLOCK_M, BLOCK_N] . [BLOCK_N, BLOCK_V] -> float32 [BLOCK_M, BLOCK_V]
        output = tl.dot(p.to(v.dtype), v, output * shrink[:, None])
    return output, weights, maximum


@triton.jit(do_not_specialize=["LQ", "LK"])
def attention_kernel(
    q_ptr,  # int8 [B * heads, LQ, BLOCK_D]
    q_scale_ptr,  # float32 [B * heads, LQ]
    k_ptr,  # int8 [B * kv_heads, LK, BLOCK_D]
    k_scale_ptr,  # float32 [B * kv_heads, LK]
    v_ptr,  # [B, kv_heads, LK, DV], neighboring channels side by side
    mask_ptr,  # uint8 or float [B, heads, LQ, LK], strides of 0 where it is broadcast
    y_ptr,  # [B, LQ, heads, DV]
    scale,  # of the scores
    LQ,
    LK,
    DV,
    heads,
    kv_heads,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    MASK: tl.constexpr,  # none, bool or float
    ROW_MASK: tl.constexpr,  # whether rows have masks of their own
    CAUSAL: tl.constexpr,
    EVEN_K: tl.constexpr,  # whether BLOCK_N divides LK
    EVEN_V: tl.constexpr,  # whether BLOCK_V is DV
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M rows of one head. Programs of one head follow each other: its keys and values stay in L2."""
    blocks = tl.cdiv(LQ, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % blocks
    head = (pid // blocks).to(tl.int64)  # of all in the batch
    batch, own_head = head // heads, head % heads
    shared_head = own_head // (heads // kv_heads)
    kv_head = batch * kv_heads + shared_head  # of all in the batch

    first_row = pid_m * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    # past the end, the last row again: never stored
    safe_rows = head * LQ + tl.minimum(rows, LQ - 1)
    q = tl.load(q_ptr + safe_rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])  # [BLOCK_M, BLOCK_D]
    q_scale = tl.load(q_scale_ptr + safe_rows)
    k_head, k_scale_head = k_ptr + kv_head * LK * BLOCK_D, k_scale_ptr + kv_head * LK
    v_head = v_ptr + batch * stride_vb + shared_head * stride_vh
    mask_head = mask_ptr
    if MASK != "none":
        mask_head = mask_ptr + batch * stride_mb + own_head * stride_mh

    # Keys before `whole` count for every row; those from there to `last` need to be looked at.
    last = LK
    if CAUSAL:
        last = tl.minimum(LK, first_row + BLOCK_M)
    whole = last // BLOCK_N * BLOCK_N
    if CAUSAL:
        whole = tl.minimum(whole, (first_row + 1) // BLOCK_N * BLOCK_N)

    output = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if MASK == "none":
        output, weights, maximum = _visit_keys(
            output,
            weights,
            maximum,
            0,
            whole,
            q,
            q_scale,
            k_head,
            k_scale_head,
            v_head,
            mask_head,
            scale,
            first_row,
            LQ,
            LK,
            DV,
            stride_vl,
            stride_mq,
            stride_mk,
            False,  # noqa: FBT003
            MASK,
            ROW_MASK,
            CAUSAL,
            EVEN_V,
            BLOCK_D,
            BLOCK_V,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        whole = 0
    if MASK != "none" or CAUSAL or not EVEN_K:
        output, weights, maximum = _visit_keys(
            output,
            weights,
            maximum,
            whole,
            last,
            q,
            q_scale,
            k_head,
            k_scale_head,
            v_head,
            mask_head,
            scale,
            first_row,
            LQ,
            LK,
            DV,
            stride_vl,
            stride_mq,
            stride_mk,
            True,  # noqa: FBT003
            MASK,
            ROW_MASK,
            CAUSAL,
            EVEN_V,
            BLOCK_D,
            BLOCK_V,
            BLOCK_M,
            BLOCK_N,
        )

    # a row that attends to nothing has no weights, and is 0
    output = output / tl.where(weights == 0.0, 1.0, weights)[:, None]
    v_channels = tl.arange(0, BLOCK_V)[None, :]
    y_rows = (batch * LQ + rows) * heads + own_head
    y_ptrs = y_ptr + y_rows[:, None] * DV + v_channels
    mask = (rows < LQ)[:, None]
    if not EVEN_V:
        mask = mask & (v_channels < DV)
    tl.store(y_ptrs, output.to(y_ptr.dtype.element_ty), mask=mask)
