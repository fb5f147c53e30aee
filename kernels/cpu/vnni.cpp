// The W8A8 linear layer for CPUs with AVX512-VNNI: quantize rows, multiply, scale. A plain C interface
// without torch headers; `vnni.py` makes torch operators of it. The definitions are
// kernels/quantize_rowwise/reference.py and kernels/int8_linear/reference.py.
//
// Shapes: M rows (tokens), K input columns, N output columns.
//
//
// Compensation for unsigned activations
//
// The product instruction vpdpbusd adds four products of unsigned by signed bytes to each 32-bit sum:
//
//     sum += u0 * s0 + u1 * s1 + u2 * s2 + u3 * s3          u: unsigned, s: signed
//
// AVX512-VNNI has no such instruction for signed by signed bytes. Weights are signed, so they are s.
// Activations q are signed as well (-127..127), so that u = q + 128 (1..255) is stored in their place, and
// what that adds is taken off again:
//
//     sum_k u[k] w[k]  =  sum_k (q[k] + 128) w[k]
//                      =  sum_k q[k] w[k]  +  128 * sum_k w[k]
//                                             ----------------
//                                             compensation of the output column
//
//     for K = 2:   q = (-3, 100)   u = (125, 228)   w = (5, -7)
//                  125 * 5 - 228 * 7 = -971         128 * (5 - 7) = -256         -971 + 256 = -715
//                                                                                -3 * 5 - 100 * 7 = -715
//
// The compensation does not depend on the activations. It is computed once, when the weight is packed, and
// subtracted once, when a column's sum is complete. vpdpbusd wraps around at 32 bits and does not saturate
// (its sibling vpdpbusds does). So sums of u w may exceed 32 bits: the subtraction wraps back, as long as the
// sum of q w fits, and whoever calls this sees to that (at most 132,104 columns: 2^31 / (128 * 127)).
//
// Beyond K, packed weights are 0, so that whatever stands in the activations there adds nothing.
//
//
// Packed weight: int8 [ceil(N / 64)][1 + ceil(K / 4)][256 bytes], a panel for each 64 output columns.
//
//              column 0        column 1               column 63
//            +---------------+---------------+-----+---------------+
//     row 0  |  int32: 128 * sum_k w[k]      | ... |               |   compensations
//            +---------------+---------------+-----+---------------+
//     row 1  |  w0 w1 w2 w3  |  w0 w1 w2 w3  | ... |  w0 w1 w2 w3  |   k = 0 .. 3
//            +---------------+---------------+-----+---------------+
//     row 2  |  w4 w5 w6 w7  |  w4 w5 w6 w7  | ... |  w4 w5 w6 w7  |   k = 4 .. 7
//            +---------------+---------------+-----+---------------+
//       ...    4 bytes         4 bytes               4 bytes           beyond N and K: 0
//
// A row of 256 bytes is four registers of 16 columns. One step of the product broadcasts four activations
// u[4k] .. u[4k+3] to all 16 places of a register and multiplies it by each of the four: no shuffles, and
// each panel is read from its beginning to its end.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define INLINED __attribute__((always_inline))
#define INLINE static inline INLINED

namespace {

// f(0), f(1), ... f(N - 1) with constants: arrays indexed by them live in registers. Loops that the compiler
// unrolls later do not promise that: GCC 12 then stored every sum at every step.
template <class F, int... I>
INLINE void unroll(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}
template <int N, int M, class F>
INLINE void unroll(F f) {
  unroll<N>([&](auto i) INLINED { unroll<M>([&](auto j) INLINED { f(i, j); }); });
}

// A tile of the output is TILE_ROWS x PANEL. Its 6 x 4 = 24 registers of sums, four of weights and one of
// activations leave three of the 32 registers for what the compiler needs. Each register of weights that is
// loaded serves 6 products, each broadcast of activations 4; 24 independent sums hide the latency of the
// product instruction.
constexpr int64_t PANEL = 64;
constexpr int64_t TILE_ROWS = 6;
// Rows that share a pass over the weights, a multiple of TILE_ROWS. ROW_BLOCK x K_BLOCK activations (384 KB)
// and a panel's K_BLOCK rows (128 KB) fit an L2 cache of 1 MB together.
constexpr int64_t ROW_BLOCK = 192;
// Above twice this, a panel is walked in pieces; sums are kept in memory between the pieces.
constexpr int64_t K_BLOCK = 2048;
constexpr int64_t PREFETCH_BYTES = 1024;  // four steps ahead in the panel
constexpr float TINY = 1e-30f;            // the scale of a row of zeros, as in quantize_rowwise/reference.py

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// The mask of the first n of 16 lanes; n may be below 0 or above 16. One expression: with returns GCC places
// the branches otherwise in every kernel that asks for a mask.
__mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xFFFF
         : n <= 0 ? 0
                  : static_cast<__mmask16>((1u << n) - 1);
}

