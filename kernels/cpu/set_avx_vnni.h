// AVX-VNNI: vpdpbusd on 8 columns at once.
#pragma once

#include "vectors_avx2.h"
#include "operands_as_stored.h"

namespace {

// 6 rows x 16 columns: 12 registers of sums, two of weights and one of activations, of 16
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;
constexpr int64_t K_BLOCK = 2048;
constexpr bool SIGNED_PRODUCTS = false;
constexpr bool HAS_MATRIX_PRODUCTS = false;

INLINE Ints add_products(Ints sums, Four a, Weights w) {
  return {_mm256_dpbusd_avx_epi32(sums.low, a, w.low), _mm256_dpbusd_avx_epi32(sums.high, a, w.high)};
}

}  // namespace
