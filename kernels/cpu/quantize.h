// Rows of activations to unsigned bytes: GELU, factor, rotation, and then rounding by a scale of the row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace {

constexpr float TINY = 1e-30f;       // the scale of a row of zeros, as in quantize_rowwise/reference.py
constexpr int32_t ZERO_POINT = 128;  // what is added to a signed integer to store it as an unsigned byte

// --- 16 numbers of each dtype to float32 and back, under a mask

struct Float32 {
  using T = float;
  INLINE Floats load(const T* p, Mask m) { return ::load(p, m); }
  INLINE void store(T* p, Mask m, Floats v) { ::store(p, v, m); }
};
struct BFloat16 {
  using T = uint16_t;
  // bfloat16 is the high half of a float32
  INLINE Floats load(const T* p, Mask m) { return as_floats(shift_left_16(load_halves(p, m))); }
  // Adding 0x7FFF to the low half carries into the high one above the middle; adding the high half's last bit
  // as well sends the middle itself to the even neighbor.
  INLINE void store(T* p, Mask m, Floats v) {
    const Ints bits = as_bits(v);
    const Ints odd = bits_and(shift_right_16(bits), fill_ints(1));
    const Ints rounded = add(bits, add(odd, fill_ints(0x7FFF)));
    // a carry would turn NaN into infinity
    store_halves(p, shift_right_16(where_nan(v, fill_ints(0x7FC00000), rounded)), m);
  }
};
struct Float16 {
  using T = uint16_t;
  INLINE Floats load(const T* p, Mask m) { return load_float16(p, m); }
  INLINE void store(T* p, Mask m, Floats v) { store_float16(p, v, m); }
};

// f(k, mask) for 16 numbers of a row at a time. The mask is a constant but for the last of them: a CPU fetches ahead what
// plain loads read, and nothing for masked ones (on Zen 5, a row that comes from memory took twice as long).
template <class F>
INLINE void for_each_16(int64_t K, F f) {
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) f(k, ALL);
  if (k < K) f(k, first_lanes(K - k));
}

// --- what may happen to a row before rounding: GELU

// e^x; infinity from 88.73 on, never less than e^-87.3. Cody-Waite reduction x = n ln 2 + r, with ln 2 as a
// sum of two constants so that r is exact, and a polynomial of degree 6 for e^r (error about 1 ulp).
INLINE Floats exponential(Floats x) {
  x = clamp(x, -87.3f, 100.0f);
  const Floats n = round(multiply(x, fill(1.44269504f)));  // 1 / ln 2
  Floats r = subtract_product(n, fill(0.693359375f), x);
  r = subtract_product(n, fill(-2.12194440e-4f), r);
  Floats p = fill(1.0f / 720);
  p = multiply_add(p, r, fill(1.0f / 120));
  p = multiply_add(p, r, fill(1.0f / 24));
  p = multiply_add(p, r, fill(1.0f / 6));
  p = multiply_add(p, r, fill(0.5f));
  p = multiply_add(p, r, fill(1.0f));
  p = multiply_add(p, r, fill(1.0f));
  return scale_by_power_of_2(p, n);
}

// GELU by tanh, written with one exponential: x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x^3)))
INLINE Floats gelu(Floats x) {
  const Floats cubic = multiply_add(multiply(multiply(x, x), fill(0.044715f)), x, x);
  const Floats e = exponential(multiply(cubic, fill(-1.5957691216f)));
  // NaN, which the clamp in `exponential` may hide, is still in x
  return divide(x, add(fill(1.0f), e));
}

