// 16 numbers in one register of AVX512, and what the kernels do with them. The other vectors_*.h have the same
// names; what each must give is said here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common.h"

namespace {

using Floats = __m512;  // 16 float32
using Ints = __m512i;   // 16 int32
using Mask = __mmask16;

constexpr Mask ALL = 0xFFFF;
// The mask of the first n of 16 lanes; n may be below 0 or above 16. One expression: with returns GCC places
// the branches otherwise in every kernel that asks for a mask.
INLINE Mask first_lanes(int64_t n) {
  return n >= 16 ? 0xFFFF
         : n <= 0 ? 0
                  : static_cast<Mask>((1u << n) - 1);
}

// --- memory; lanes outside the mask are read as 0 and are not written

INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
INLINE void store(float* p, Floats v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }
INLINE Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
INLINE void store(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
// 16-bit numbers in memory, 32-bit lanes here
INLINE Ints load_halves(const uint16_t* p, Mask m) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
}
INLINE void store_halves(uint16_t* p, Ints v, Mask m) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(v));
}
INLINE Floats load_float16(const uint16_t* p, Mask m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}
INLINE void store_float16(uint16_t* p, Floats v, Mask m) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// The low bytes of numbers from 0 to 255
INLINE void store_bytes(uint8_t* p, Ints v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(v));
}
INLINE void store_bytes(uint8_t* p, Ints v, Mask m) { _mm_mask_storeu_epi8(p, m, _mm512_cvtusepi32_epi8(v)); }

// --- float32: each operation is rounded once, as IEEE 754 says

INLINE Floats fill(float value) { return _mm512_set1_ps(value); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }      // a b + c
INLINE Floats subtract_product(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
INLINE Floats clamp(Floats v, float low, float high) {
  return _mm512_min_ps(_mm512_max_ps(v, fill(low)), fill(high));
}
// The numbers of a table of 16; of an index the low four bits count
INLINE Floats look_up(Floats table, Ints index) { return _mm512_permutexvar_ps(index, table); }
// 8-bit numbers of four bits of exponent and three of mantissa (e4m3), no NaN. A float16 with these bits is 2^8 times
// smaller, also where it is denormal.
INLINE Floats load_float8(const uint8_t* p) {
  const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(v, _mm256_set1_epi16(0x80)), 8);
  const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(v, _mm256_set1_epi16(0x7F)), 7);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, magnitude)), _mm512_set1_ps(256.0f));
}
// To whole numbers, ties to even
INLINE Floats round(Floats v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// v 2^n, for whole n
INLINE Floats scale_by_power_of_2(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
// The same where v and v 2^n are neither 0 nor denormal nor infinite: no more than an addition to the exponent
INLINE Floats scale_normal_by_power_of_2(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // of numbers, not NaN
INLINE float reduce_maximum(Floats v) { return _mm512_reduce_max_ps(v); }
// Halves are added to each other until one number is left
INLINE float reduce_sum(Floats v) { return _mm512_reduce_add_ps(v); }
// Lanes of the mask from a, the others from b
INLINE Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b, m, a); }

// --- int32

INLINE Ints fill_ints(int32_t value) { return _mm512_set1_epi32(value); }
INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
INLINE Ints maximum(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE Ints bits_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
template <int N>
INLINE Ints shift_right(Ints v) { return _mm512_srli_epi32(v, N); }
INLINE Ints shift_left_8(Ints v) { return _mm512_slli_epi32(v, 8); }
INLINE Ints shift_left_16(Ints v) { return _mm512_slli_epi32(v, 16); }
INLINE Ints shift_right_16(Ints v) { return _mm512_srli_epi32(v, 16); }
INLINE int32_t reduce_maximum(Ints v) { return _mm512_reduce_max_epi32(v); }

// --- between the two

INLINE Floats as_floats(Ints bits) { return _mm512_castsi512_ps(bits); }
INLINE Ints as_bits(Floats v) { return _mm512_castps_si512(v); }
INLINE Ints magnitude_bits(Floats v) { return as_bits(_mm512_abs_ps(v)); }
INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
INLINE Ints round_to_ints(Floats v) { return _mm512_cvtps_epi32(v); }  // ties to even
// Four numbers of each lane as its four bytes, the first in the lowest; what is beyond -127..127 becomes that
INLINE Ints saturate_to_bytes(Ints a, Ints b, Ints c, Ints d) {
  // bytes of a quarter: a a a a b b b b c c c c d d d d
  const Ints apart = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  const Ints order = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  return _mm512_shuffle_epi8(_mm512_max_epi8(apart, _mm512_set1_epi8(-127)), order);
}
// `nan` where v is not a number, else `other`
INLINE Ints where_nan(Floats v, Ints nan, Ints other) {
  return _mm512_mask_mov_epi32(other, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
}

// --- lanes: a register has four quarters of four numbers

INLINE Floats swap_neighbors(Floats v) { return _mm512_permute_ps(v, 0xB1); }             // 1 0 3 2
INLINE Floats swap_pairs(Floats v) { return _mm512_permute_ps(v, 0x4E); }                 // 2 3 0 1
INLINE Floats reverse_four(Floats v) { return _mm512_permute_ps(v, 0x1B); }               // 3 2 1 0
INLINE Floats swap_quarters(Floats v) { return _mm512_shuffle_f32x4(v, v, 0xB1); }        // quarters 1 0 3 2
INLINE Floats swap_halves(Floats v) { return _mm512_shuffle_f32x4(v, v, 0x4E); }          // quarters 2 3 0 1
INLINE Floats reverse_quarters(Floats v) { return _mm512_shuffle_f32x4(v, v, 0x1B); }     // quarters 3 2 1 0
// a + v; in the lanes whose bit of MINUS is set, a - v. As a product, since a masked subtraction would be one
// instruction more.
template <int MINUS>
INLINE Floats add_or_subtract(Floats a, Floats v) {
  return _mm512_fmadd_ps(v, _mm512_mask_mov_ps(fill(1.0f), MINUS, fill(-1.0f)), a);
}

// --- for the product

using Weights = __m512i;  // 16 columns, four weights of each
using Four = __m512i;     // four activations of a row, in all 16 places
INLINE Weights load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
INLINE Four broadcast(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return _mm512_set1_epi32(four);
}
// A new value, for the compiler, that is in a register now
INLINE void keep_in_register(Ints& v) { asm volatile("" : "+v"(v)); }

}  // namespace