// --- 16 numbers of each dtype to float32 and back, under a mask

struct Float32 {
  using T = float;
  INLINE __m512 load(const T* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
  INLINE void store(T* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
};
struct BFloat16 {
  using T = uint16_t;
  // bfloat16 is the high half of a float32
  INLINE __m512 load(const T* p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
  }
  // Adding 0x7FFF to the low half carries into the high one above the middle; adding the high half's last bit
  // as well sends the middle itself to the even neighbor.
  INLINE void store(T* p, __mmask16 m, __m512 v) {
    __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);  // a carry would turn it into infinity
    bits = _mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7FC00000));
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
};
struct Float16 {
  using T = uint16_t;
  INLINE __m512 load(const T* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
  INLINE void store(T* p, __mmask16 m, __m512 v) {
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// --- what may happen to a row before rounding: GELU

// e^x; infinity from 88.73 on, never less than e^-87.3. Cody-Waite reduction x = n ln 2 + r, with ln 2 as a
// sum of two constants so that r is exact, and a polynomial of degree 6 for e^r (error about 1 ulp).
INLINE __m512 exp512(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(100.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),  // 1 / ln 2
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// GELU by tanh, written with one exponential: x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))
INLINE __m512 gelu(__m512 x) {
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f)), x, x);
  const __m512 e = exp512(_mm512_mul_ps(cubic, _mm512_set1_ps(-1.5957691216f)));
  // NaN, which the clamp in exp512 hides, is still in x
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// The largest |x|, compared as integers: NaN and infinity have the largest bit patterns, so they reach scale
// and output.
INLINE __m512i max_magnitude(__m512i m, __m512 v) {
  return _mm512_max_epi32(m, _mm512_castps_si512(_mm512_abs_ps(v)));
}
INLINE float reduce_magnitude(__m512i m) {
  const int32_t bits = _mm512_reduce_max_epi32(m);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// --- what may happen to a row before rounding: rotation
//
// A group of G numbers is multiplied by a G x G Hadamard matrix of signs; 1 / sqrt(G) is left to the scale of
// the row. Both kinds of matrix are Kronecker powers of a small block, so that the product is a butterfly, as
// in an FFT: one round for each factor, in which every number is combined with those that lie 1, RADIX,
// RADIX^2, ... places apart. Rounds at distances below 16 work inside a register, the next ones between
// registers, those of large groups over memory.
//
// A kind of matrix is a struct with
//   within<W>: multiplies each W neighboring numbers of a register by the matrix of W (W = 1: not at all);
//   butterfly: multiplies the registers r[0], r[apart], ... r[(RADIX - 1) * apart] by the matrix of RADIX.

// The regular matrix, Kronecker powers of a 4 x 4 block:
//
//     +  +  +  -
//     +  +  -  +        y_i = sum(x) - 2 x_(3-i)
//     +  -  +  +
//     -  +  +  +
struct Regular {
  static constexpr int RADIX = 4;
  template <int W>
  INLINE __m512 within(__m512 v) {
    if constexpr (W >= 4) {
      __m512 sum = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));           // neighbors swapped
      sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));              // pairs swapped
      v = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), _mm512_permute_ps(v, 0x1B), sum);  // four reversed
    }
    if constexpr (W >= 16) {  // the same across the four quarters
      __m512 sum = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
      sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4E));
      v = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), _mm512_shuffle_f32x4(v, v, 0x1B), sum);
    }
    return v;
  }
  INLINE void butterfly(__m512* r, int apart) {
    const __m512 a = r[0], b = r[apart], c = r[2 * apart], d = r[3 * apart];
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)), two = _mm512_set1_ps(2.0f);
    r[0] = _mm512_fnmadd_ps(two, d, sum);
    r[apart] = _mm512_fnmadd_ps(two, c, sum);
    r[2 * apart] = _mm512_fnmadd_ps(two, b, sum);
    r[3 * apart] = _mm512_fnmadd_ps(two, a, sum);
  }
};
// Sylvester's matrix, Kronecker powers of a 2 x 2 block:
//
//     +  +              y_0 = x_0 + x_1
//     +  -              y_1 = x_0 - x_1
struct Sylvester {
  static constexpr int RADIX = 2;
  template <int W>
  INLINE __m512 within(__m512 v) {
    if constexpr (W >= 2) v = plus_or_minus(_mm512_permute_ps(v, 0xB1), v, 0xAAAA);
    if constexpr (W >= 4) v = plus_or_minus(_mm512_permute_ps(v, 0x4E), v, 0xCCCC);
    if constexpr (W >= 8) v = plus_or_minus(_mm512_shuffle_f32x4(v, v, 0xB1), v, 0xF0F0);
    if constexpr (W >= 16) v = plus_or_minus(_mm512_shuffle_f32x4(v, v, 0x4E), v, 0xFF00);
    return v;
  }
  INLINE void butterfly(__m512* r, int apart) {
    const __m512 a = r[0], b = r[apart];
    r[0] = _mm512_add_ps(a, b);
    r[apart] = _mm512_sub_ps(a, b);
  }
  // other + v, under the mask other - v; as a product, since a masked subtraction would be one instruction
  // more
  INLINE __m512 plus_or_minus(__m512 other, __m512 v, __mmask16 minus) {
    return _mm512_fmadd_ps(v, _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), minus, _mm512_set1_ps(-1.0f)), other);
  }
};

