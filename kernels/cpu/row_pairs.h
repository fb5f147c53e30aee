// Products of two rows at a time, by the matrix instruction of Arm's i8mm: usmmla adds to 2 x 2 sums the products of two
// rows of eight unsigned bytes by two columns of eight signed ones.
//
//                           column 0       column 1
//                           w0 .. w7       w0 .. w7
//     row 0   u0 .. u7    |  sum 0          sum 1
//     row 1   u0 .. u7    |  sum 2          sum 3
//
// A register of the panel holds four columns by four inputs, the one a step later the next four inputs of the same
// columns. Zipped in units of 32 bits they are twice two columns by eight inputs, so that the panel is read as it is
// packed:
//
//     step k       c0:0-3  c1:0-3  c2:0-3  c3:0-3         zip1   c0:0-3  c0:4-7  c1:0-3  c1:4-7
//     step k + 1   c0:4-7  c1:4-7  c2:4-7  c3:4-7         zip2   c2:0-3  c2:4-7  c3:0-3  c3:4-7
#pragma once

#include <algorithm>
#include <cstdint>

#include "operands_as_stored.h"
#include "vectors_neon.h"

namespace {

constexpr int COLUMN_PAIRS = 8;  // of 16 columns

// The sums of two rows by 16 columns, two columns in each register
struct PairSums {
  int32x4_t q[COLUMN_PAIRS];
};

// The halves of two registers: the first ones of both, or the second ones
INLINE int32x4_t join_first_halves(int32x4_t a, int32x4_t b) {
  return vcombine_s32(vget_low_s32(a), vget_low_s32(b));
}
INLINE int32x4_t join_second_halves(int32x4_t a, int32x4_t b) {
  return vcombine_s32(vget_high_s32(a), vget_high_s32(b));
}

INLINE PairSums join_rows(const Ints& row, const Ints& next) {
  PairSums sums;
  unroll<4>([&](auto i) INLINED {
    sums.q[2 * i] = join_first_halves(row.q[i], next.q[i]);
    sums.q[2 * i + 1] = join_second_halves(row.q[i], next.q[i]);
  });
  return sums;
}
INLINE Ints get_first_row(const PairSums& sums) {
  return map_ints([&](int i) INLINED { return join_first_halves(sums.q[2 * i], sums.q[2 * i + 1]); });
}
INLINE Ints get_second_row(const PairSums& sums) {
  return map_ints([&](int i) INLINED { return join_second_halves(sums.q[2 * i], sums.q[2 * i + 1]); });
}

// MR rows by 16 columns, two steps at a time; of an odd number of steps the last one is left. Returns how many were
// taken. An odd last row is its own partner: those sums are computed twice, in as many instructions as for a row alone.
template <int MR, class GetRow>
INLINE int64_t accumulate_pairs(Ints (&c)[MR][1], GetRow get_row, const int8_t* w, int64_t steps) {
  constexpr int PAIRS = (MR + 1) / 2;
  auto partner = [](int pair) INLINED { return std::min(2 * pair + 1, MR - 1); };
  PairSums sums[PAIRS];
  unroll<PAIRS>([&](auto i) INLINED { sums[i] = join_rows(c[2 * i][0], c[partner(i)][0]); });
  int64_t k = 0;
  for (; k + 2 <= steps; k += 2, w += 2 * WEIGHT_STEP) {
    __builtin_prefetch(w + 4 * WEIGHT_STEP);
    __builtin_prefetch(w + 5 * WEIGHT_STEP);
    uint8x16_t a[PAIRS];
    unroll<PAIRS>([&](auto i) INLINED {
      a[i] = vcombine_u8(vld1_u8(get_row(2 * i) + 4 * k), vld1_u8(get_row(partner(i)) + 4 * k));
    });
    unroll<4>([&](auto j) INLINED {
      const int32x4_t now = vreinterpretq_s32_s8(vld1q_s8(w + 16 * j));
      const int32x4_t next = vreinterpretq_s32_s8(vld1q_s8(w + WEIGHT_STEP + 16 * j));
      const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(now, next));
      const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(now, next));
      unroll<PAIRS>([&](auto i) INLINED {
        sums[i].q[2 * j] = vusmmlaq_s32(sums[i].q[2 * j], a[i], first);
        sums[i].q[2 * j + 1] = vusmmlaq_s32(sums[i].q[2 * j + 1], a[i], second);
      });
      // or GCC 12 loads all 16 columns first, and has no registers left for the sums
      asm volatile("" ::: "memory");
    });
  }
  unroll<PAIRS>([&](auto i) INLINED {
    c[partner(i)][0] = get_second_row(sums[i]);
    c[2 * i][0] = get_first_row(sums[i]);
  });
  return k;
}

}  // namespace
