// 16 numbers in four registers of Arm's NEON. vectors_avx512.h says what each operation must give; all give the same
// bits (which integer stands for NaN is the one difference: it means nothing).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "common.h"

namespace {

struct Floats {
  float32x4_t q[4];
};
struct Ints {
  int32x4_t q[4];
};
struct Mask {
  int n;  // the first n of 16 lanes
};

constexpr Mask ALL{16};
INLINE Mask first_lanes(int64_t n) { return {static_cast<int>(n >= 16 ? 16 : n <= 0 ? 0 : n)}; }

// f for each of the four registers
template <class F>
INLINE Floats map_floats(F f) {
  return {f(0), f(1), f(2), f(3)};
}
template <class F>
INLINE Ints map_ints(F f) {
  return {f(0), f(1), f(2), f(3)};
}

// --- memory; there are no masked loads, so that a part goes through a copy

INLINE Floats load_all(const float* p) {
  return map_floats([&](int i) INLINED { return vld1q_f32(p + 4 * i); });
}
INLINE void store_all(float* p, Floats v) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.q[i]);
}
INLINE Floats load(const float* p, Mask m = ALL) {
  if (m.n == 16) return load_all(p);
  float copy[16] = {};
  std::memcpy(copy, p, m.n * sizeof *p);
  return load_all(copy);
}
INLINE void store(float* p, Floats v, Mask m = ALL) {
  if (m.n == 16) return store_all(p, v);
  float copy[16];
  store_all(copy, v);
  std::memcpy(p, copy, m.n * sizeof *p);
}
INLINE Ints load(const int32_t* p) {
  return map_ints([&](int i) INLINED { return vld1q_s32(p + 4 * i); });
}
INLINE void store(int32_t* p, Ints v) {
  for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, v.q[i]);
}
struct Halves {
  uint16x4_t q[4];
};
INLINE Halves load_16_bits(const uint16_t* p, Mask m) {
  uint16_t copy[16] = {};
  if (m.n < 16) {
    std::memcpy(copy, p, m.n * sizeof *p);
    p = copy;
  }
  return {vld1_u16(p), vld1_u16(p + 4), vld1_u16(p + 8), vld1_u16(p + 12)};
}
INLINE void store_16_bits(uint16_t* p, Halves v, Mask m) {
  uint16_t copy[16];
  uint16_t* to = m.n == 16 ? p : copy;
  for (int i = 0; i < 4; i++) vst1_u16(to + 4 * i, v.q[i]);
  if (m.n < 16) std::memcpy(p, copy, m.n * sizeof *p);
}
INLINE Ints load_halves(const uint16_t* p, Mask m) {
  const Halves v = load_16_bits(p, m);
  return map_ints([&](int i) INLINED { return vreinterpretq_s32_u32(vmovl_u16(v.q[i])); });
}
INLINE Halves narrow(Ints v) {
  Halves narrowed;
  for (int i = 0; i < 4; i++) narrowed.q[i] = vmovn_u32(vreinterpretq_u32_s32(v.q[i]));
  return narrowed;
}
INLINE void store_halves(uint16_t* p, Ints v, Mask m) { store_16_bits(p, narrow(v), m); }
INLINE Floats load_float16(const uint16_t* p, Mask m) {
  const Halves v = load_16_bits(p, m);
  return map_floats([&](int i) INLINED { return vcvt_f32_f16(vreinterpret_f16_u16(v.q[i])); });
}
INLINE void store_float16(uint16_t* p, Floats v, Mask m) {
  Halves narrowed;
  for (int i = 0; i < 4; i++) narrowed.q[i] = vreinterpret_u16_f16(vcvt_f16_f32(v.q[i]));
  store_16_bits(p, narrowed, m);
}
INLINE void store_bytes(uint8_t* p, Ints v) {
  const Halves halves = narrow(v);
  vst1q_u8(p, vcombine_u8(vmovn_u16(vcombine_u16(halves.q[0], halves.q[1])),
                          vmovn_u16(vcombine_u16(halves.q[2], halves.q[3]))));
}
INLINE void store_bytes(uint8_t* p, Ints v, Mask m) {
  uint8_t copy[16];
  store_bytes(copy, v);
  std::memcpy(p, copy, m.n);
}

// --- float32