// Multiply R registers by the matrix of R, in rounds over registers that lie 1, RADIX, RADIX * RADIX, ...
// apart
template <class H, int R, int APART = 1>
INLINE void rotate_registers(__m512 (&r)[R]) {
  if constexpr (APART < R) {
    unroll<R / H::RADIX>([&](auto i) INLINED {
      constexpr int start = i / APART * APART * H::RADIX + i % APART;
      H::butterfly(r + start, APART);
    });
    rotate_registers<H, R, APART * H::RADIX>(r);
  }
}
// One pass over a row of x [K]: rotate within registers (W numbers) and across R of them that lie `span`
// numbers apart, and write the result to `row`. Returns the largest magnitudes of the result. A row may end
// inside a register only where groups are smaller than one, and then R is 1.
template <class X, class H, int W, int R>
__m512i rotate_pass(const typename X::T* x, float* row, int64_t K, int64_t span) {
  __m512i m = _mm512_setzero_si512();
  for (int64_t group = 0; group < K; group += R * span)
    for (int64_t k = group; k < group + span; k += 16) {
      __m512 r[R];
      unroll<R>([&](auto i) INLINED {
        r[i] = H::template within<W>(X::load(x + k + i * span, R == 1 ? first_lanes(K - k) : 0xFFFF));
      });
      rotate_registers<H>(r);
      unroll<R>([&](auto i) INLINED {
        m = max_magnitude(m, r[i]);
        _mm512_storeu_ps(row + k + i * span, r[i]);
      });
    }
  return m;
}
// The pass for groups of at most G numbers: of a register or less, or of up to 16 registers
template <class X, class H, int G>
__m512i rotate_in_registers(const typename X::T* x, float* row, int64_t K, int64_t group) {
  if constexpr (G > H::RADIX)
    if (group < G) return rotate_in_registers<X, H, G / H::RADIX>(x, row, K, group);
  return rotate_pass<X, H, std::min(G, 16), std::max(G / 16, 1)>(x, row, K, 16);
}
// Rotate each group of x [K] by the matrix of signs into `row` (which may be x); returns the largest
// magnitude of the result. Dividing by sqrt(group) is left to the scale. `row` has room up to a multiple of
// 16.
template <class X, class H>
float rotate(const typename X::T* x, float* row, int64_t K, int64_t group) {
  int64_t span = 256;  // numbers that are rotated together so far
  __m512i m = rotate_in_registers<X, H, 256>(x, row, K, group);
  // larger groups: over memory
  for (; 4 * span <= group; span *= 4) m = rotate_pass<Float32, H, 1, 4>(row, row, K, span);
  if constexpr (H::RADIX == 2)
    if (span < group) m = rotate_pass<Float32, H, 1, 2>(row, row, K, span);
  return reduce_magnitude(m);
}

