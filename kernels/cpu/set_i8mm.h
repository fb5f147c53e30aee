// Arm with i8mm: usmmla, two rows by two columns at once (row_pairs.h), and for a row alone usdot, 4 columns at once. Both
// multiply unsigned by signed bytes.
#pragma once

#include "vectors_neon.h"
#include "operands_as_stored.h"
#include "row_pairs.h"

namespace {

// 6 rows x 16 columns: 24 registers of sums, four of weights and three of activations, of 32
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;
constexpr int64_t K_BLOCK = 2048;
constexpr bool SIGNED_PRODUCTS = false;
constexpr bool HAS_MATRIX_PRODUCTS = true;

INLINE Ints add_products(Ints sums, Four a, Weights w) {
  return map_ints([&](int i) INLINED { return vusdotq_s32(sums.q[i], a, w.q[i]); });
}

}  // namespace