INLINE Floats fill(float value) {
  return map_floats([&](int) INLINED { return vdupq_n_f32(value); });
}
INLINE Floats add(Floats a, Floats b) {
  return map_floats([&](int i) INLINED { return vaddq_f32(a.q[i], b.q[i]); });
}
INLINE Floats subtract(Floats a, Floats b) {
  return map_floats([&](int i) INLINED { return vsubq_f32(a.q[i], b.q[i]); });
}
INLINE Floats multiply(Floats a, Floats b) {
  return map_floats([&](int i) INLINED { return vmulq_f32(a.q[i], b.q[i]); });
}
INLINE Floats divide(Floats a, Floats b) {
  return map_floats([&](int i) INLINED { return vdivq_f32(a.q[i], b.q[i]); });
}
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return map_floats([&](int i) INLINED { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}
INLINE Floats subtract_product(Floats a, Floats b, Floats c) {
  return map_floats([&](int i) INLINED { return vfmsq_f32(c.q[i], a.q[i], b.q[i]); });
}
INLINE Floats clamp(Floats v, float low, float high) {
  return map_floats([&](int i) INLINED { return vminq_f32(vmaxq_f32(v.q[i], vdupq_n_f32(low)), vdupq_n_f32(high)); });
}
INLINE Floats look_up(Floats table, Ints index) {
  uint8x16x4_t bytes;
  for (int i = 0; i < 4; i++) bytes.val[i] = vreinterpretq_u8_f32(table.q[i]);
  return map_floats([&](int i) INLINED {
    // the four bytes of number n begin at 4 n
    const uint32x4_t number = vandq_u32(vreinterpretq_u32_s32(index.q[i]), vdupq_n_u32(15));
    const uint32x4_t places = vmlaq_n_u32(vdupq_n_u32(0x03020100), number, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(places)));
  });
}
INLINE Floats load_float8(const uint8_t* p) {
  uint16_t halves[16];
  for (int i = 0; i < 16; i++) halves[i] = static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7);
  return multiply(load_float16(halves, ALL), fill(256.0f));
}
INLINE Floats round(Floats v) {
  return map_floats([&](int i) INLINED { return vrndnq_f32(v.q[i]); });
}
// As in vectors_avx2.h: v 2^(n/2) 2^(n - n/2)
INLINE float32x4_t power_of_2(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
INLINE Floats scale_by_power_of_2(Floats v, Floats n) {
  return map_floats([&](int i) INLINED {
    const int32x4_t whole = vcvtnq_s32_f32(n.q[i]), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(v.q[i], power_of_2(half)), power_of_2(vsubq_s32(whole, half)));
  });
}
INLINE Floats scale_normal_by_power_of_2(Floats v, Floats n) {
  return map_floats([&](int i) INLINED {
    const int32x4_t exponents = vshlq_n_s32(vcvtnq_s32_f32(n.q[i]), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v.q[i]), exponents));
  });
}
INLINE Floats maximum(Floats a, Floats b) {
  return map_floats([&](int i) INLINED { return vmaxq_f32(a.q[i], b.q[i]); });
}
INLINE float reduce_maximum(Floats v) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.q[0], v.q[1]), vmaxq_f32(v.q[2], v.q[3])));
}
INLINE float reduce_sum(Floats v) {
  const float32x4_t four = vaddq_f32(vaddq_f32(v.q[0], v.q[2]), vaddq_f32(v.q[1], v.q[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE Floats select(Mask m, Floats a, Floats b) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  return map_floats([&](int i) INLINED {
    const uint32x4_t inside = vcgtq_s32(vdupq_n_s32(m.n - 4 * i), vld1q_s32(lanes));
    return vbslq_f32(inside, a.q[i], b.q[i]);
  });
}

// --- int32

INLINE Ints fill_ints(int32_t value) {
  return map_ints([&](int) INLINED { return vdupq_n_s32(value); });
}
INLINE Ints add(Ints a, Ints b) {
  return map_ints([&](int i) INLINED { return vaddq_s32(a.q[i], b.q[i]); });
}
INLINE Ints subtract(Ints a, Ints b) {
  return map_ints([&](int i) INLINED { return vsubq_s32(a.q[i], b.q[i]); });
}
INLINE Ints maximum(Ints a, Ints b) {
  return map_ints([&](int i) INLINED { return vmaxq_s32(a.q[i], b.q[i]); });
}
INLINE Ints bits_and(Ints a, Ints b) {
  return map_ints([&](int i) INLINED { return vandq_s32(a.q[i], b.q[i]); });
}
template <int N>
INLINE Ints shift_right(Ints v) {
  return map_ints([&](int i) INLINED {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v.q[i]), vdupq_n_s32(-N)));
  });
}
INLINE Ints shift_left_8(Ints v) {
  return map_ints([&](int i) INLINED { return vshlq_n_s32(v.q[i], 8); });
}
INLINE Ints shift_left_16(Ints v) {
  return map_ints([&](int i) INLINED { return vshlq_n_s32(v.q[i], 16); });
}
INLINE Ints shift_right_16(Ints v) {
  return map_ints([&](int i) INLINED {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v.q[i]), 16));
  });
}
INLINE int32_t reduce_maximum(Ints v) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(v.q[0], v.q[1]), vmaxq_s32(v.q[2], v.q[3])));
}