// --- rows to unsigned bytes

template <class X>
float absmax(const typename X::T* x, int64_t K) {
  // four independent maxima, so that one does not wait for the other
  __m512i m[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                  _mm512_setzero_si512()};
  int64_t k = 0;
  for (; k + 64 <= K; k += 64)
    unroll<4>([&](auto i) INLINED { m[i] = max_magnitude(m[i], X::load(x + k + 16 * i, 0xFFFF)); });
  for (; k < K; k += 16) m[0] = max_magnitude(m[0], X::load(x + k, first_lanes(K - k)));
  return reduce_magnitude(_mm512_max_epi32(_mm512_max_epi32(m[0], m[1]), _mm512_max_epi32(m[2], m[3])));
}

// One row x [K]: returns its scale and writes q + 128; bytes from K to a multiple of 4 are written too (their
// weights are 0). x is `unit` times too large, which the scale makes up for: exactly where `unit` is a power
// of two, else to a last bit.
template <class X>
float quantize_row(const typename X::T* x, int64_t K, float absmax, float unit, uint8_t* q) {
  float scale = absmax / unit / 127.0f;
  if (scale < TINY) scale = TINY;
  const __m512 divisor = _mm512_set1_ps(scale * unit);
  const __m512i zero_point = _mm512_set1_epi32(128);
  // ties to even; what is not a number becomes 0 here and shows in the scale
  auto to_bytes = [&](__m512 v) INLINED {
    const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_div_ps(v, divisor)), zero_point);
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(i, _mm512_setzero_si512()));
  };
  int64_t k = 0;
  for (; k + 16 <= K; k += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), to_bytes(X::load(x + k, 0xFFFF)));
  if (k < K)
    _mm_mask_storeu_epi8(q + k, first_lanes(round_up(K, 4) - k),
                         to_bytes(X::load(x + k, first_lanes(K - k))));
  return scale;
}

// The rows that are quantized, and what happens to them first
struct RowsInput {
  const void* x;  // [M, K]
  int64_t M, K, stride;  // numbers from one row to the next
  const float* factor;   // [K] or null
  int64_t rotation;      // numbers of a group; 0: none
  bool sylvester;
  int64_t gelu_from;  // first column that goes through GELU; -1: none
};

// GELU and factor on one row x [K], to float32 `row`; returns the largest magnitude.
template <class X>
float load_row(const RowsInput& in, const typename X::T* x, float* row) {
  __m512i m = _mm512_setzero_si512();
  for (int64_t k = 0; k < in.K; k += 16) {
    const __mmask16 inside = first_lanes(in.K - k);
    __m512 v = X::load(x + k, inside);
    if (in.gelu_from >= 0 && k + 16 > in.gelu_from)
      v = _mm512_mask_mov_ps(gelu(v), first_lanes(in.gelu_from - k), v);
    if (in.factor) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(inside, in.factor + k));
    m = max_magnitude(m, v);
    _mm512_storeu_ps(row + k, v);
  }
  return reduce_magnitude(m);
}

template <class X>
float rotate_row(const RowsInput& in, const typename X::T* x, float* row) {
  return in.sylvester ? rotate<X, Sylvester>(x, row, in.K, in.rotation)
                      : rotate<X, Regular>(x, row, in.K, in.rotation);
}

// All rows, divided among threads: x [M, K] -> q [M, q_stride], scale [M]
template <class X>
void quantize_rows(const RowsInput& in, uint8_t* q, int64_t q_stride, float* scale, int threads) {
  const auto* x = static_cast<const typename X::T*>(in.x);
  const bool changed = in.factor || in.gelu_from >= 0;
  const float unit = in.rotation ? std::sqrt(static_cast<float>(in.rotation)) : 1.0f;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> buffer(changed || in.rotation ? round_up(in.K, 16) : 0);
    float* row = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < in.M; i++) {
      const auto* from = x + i * in.stride;
      uint8_t* to = q + i * q_stride;
      if (!changed && !in.rotation) {
        scale[i] = quantize_row<X>(from, in.K, absmax<X>(from, in.K), unit, to);
        continue;
      }
      float magnitude = changed ? load_row<X>(in, from, row) : 0.0f;
      // a row that is only rotated is read from x, without a pass that copies it
      if (in.rotation) magnitude = changed ? rotate_row<Float32>(in, row, row) : rotate_row<X>(in, from, row);
      scale[i] = quantize_row<Float32>(row, in.K, magnitude, unit, to);
    }
  }
}

