// 16 numbers in two registers of AVX2. vectors_avx512.h says what each operation must give; all give the same
// bits.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common.h"

namespace {

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Mask {
  int n;  // the first n of 16 lanes
};

constexpr Mask ALL{16};
INLINE Mask first_lanes(int64_t n) { return {static_cast<int>(n >= 16 ? 16 : n <= 0 ? 0 : n)}; }
// All bits of the lanes of a mask that has n lanes left for this register
INLINE __m256i lane_bits(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// --- memory

INLINE Floats load(const float* p, Mask m = ALL) {
  if (m.n == 16) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  return {_mm256_maskload_ps(p, lane_bits(m.n)), _mm256_maskload_ps(p + 8, lane_bits(m.n - 8))};
}
INLINE void store(float* p, Floats v, Mask m = ALL) {
  if (m.n == 16) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
  } else {
    _mm256_maskstore_ps(p, lane_bits(m.n), v.low);
    _mm256_maskstore_ps(p + 8, lane_bits(m.n - 8), v.high);
  }
}
INLINE __m256i load_register(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store_register(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
INLINE Ints load(const int32_t* p) { return {load_register(p), load_register(p + 8)}; }
INLINE void store(int32_t* p, Ints v) {
  store_register(p, v.low);
  store_register(p + 8, v.high);
}
// The first lanes of 16-bit numbers; there are no masked loads of these
INLINE __m256i load_16_bits(const uint16_t* p, Mask m) {
  if (m.n == 16) return load_register(p);
  uint16_t copy[16] = {};
  std::memcpy(copy, p, m.n * sizeof *p);
  return load_register(copy);
}
INLINE void store_16_bits(uint16_t* p, __m256i v, Mask m) {
  if (m.n == 16) return store_register(p, v);
  uint16_t copy[16];
  store_register(copy, v);
  std::memcpy(p, copy, m.n * sizeof *p);
}
INLINE __m256i join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
INLINE __m128i low_half(__m256i v) { return _mm256_castsi256_si128(v); }
INLINE __m128i high_half(__m256i v) { return _mm256_extracti128_si256(v, 1); }
// 32-bit lanes from 0 to 65535 to 16 bits
INLINE __m256i narrow(Ints v) {
  // packs within halves: low 0-3, high 0-3 | low 4-7, high 4-7
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(v.low, v.high), 0xD8);
}
INLINE Ints load_halves(const uint16_t* p, Mask m) {
  const __m256i v = load_16_bits(p, m);
  return {_mm256_cvtepu16_epi32(low_half(v)), _mm256_cvtepu16_epi32(high_half(v))};
}
INLINE void store_halves(uint16_t* p, Ints v, Mask m) { store_16_bits(p, narrow(v), m); }
INLINE Floats load_float16(const uint16_t* p, Mask m) {
  const __m256i v = load_16_bits(p, m);
  return {_mm256_cvtph_ps(low_half(v)), _mm256_cvtph_ps(high_half(v))};
}
INLINE void store_float16(uint16_t* p, Floats v, Mask m) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store_16_bits(p, join(_mm256_cvtps_ph(v.low, NEAREST), _mm256_cvtps_ph(v.high, NEAREST)), m);
}
INLINE __m128i narrow_to_bytes(Ints v) {
  const __m256i halves = narrow(v);
  return _mm_packus_epi16(low_half(halves), high_half(halves));
}
INLINE void store_bytes(uint8_t* p, Ints v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_to_bytes(v));
}
INLINE void store_bytes(uint8_t* p, Ints v, Mask m) {
  uint8_t copy[16];
  store_bytes(copy, v);
  std::memcpy(p, copy, m.n);
}

// --- float32