// --- between the two

INLINE Floats as_floats(Ints bits) {
  return map_floats([&](int i) INLINED { return vreinterpretq_f32_s32(bits.q[i]); });
}
INLINE Ints as_bits(Floats v) {
  return map_ints([&](int i) INLINED { return vreinterpretq_s32_f32(v.q[i]); });
}
INLINE Ints magnitude_bits(Floats v) { return bits_and(as_bits(v), fill_ints(0x7FFFFFFF)); }
INLINE Floats to_floats(Ints v) {
  return map_floats([&](int i) INLINED { return vcvtq_f32_s32(v.q[i]); });
}
INLINE Ints round_to_ints(Floats v) {
  return map_ints([&](int i) INLINED { return vcvtnq_s32_f32(v.q[i]); });
}
INLINE Ints saturate_to_bytes(Ints a, Ints b, Ints c, Ints d) {
  const uint8x16_t order = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(0x0D0905010C080400), vcreate_u64(0x0F0B07030E0A0602)));
  return map_ints([&](int i) INLINED {
    const int16x8_t first = vcombine_s16(vqmovn_s32(a.q[i]), vqmovn_s32(b.q[i]));
    const int16x8_t last = vcombine_s16(vqmovn_s32(c.q[i]), vqmovn_s32(d.q[i]));
    const int8x16_t apart = vmaxq_s8(vcombine_s8(vqmovn_s16(first), vqmovn_s16(last)), vdupq_n_s8(-127));
    return vreinterpretq_s32_s8(vqtbl1q_s8(apart, order));
  });
}
INLINE Ints where_nan(Floats v, Ints nan, Ints other) {
  return map_ints([&](int i) INLINED { return vbslq_s32(vceqq_f32(v.q[i], v.q[i]), other.q[i], nan.q[i]); });
}

// --- lanes: a register is a quarter

INLINE Floats swap_neighbors(Floats v) {
  return map_floats([&](int i) INLINED { return vrev64q_f32(v.q[i]); });
}
INLINE Floats swap_pairs(Floats v) {
  return map_floats([&](int i) INLINED { return vextq_f32(v.q[i], v.q[i], 2); });
}
INLINE Floats reverse_four(Floats v) { return swap_pairs(swap_neighbors(v)); }
INLINE Floats swap_quarters(Floats v) { return {v.q[1], v.q[0], v.q[3], v.q[2]}; }
INLINE Floats swap_halves(Floats v) { return {v.q[2], v.q[3], v.q[0], v.q[1]}; }
INLINE Floats reverse_quarters(Floats v) { return {v.q[3], v.q[2], v.q[1], v.q[0]}; }
template <int MINUS>
INLINE Floats add_or_subtract(Floats a, Floats v) {
  return map_floats([&](int i) INLINED {
    uint32_t signs[4];
    for (int lane = 0; lane < 4; lane++) signs[lane] = (MINUS >> (4 * i + lane) & 1) << 31;
    const uint32x4_t bits = veorq_u32(vreinterpretq_u32_f32(v.q[i]), vld1q_u32(signs));
    return vaddq_f32(a.q[i], vreinterpretq_f32_u32(bits));
  });
}

// --- for the product

// 16 columns, four weights of each
struct Weights {
  int8x16_t q[4];
};
using Four = uint8x16_t;  // four activations of a row, in all four places of a register
INLINE Weights load_weights(const int8_t* p) {
  return {vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)};
}
INLINE Four broadcast(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof four);
  return vreinterpretq_u8_u32(vdupq_n_u32(four));
}
INLINE void keep_in_register(Ints& v) {
  asm volatile("" : "+w"(v.q[0]), "+w"(v.q[1]), "+w"(v.q[2]), "+w"(v.q[3]));
}

}  // namespace