// --- the product

// MR rows of activations by one panel, four input columns at each step.
//
//                          panel: b[0]     b[1]     b[2]     b[3]      16 columns each
//     row i: a = u0 u1 u2 u3, 16 times
//                                 c[i][0]  c[i][1]  c[i][2]  c[i][3]   += a . b[j], 16 sums each
template <int MR>
INLINE void accumulate(__m512i (&c)[MR][4], const uint8_t* q, int64_t q_stride, const int8_t* w,
                       int64_t steps) {
  for (int64_t k = 0; k < steps; k++, w += 4 * PANEL) {
    __m512i b[4];
    unroll<4>([&](auto j) INLINED {
      b[j] = _mm512_loadu_si512(w + 64 * j);
      _mm_prefetch(reinterpret_cast<const char*>(w + PREFETCH_BYTES + 64 * j), _MM_HINT_T0);
    });
    unroll<MR>([&](auto i) INLINED {
      int32_t four;
      std::memcpy(&four, q + i * q_stride + 4 * k, sizeof four);
      const __m512i a = _mm512_set1_epi32(four);
      unroll<4>([&](auto j) INLINED { c[i][j] = _mm512_dpbusd_epi32(c[i][j], a, b[j]); });
    });
  }
  // a new value each, after the loop: what the scaling below cannot keep in a register is then spilled here,
  // not at every step
  unroll<MR, 4>([&](auto i, auto j) INLINED { asm volatile("" : "+v"(c[i][j])); });
}

struct Weight {
  const int8_t* packed;
  const float* scale;  // [N]
  int64_t steps;       // ceil(K / 4)
  const int8_t* panel(int64_t p) const { return packed + p * (steps + 1) * 4 * PANEL; }
};
struct Quantized {
  const uint8_t* q;    // [M, stride]
  int64_t stride;
  const float* scale;  // [M]
};

// (sum - compensation) * w_scale * x_scale of one tile, added to what `base` gives and handed to `out`
template <int MR, class Base, class Out>
INLINE void scale_sums(const __m512i (&c)[MR][4], const int8_t* compensation, const float* w_scale,
                       const float* x_scale, int64_t columns, Base base, Out out) {
  unroll<4>([&](auto j) INLINED {
    const __mmask16 m = first_lanes(columns - 16 * j);
    const __m512 ws = _mm512_maskz_loadu_ps(m, w_scale + 16 * j);
    const __m512i correction = _mm512_loadu_si512(compensation + 64 * j);
    unroll<MR>([&](auto i) INLINED {
      const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(c[i][j], correction)), ws);
      out(i, j, m, _mm512_fmadd_ps(y, _mm512_set1_ps(x_scale[i]), base(i, j, m)));
    });
  });
}

struct Product {
  Quantized x;
  Weight w;
  const float* bias;  // [N] or null
  // low-rank branch: t = x . down, quantized per row (t.q is null without a branch), times `up`
  Quantized t;
  Weight up;
  void* y;  // [M, N]
  int64_t M, N;
};

// Add the low-rank branch to one tile and store it. `held`: what the layer itself gave, float32 [MR, 64]. Not
// inlined: with both products in one function GCC 12 keeps sums in memory.
template <int MR, class Y>
__attribute__((noinline)) void add_branch(const Product& p, int64_t row, int64_t panel, const float* held) {
  __m512i c[MR][4];
  unroll<MR, 4>([&](auto i, auto j) INLINED { c[i][j] = _mm512_setzero_si512(); });
  const int8_t* up = p.up.panel(panel);
  accumulate<MR>(c, p.t.q + row * p.t.stride, p.t.stride, up + 4 * PANEL, p.up.steps);
  const int64_t column = panel * PANEL;
  auto* y = static_cast<typename Y::T*>(p.y) + row * p.N + column;
  scale_sums<MR>(
      c, up, p.up.scale + column, p.t.scale + row, p.N - column,
      [&](int i, int j, __mmask16) INLINED { return _mm512_loadu_ps(held + i * PANEL + 16 * j); },
      [&](int i, int j, __mmask16 m, __m512 v) INLINED { Y::store(y + i * p.N + 16 * j, m, v); });
}

