"""What the programs of the INT8 convolution compute: the Triton kernels that `kernel.py` launches.

- `quantize_pixels_kernel` rounds the channels of a pixel about the middle of their range, 16 pixels for each
  program, which walks along the channels twice: once for the range, once to round. An image comes from
  memory once: the second walk finds it in cache.
- `conv_kernel` computes one tile of the output, BLOCK_M pixels by BLOCK_N channels, as a product without the
  matrix that im2col would build (implicit GEMM). It goes from tap to tap; for each it finds the input pixel
  that the tap of each of its pixels meets, and walks along the channels, BLOCK_K at a time:

                                 weight [O, taps, C]     BLOCK_K
                                                      +-----------+-----------+---
                                   BLOCK_N channels   |  step 0   |  step 1   | ...    int8, tap t
                                                      +-----------+-----------+---
        pixels [B T H W, C]      BLOCK_K
                              +-----------+---        +-----------------+
        BLOCK_M input pixels  |  step 0   | ...       |   sums of tap t |   int32
        that tap t meets      +-----------+---        +-----------------+
                                  int8                    BLOCK_N
                                                              |  * scale of the pixel
                                                              v  + its center * sum of the tap's weights
                                                      output tile, float32, over all taps

Images are channels-last, so that the channels of a pixel are neighbors in memory.
"""

import triton
import triton.language as tl

from int8run.kernels.quantize_rowwise.row_programs import (
    PART,
    TINY,
    _combine_parts,
    _hadamard_signs,
    _magnitude_bits,
    _round_to_int8,
)

INFINITY_BITS = tl.constexpr(0x7F800000)  # float32's; what is above is NaN


# -- pixels to int8 --------------------------------------------------------------------------------