// The largest |x|, compared as integers: NaN and infinity have the largest bit patterns, so they reach scale
// and output.
INLINE Ints max_magnitude(Ints m, Floats v) { return maximum(m, magnitude_bits(v)); }
INLINE float reduce_magnitude(Ints m) {
  const int32_t bits = reduce_maximum(m);
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
  INLINE Floats within(Floats v) {
    const Floats two = fill(2.0f);
    if constexpr (W >= 4) {
      Floats sum = add(v, swap_neighbors(v));
      sum = add(sum, swap_pairs(sum));
      v = subtract_product(two, reverse_four(v), sum);
    }
    if constexpr (W >= 16) {  // the same across the four quarters
      Floats sum = add(v, swap_quarters(v));
      sum = add(sum, swap_halves(sum));
      v = subtract_product(two, reverse_quarters(v), sum);
    }
    return v;
  }
  INLINE void butterfly(Floats* r, int apart) {
    const Floats a = r[0], b = r[apart], c = r[2 * apart], d = r[3 * apart];
    const Floats sum = add(add(a, b), add(c, d)), two = fill(2.0f);
    r[0] = subtract_product(two, d, sum);
    r[apart] = subtract_product(two, c, sum);
    r[2 * apart] = subtract_product(two, b, sum);
    r[3 * apart] = subtract_product(two, a, sum);
  }
};
// Sylvester's matrix, Kronecker powers of a 2 x 2 block:
//
//     +  +              y_0 = x_0 + x_1
//     +  -              y_1 = x_0 - x_1
struct Sylvester {
  static constexpr int RADIX = 2;
  template <int W>
  INLINE Floats within(Floats v) {
    if constexpr (W >= 2) v = add_or_subtract<0xAAAA>(swap_neighbors(v), v);
    if constexpr (W >= 4) v = add_or_subtract<0xCCCC>(swap_pairs(v), v);
    if constexpr (W >= 8) v = add_or_subtract<0xF0F0>(swap_quarters(v), v);
    if constexpr (W >= 16) v = add_or_subtract<0xFF00>(swap_halves(v), v);
    return v;
  }
  INLINE void butterfly(Floats* r, int apart) {
    const Floats a = r[0], b = r[apart];
    r[0] = add(a, b);
    r[apart] = subtract(a, b);
  }
};

// Multiply R registers by the matrix of R, in rounds over registers that lie 1, RADIX, RADIX * RADIX, ...
// apart
template <class H, int R, int APART = 1>
INLINE void rotate_registers(Floats (&r)[R]) {
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
Ints rotate_pass(const typename X::T* x, float* row, int64_t K, int64_t span) {
  Ints m = fill_ints(0);
  for (int64_t group = 0; group < K; group += R * span)
    for (int64_t k = group; k < group + span; k += 16) {
      Floats r[R];
      unroll<R>([&](auto i) INLINED {
        r[i] = H::template within<W>(X::load(x + k + i * span, R == 1 ? first_lanes(K - k) : ALL));
      });
      rotate_registers<H>(r);
      unroll<R>([&](auto i) INLINED {
        m = max_magnitude(m, r[i]);
        store(row + k + i * span, r[i]);
      });
    }
  return m;
}
// The pass for groups of at most G numbers: of a register or less, or of up to 16 registers
template <class X, class H, int G>
Ints rotate_in_registers(const typename X::T* x, float* row, int64_t K, int64_t group) {
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
  Ints m = rotate_in_registers<X, H, 256>(x, row, K, group);
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
  Ints m[4] = {fill_ints(0), fill_ints(0), fill_ints(0), fill_ints(0)};
  int64_t k = 0;
  for (; k + 64 <= K; k += 64)
    unroll<4>([&](auto i) INLINED { m[i] = max_magnitude(m[i], X::load(x + k + 16 * i, ALL)); });
  for (; k < K; k += 16) m[0] = max_magnitude(m[0], X::load(x + k, first_lanes(K - k)));
  return reduce_magnitude(maximum(maximum(m[0], m[1]), maximum(m[2], m[3])));
}

// One row x [K]: returns its scale and writes q + 128; bytes from K to a multiple of 4 are written too (their
// weights are 0). x is `unit` times too large, which the scale makes up for: exactly where `unit` is a power
// of two, else to a last bit.
template <class X>
float quantize_row(const typename X::T* x, int64_t K, float absmax, float unit, uint8_t* q) {
  float scale = absmax / unit / 127.0f;
  if (scale < TINY) scale = TINY;
  const Floats divisor = fill(scale * unit);
  // ties to even; what is not a number becomes 0 here and shows in the scale
  auto to_codes = [&](Floats v) INLINED {
    return maximum(add(round_to_ints(divide(v, divisor)), fill_ints(ZERO_POINT)), fill_ints(0));
  };
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) store_bytes(q + k, to_codes(X::load(x + k, ALL)));
  if (k < K) store_bytes(q + k, to_codes(X::load(x + k, first_lanes(K - k))), first_lanes(round_up(K, 4) - k));
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
  Ints m = fill_ints(0);
  for_each_16(in.K, [&](int64_t k, Mask inside) INLINED {
    Floats v = X::load(x + k, inside);
    if (in.gelu_from >= 0 && k + 16 > in.gelu_from)
      v = select(first_lanes(in.gelu_from - k), v, gelu(v));
    if (in.factor) v = multiply(v, load(in.factor + k, inside));
    m = max_magnitude(m, v);
    store(row + k, v);
  });
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
  MemoryGuard memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> buffer;
    memory.run([&] { buffer.resize(changed || in.rotation ? round_up(in.K, 16) : 0); });
    float* row = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < in.M; i++) {
      if (memory.has_failed()) continue;
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
  memory.rethrow();
}

}  // namespace