// One tile of MR rows x 64 columns: products from step `from` to step `to`; `sums`, int32 [MR, 64], holds
// those before. Scaled and stored at the last step.
template <int MR, class Y>
INLINE void compute_tile(const Product& p, int64_t row, int64_t panel, int64_t from, int64_t to,
                         int32_t* sums) {
  __m512i c[MR][4];
  unroll<MR, 4>([&](auto i, auto j) INLINED {
    c[i][j] = from ? _mm512_loadu_si512(sums + i * PANEL + 16 * j) : _mm512_setzero_si512();
  });
  const int8_t* w = p.w.panel(panel);
  accumulate<MR>(c, p.x.q + row * p.x.stride + 4 * from, p.x.stride, w + (1 + from) * 4 * PANEL, to - from);
  if (to < p.w.steps) {
    unroll<MR, 4>([&](auto i, auto j) INLINED { _mm512_storeu_si512(sums + i * PANEL + 16 * j, c[i][j]); });
    return;
  }
  const int64_t column = panel * PANEL, columns = p.N - column;
  auto bias = [&](int, int j, __mmask16 m) INLINED {
    return p.bias ? _mm512_maskz_loadu_ps(m, p.bias + column + 16 * j) : _mm512_setzero_ps();
  };
  if (p.t.q) {
    float held[MR * PANEL];  // the layer's own result, in L1 until the branch is added
    scale_sums<MR>(
        c, w, p.w.scale + column, p.x.scale + row, columns, bias,
        [&](int i, int j, __mmask16, __m512 v) INLINED { _mm512_storeu_ps(held + i * PANEL + 16 * j, v); });
    add_branch<MR, Y>(p, row, panel, held);
  } else {
    auto* y = static_cast<typename Y::T*>(p.y) + row * p.N + column;
    scale_sums<MR>(
        c, w, p.w.scale + column, p.x.scale + row, columns, bias,
        [&](int i, int j, __mmask16 m, __m512 v) INLINED { Y::store(y + i * p.N + 16 * j, m, v); });
  }
}

// Rows `row` .. `end` of one panel, six at a time; the number of rows of a tile must be a constant, so the
// last tile has its own code
template <class Y>
void compute_tiles(const Product& p, int64_t row, int64_t end, int64_t panel, int64_t from, int64_t to,
                   int32_t* sums) {
  for (int64_t start = row; row < end; row += TILE_ROWS) {
    int32_t* s = sums + (row - start) * PANEL;
    switch (std::min(TILE_ROWS, end - row)) {
      case 6: compute_tile<6, Y>(p, row, panel, from, to, s); break;
      case 5: compute_tile<5, Y>(p, row, panel, from, to, s); break;
      case 4: compute_tile<4, Y>(p, row, panel, from, to, s); break;
      case 3: compute_tile<3, Y>(p, row, panel, from, to, s); break;
      case 2: compute_tile<2, Y>(p, row, panel, from, to, s); break;
      default: compute_tile<1, Y>(p, row, panel, from, to, s);
    }
  }
}

// The whole product. A task is one block of rows by some neighboring panels; threads take tasks as they come.
//
//     for each task (block of 192 rows, panels of a chunk)
//       for each panel of the chunk                    its weights come from memory once for the block
//         for each piece of K                          one piece where K <= 2 * K_BLOCK
//           for each 6 rows of the block: a tile       activations of the block stay in L2
template <class Y>
void multiply(const Product& p, int threads) {
  if (p.M == 0) return;
  const int64_t panels = ceil_div(p.N, PANEL), blocks = ceil_div(p.M, ROW_BLOCK);
  const int64_t k_block = p.w.steps > 2 * K_BLOCK / 4 ? K_BLOCK / 4 : p.w.steps;
  // enough tasks for every thread to end at about the same time, few enough that a row block stays in cache
  // over many panels
  const int64_t chunks = std::clamp<int64_t>(ceil_div(8 * threads, blocks), 1, panels);
  const int64_t width = ceil_div(panels, chunks);  // panels of a chunk
  const int64_t tasks = blocks * ceil_div(panels, width);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<int32_t[]> sums(k_block < p.w.steps ? new int32_t[ROW_BLOCK * PANEL] : nullptr);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t block = task % blocks, chunk = task / blocks;
      const int64_t row = block * ROW_BLOCK, end = std::min(p.M, row + ROW_BLOCK);
      for (int64_t panel = chunk * width; panel < std::min(panels, (chunk + 1) * width); panel++)
        for (int64_t k = 0; k < p.w.steps; k += k_block)
          compute_tiles<Y>(p, row, end, panel, k, std::min(p.w.steps, k + k_block), sums.get());
    }
  }
}