@triton.jit
def _load_pixels(
    x_rows,  # pointers to the pixels of a group, [BLOCK_P, 1]
    start,  # the first channel
    C,  # channels of a group
    signs,
    SILU: tl.constexpr,
    ROTATION: tl.constexpr,
    SYLVESTER: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Channels start .. start + 64 * PARTS after SiLU and rotation: PARTS float32 matrices [BLOCK_P, 64]."""
    parts = ()
    for i in tl.static_range(PARTS):
        channels = start + i * PART + tl.arange(0, PART)[None, :]
        x = tl.load(x_rows + channels, mask=channels < C, other=0.0)
        part = x.to(tl.float32)
        if SILU:
            part = part / (1 + tl.exp(-part))
        if ROTATION:
            part = tl.dot(part.to(x.dtype), signs, input_precision=PRECISION)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return _combine_parts(parts, ROTATION, SYLVESTER, PARTS)


@triton.jit(do_not_specialize=["pixels"])
def quantize_pixels_kernel(
    x_ptr,  # [pixels, groups * C]
    q_ptr,  # int8 [pixels, groups * C]
    scale_ptr,  # float32 [pixels, groups]
    center_ptr,  # float32 [pixels, groups]
    pixels,
    C,  # channels of a group
    groups,
    SILU: tl.constexpr,
    ROTATION: tl.constexpr,  # channels of a rotated group; 0: none
    SYLVESTER: tl.constexpr,
    PRECISION: tl.constexpr,  # of the rotation's product
    PARTS: tl.constexpr,  # parts of 64 channels in one step of a walk
    BLOCK_P: tl.constexpr,
):
    """BLOCK_P pixels of one group of channels."""
    group = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    # past the end, the last pixel again: never stored, so the loads need no mask for them
    safe_rows = tl.minimum(rows, pixels - 1).to(tl.int64)
    x_rows = x_ptr + (safe_rows * groups + group)[:, None] * C  # [BLOCK_P, 1]
    signs = _hadamard_signs(ROTATION, SYLVESTER, x_ptr.dtype.element_ty)  # [64, 64]

    # First walk. Range and magnitude are kept for each of 64 places in a part and reduced once, at the end.
    # The magnitude tells of NaN, which the other two drop.
    high = tl.full([BLOCK_P, PART], float("-inf"), tl.float32)
    low = tl.full([BLOCK_P, PART], float("inf"), tl.float32)
    magnitude = tl.zeros([BLOCK_P, PART], tl.int32)
    for start in range(0, C, PARTS * PART):
        parts = _load_pixels(x_rows, start, C, signs, SILU, ROTATION, SYLVESTER, PRECISION, PARTS)
        for i in tl.static_range(PARTS):
            channels = start + i * PART + tl.arange(0, PART)[None, :]
            high = tl.maximum(high, tl.where(channels < C, parts[i], float("-inf")))
            low = tl.minimum(low, tl.where(channels < C, parts[i], float("inf")))
            magnitude = tl.maximum(magnitude, _magnitude_bits(parts[i]))
    # halved before they are added: their difference may be beyond float32
    half_high, half_low = tl.max(high, axis=1) * 0.5, tl.min(low, axis=1) * 0.5  # [BLOCK_P]
    center = half_high + half_low
    scale = tl.div_rn(half_high - half_low, 127.0)
    scale = tl.where(scale < TINY, TINY, scale)
    scale = tl.where(tl.max(magnitude, axis=1) > INFINITY_BITS, float("nan"), scale)
    inverse = tl.div_rn(1.0, scale)
    places = rows.to(tl.int64) * groups + group
    tl.store(scale_ptr + places, scale, mask=rows < pixels)
    tl.store(center_ptr + places, center, mask=rows < pixels)

    # Second walk. To transform again costs less than to keep the transformed pixels in memory.
    q_rows = q_ptr + places[:, None] * C
    for start in range(0, C, PARTS * PART):
        parts = _load_pixels(x_rows, start, C, signs, SILU, ROTATION, SYLVESTER, PRECISION, PARTS)
        for i in tl.static_range(PARTS):
            channels = start + i * PART + tl.arange(0, PART)[None, :]
            q = _round_to_int8((parts[i] - center[:, None]) * inverse[:, None])
            tl.store(q_rows + channels, q, mask=(rows < pixels)[:, None] & (channels < C))


# -- convolution -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "T", "H", "W", "OT", "OH", "OW", "first_sum"])
def conv_kernel(
    q_ptr,  # int8 [B, T, H, W, groups, C]
    scale_ptr,  # float32 [B, T, H, W, groups]
    center_ptr,  # float32 [B, T, H, W, groups]
    qdata_ptr,  # int8 [groups, N, taps, C], rows of stride_w bytes
    sums_ptr,  # int32, of the weights of each tap, from number first_sum of such a row on
    w_scale_ptr,  # float32 [groups, N]
    bias_ptr,  # [groups, N]
    y_ptr,  # [M, groups, N]
    M,  # output pixels, B * OT * OH * OW
    N,  # output channels of a group
    C,  # input channels of a group
    groups,
    stride_w,
    first_sum,
    T,
    H,
    W,
    OT,
    OH,
    OW,
    KT: tl.constexpr,  # taps in each dimension
    KH: tl.constexpr,
    KW: tl.constexpr,
    ST: tl.constexpr,  # strides
    SH: tl.constexpr,
    SW: tl.constexpr,
    PT: tl.constexpr,  # padding
    PH: tl.constexpr,
    PW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_C: tl.constexpr,  # whether BLOCK_K divides C
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of one group's output.

    Programs of the same pixels follow each other: pixels and weights stay in L2.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid, group = tl.program_id(0), tl.program_id(1)
    rows = pid // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # past the end, the last pixel or channel again: never stored
    safe_rows = tl.minimum(rows, M - 1)
    safe_cols = group * N + tl.minimum(cols, N - 1)
    # where the first tap of each output pixel is, beyond the edge for some
    w0 = safe_rows % OW * SW - PW
    h0 = safe_rows // OW % OH * SH - PH
    t0 = safe_rows // (OW * OH) % OT * ST - PT
    batch = safe_rows // (OW * OH * OT)
    pixel0 = ((batch * T + t0) * H + h0) * W + w0
    TAPS: tl.constexpr = KT * KH * KW
    ks = tl.arange(0, BLOCK_K)[None, :]
    weight_offsets = safe_cols[:, None] * stride_w + ks  # [BLOCK_N, BLOCK_K], below 2**31
    sums_ptrs = sums_ptr + safe_cols.to(tl.int64) * (stride_w // 4) + first_sum  # [BLOCK_N]

    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(0, TAPS):
        dt, dh, dw = tap // (KH * KW), tap // KW % KH, tap % KW
        inside = (h0 >= -dh) & (h0 < H - dh) & (w0 >= -dw) & (w0 < W - dw)
        if KT > 1:
            inside = inside & (t0 >= -dt) & (t0 < T - dt)
        pixel = pixel0 + (dt * H + dh) * W + dw
        # Beyond the edge the first pixel with a scale and a center of 0: it adds nothing, and the walk along
        # the channels needs no mask.
        place = tl.where(inside, pixel, 0).to(tl.int64) * groups + group
        scale = tl.load(scale_ptr + place, mask=inside, other=0.0)
        center = tl.load(center_ptr + place, mask=inside, other=0.0)
        q_ptrs = q_ptr + place[:, None] * C + ks  # [BLOCK_M, BLOCK_K]
        qdata_tap = qdata_ptr + tap * C
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for c in range(0, C, BLOCK_K):
            if EVEN_C:
                q = tl.load(q_ptrs + c)
                qdata = tl.load(qdata_tap + c + weight_offsets)
            else:
                q = tl.load(q_ptrs + c, mask=ks < C - c, other=0)
                qdata = tl.load(qdata_tap + c + weight_offsets, mask=ks < C - c, other=0)
            # [BLOCK_M, BLOCK_K] . [BLOCK_K, BLOCK_N] -> int32 [BLOCK_M, BLOCK_N]
            sums = tl.dot(q, tl.trans(qdata), sums, out_dtype=tl.int32)
        of_weights = tl.load(sums_ptrs + tap).to(tl.float32)
        y += sums.to(tl.float32) * scale[:, None] + center[:, None] * of_weights[None, :]

    y *= tl.load(w_scale_ptr + safe_cols)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + safe_cols).to(tl.float32)[None, :]
    y_ptrs = y_ptr + (rows.to(tl.int64) * groups + group)[:, None] * N + cols[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])