INLINE Floats fill(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE Floats add(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
INLINE Floats subtract(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
INLINE Floats multiply(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
INLINE Floats divide(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats subtract_product(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINE __m256 clamp(__m256 v, float low, float high) {
  return _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(low)), _mm256_set1_ps(high));
}
INLINE Floats clamp(Floats v, float low, float high) {
  return {clamp(v.low, low, high), clamp(v.high, low, high)};
}
INLINE __m256 look_up(Floats table, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
  const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INLINE Floats look_up(Floats table, Ints index) {
  return {look_up(table, index.low), look_up(table, index.high)};
}
INLINE Floats load_float8(const uint8_t* p) {
  const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(v, _mm256_set1_epi16(0x80)), 8);
  const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(v, _mm256_set1_epi16(0x7F)), 7);
  const __m256i halves = _mm256_or_si256(sign, magnitude);
  const Floats smaller{_mm256_cvtph_ps(low_half(halves)), _mm256_cvtph_ps(high_half(halves))};
  return multiply(smaller, fill(256.0f));
}
INLINE Floats round(Floats v) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.low, NEAREST), _mm256_round_ps(v.high, NEAREST)};
}
// A power of two has no more than its exponent, 127 in the bits from 23 on for 2^0. Beyond 2^127 it is the product of
// two: v 2^(n/2) 2^(n - n/2).
INLINE __m256 power_of_2(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
INLINE __m256 scale_by_power_of_2(__m256 v, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  return _mm256_mul_ps(_mm256_mul_ps(v, power_of_2(half)), power_of_2(rest));
}
INLINE Floats scale_by_power_of_2(Floats v, Floats n) {
  return {scale_by_power_of_2(v.low, n.low), scale_by_power_of_2(v.high, n.high)};
}
// bits of whole n, moved to where the exponent is, are added to it
INLINE __m256 add_to_exponent(__m256 v, __m256 n) {
  const __m256i exponents = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponents));
}
INLINE Floats scale_normal_by_power_of_2(Floats v, Floats n) {
  return {add_to_exponent(v.low, n.low), add_to_exponent(v.high, n.high)};
}
INLINE Floats maximum(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
INLINE float reduce_maximum(Floats v) {
  const __m256 eight = _mm256_max_ps(v.low, v.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
INLINE float reduce_sum(Floats v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
INLINE Floats select(Mask m, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(lane_bits(m.n))),
          _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(lane_bits(m.n - 8)))};
}

// --- int32

INLINE Ints fill_ints(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
INLINE Ints add(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
INLINE Ints subtract(Ints a, Ints b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
INLINE Ints maximum(Ints a, Ints b) {
  return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}
INLINE Ints bits_and(Ints a, Ints b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
template <int N>
INLINE Ints shift_right(Ints v) { return {_mm256_srli_epi32(v.low, N), _mm256_srli_epi32(v.high, N)}; }
INLINE Ints shift_left_8(Ints v) { return {_mm256_slli_epi32(v.low, 8), _mm256_slli_epi32(v.high, 8)}; }
INLINE Ints shift_left_16(Ints v) { return {_mm256_slli_epi32(v.low, 16), _mm256_slli_epi32(v.high, 16)}; }
INLINE Ints shift_right_16(Ints v) { return {_mm256_srli_epi32(v.low, 16), _mm256_srli_epi32(v.high, 16)}; }
INLINE int32_t reduce_maximum(Ints v) {
  const __m256i eight = _mm256_max_epi32(v.low, v.high);
  const __m128i four = _mm_max_epi32(low_half(eight), high_half(eight));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

// --- between the two

INLINE Floats as_floats(Ints bits) {
  return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)};
}
INLINE Ints as_bits(Floats v) { return {_mm256_castps_si256(v.low), _mm256_castps_si256(v.high)}; }
INLINE Ints magnitude_bits(Floats v) { return bits_and(as_bits(v), fill_ints(0x7FFFFFFF)); }
INLINE Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
INLINE Ints round_to_ints(Floats v) { return {_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high)}; }
INLINE __m256i saturate_to_bytes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i apart = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703, 0x0C080400, 0x0D090501,
                                          0x0E0A0602, 0x0F0B0703);
  return _mm256_shuffle_epi8(_mm256_max_epi8(apart, _mm256_set1_epi8(-127)), order);
}
INLINE Ints saturate_to_bytes(Ints a, Ints b, Ints c, Ints d) {
  return {saturate_to_bytes(a.low, b.low, c.low, d.low), saturate_to_bytes(a.high, b.high, c.high, d.high)};
}
INLINE __m256i where_nan(__m256 v, __m256i nan, __m256i other) {
  return _mm256_blendv_epi8(other, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
INLINE Ints where_nan(Floats v, Ints nan, Ints other) {
  return {where_nan(v.low, nan.low, other.low), where_nan(v.high, nan.high, other.high)};
}

// --- lanes

INLINE Floats swap_neighbors(Floats v) {
  return {_mm256_permute_ps(v.low, 0xB1), _mm256_permute_ps(v.high, 0xB1)};
}
INLINE Floats swap_pairs(Floats v) {
  return {_mm256_permute_ps(v.low, 0x4E), _mm256_permute_ps(v.high, 0x4E)};
}
INLINE Floats reverse_four(Floats v) {
  return {_mm256_permute_ps(v.low, 0x1B), _mm256_permute_ps(v.high, 0x1B)};
}
INLINE Floats swap_quarters(Floats v) {
  return {_mm256_permute2f128_ps(v.low, v.low, 1), _mm256_permute2f128_ps(v.high, v.high, 1)};
}
INLINE Floats swap_halves(Floats v) { return {v.high, v.low}; }
INLINE Floats reverse_quarters(Floats v) { return swap_halves(swap_quarters(v)); }
// The sign bit of a lane is bit i of MINUS
template <int MINUS>
INLINE __m256 sign_bits() {
  constexpr int SIGN = static_cast<int>(0x80000000);
  return _mm256_castsi256_ps(_mm256_setr_epi32(MINUS & 1 ? SIGN : 0, MINUS & 2 ? SIGN : 0, MINUS & 4 ? SIGN : 0,
                                               MINUS & 8 ? SIGN : 0, MINUS & 16 ? SIGN : 0,
                                               MINUS & 32 ? SIGN : 0, MINUS & 64 ? SIGN : 0,
                                               MINUS & 128 ? SIGN : 0));
}
template <int MINUS>
INLINE Floats add_or_subtract(Floats a, Floats v) {
  return {_mm256_add_ps(a.low, _mm256_xor_ps(v.low, sign_bits<MINUS>())),
          _mm256_add_ps(a.high, _mm256_xor_ps(v.high, sign_bits<(MINUS >> 8)>()))};
}

// --- for the product

using Weights = Ints;  // 16 columns, four weights of each
using Four = __m256i;  // four activations of a row, in all 8 places of a register
INLINE Weights load_weights(const int8_t* p) { return {load_register(p), load_register(p + 32)}; }
INLINE Four broadcast(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm256_set1_epi32(four);
}
INLINE void keep_in_register(Ints& v) { asm volatile("" : "+x"(v.low), "+x"(v.high)); }

}  // namespace