void multiply(const Product& p, int dtype, int threads) {
  switch (dtype) {
    case BF16: return multiply<BFloat16>(p, threads);
    case F16: return multiply<Float16>(p, threads);
    default: return multiply<Float32>(p, threads);
  }
}

void quantize_rows(const RowsInput& in, int dtype, uint8_t* q, int64_t q_stride, float* scale, int threads) {
  switch (dtype) {
    case BF16: return quantize_rows<BFloat16>(in, q, q_stride, scale, threads);
    case F16: return quantize_rows<Float16>(in, q, q_stride, scale, threads);
    default: return quantize_rows<Float32>(in, q, q_stride, scale, threads);
  }
}

}  // namespace

extern "C" {

// x [M, K] with `stride` -> q + 128: uint8 [M, round_up(K, 4)], scale [M]. In this order: GELU on columns >=
// gelu_from (-1: none), factor [K] (or null), rotation in groups of `rotation` that divide K (0: none), by
// Sylvester's Hadamard matrix (2, 4, 8, 16, ...) or else by the regular one (4, 16, 64, 256, ...).
void int8run_quantize(const void* x, int dtype, int64_t M, int64_t K, int64_t stride, const float* factor,
                      int64_t rotation, int sylvester, int64_t gelu_from, uint8_t* q, float* scale,
                      int threads) {
  const RowsInput rows{x, M, K, stride, factor, rotation, sylvester != 0, gelu_from};
  quantize_rows(rows, dtype, q, round_up(K, 4), scale, threads);
}

// y [M, N] = q . w * w_scale * x_scale + bias + low-rank branch; q and x_scale as int8run_quantize writes
// them. Branch (rank 0: none): t = q . down * down_scale * x_scale * strengths, quantized per row, then t .
// up * up_scale on top.
void int8run_linear(const uint8_t* q, const float* x_scale, int64_t M, int64_t K, int64_t N,
                    const int8_t* packed, const float* w_scale, const float* bias, int64_t rank,
                    const int8_t* down, const float* down_scale, const int8_t* up, const float* up_scale,
                    void* y, int dtype, int threads) {
  const Quantized x{q, round_up(K, 4), x_scale};
  const Weight weight{packed, w_scale, ceil_div(K, 4)};
  const Quantized no_rows{nullptr, 0, nullptr};
  const Weight no_weight{nullptr, nullptr, 0};
  if (!rank) return multiply({x, weight, bias, no_rows, no_weight, y, M, N}, dtype, threads);

  // x . down, float32 [M, rank], as a product of its own
  std::unique_ptr<float[]> t(new float[M * rank]);
  const Weight down_weight{down, down_scale, weight.steps};
  multiply({x, down_weight, nullptr, no_rows, no_weight, t.get(), M, rank}, F32, threads);

  // its rows as bytes, as x itself is
  const int64_t t_stride = round_up(rank, 4);
  std::unique_ptr<uint8_t[]> t_q(new uint8_t[M * t_stride]);
  std::unique_ptr<float[]> t_scale(new float[M]);
  const RowsInput t_rows{t.get(), M, rank, /* stride */ rank, /* factor */ nullptr,
                         /* rotation */ 0, /* sylvester */ false, /* gelu_from */ -1};
  quantize_rows(t_rows, F32, t_q.get(), t_stride, t_scale.get(), threads);

  const Quantized t_quantized{t_q.get(), t_stride, t_scale.get()};
  const Weight up_weight{up, up_scale, t_stride / 4};
  multiply({x, weight, bias, t_quantized, up_weight, y, M, N}, dtype, threads);
}
}
