// Products whose sums stay in vector registers: a tile of up to TILE_ROWS rows by 16 TILE_VECTORS columns of a panel.
// set_<name>.h says how large a tile is and how its instruction adds products.
#pragma once

#include <cstdint>

#include "common.h"

namespace {

static_assert(PANEL % (16 * TILE_VECTORS) == 0);
constexpr int64_t PREFETCH_BYTES = 4 * WEIGHT_STEP;  // four steps ahead in the panel

// The sums of a tile of MR rows, 16 columns each
template <int MR>
using Sums = Ints[MR][TILE_VECTORS];

// What the sums of 16 columns begin at: signed products need no compensation, and get it so that the scaling may take
// it off in every case
INLINE Ints begin_sums(const int8_t* compensation) {
  if constexpr (SIGNED_PRODUCTS) return load(reinterpret_cast<const int32_t*>(compensation));
  return fill_ints(0);
}

// The same products as below, two rows by two steps at a time, where the set has matrix instructions: row_pairs.h. Returns
// how many steps were taken.
template <int MR, class GetRow>
INLINE int64_t accumulate_pairs(Sums<MR>& c, GetRow get_row, const int8_t* w, int64_t steps);

// MR rows of activations by some columns of a panel, four bytes of each at a step.
//
//                          panel: b[0]     b[1]     b[2]     b[3]      16 columns each
//     row i: a = u0 u1 u2 u3, 16 times
//                                 c[i][0]  c[i][1]  c[i][2]  c[i][3]   += a . b[j], 16 sums each
//
// get_row(i): where row i begins
template <int MR, class GetRow>
INLINE void accumulate_rows(Sums<MR>& c, GetRow get_row, const int8_t* w, int64_t steps) {
  int64_t k = 0;
  if constexpr (HAS_MATRIX_PRODUCTS && MR > 1) k = accumulate_pairs<MR>(c, get_row, w, steps);
  for (w += k * WEIGHT_STEP; k < steps; k++, w += WEIGHT_STEP) {
    Weights b[TILE_VECTORS];
    unroll<TILE_VECTORS>([&](auto j) INLINED {
      b[j] = load_weights(w + 64 * j);
      __builtin_prefetch(w + PREFETCH_BYTES + 64 * j);
    });
    unroll<MR>([&](auto i) INLINED {
      const Four a = broadcast(get_row(i) + 4 * k);
      unroll<TILE_VECTORS>([&](auto j) INLINED { c[i][j] = add_products(c[i][j], a, b[j]); });
    });
  }
  // a new value each, after the loop: what the scaling below cannot keep in a register is then spilled here,
  // not at every step
  unroll<MR, TILE_VECTORS>([&](auto i, auto j) INLINED { keep_in_register(c[i][j]); });
}

// The same for rows that lie `q_stride` bytes apart
template <int MR>
INLINE void accumulate(Sums<MR>& c, const uint8_t* q, int64_t q_stride, const int8_t* w, int64_t steps) {
  accumulate_rows<MR>(
      c, [&](int i) INLINED { return q + i * q_stride; }, w, steps);
}

}  // namespace
