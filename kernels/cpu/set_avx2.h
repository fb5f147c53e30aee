// AVX2 without any VNNI: vpmaddwd, products of 16-bit numbers, which are exact.
#pragma once

#include "vectors_avx2.h"
#include "operands_widened.h"

namespace {

// 6 rows x 16 columns: 12 registers of sums, two of weights, one of activations and one of products
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;
// 16 columns of a piece are 64 KB when they are widened
constexpr int64_t K_BLOCK = 1024;
constexpr bool SIGNED_PRODUCTS = false;
constexpr bool HAS_MATRIX_PRODUCTS = false;

INLINE Ints add_products(Ints sums, Four a, Weights w) {
  return add(sums, Ints{_mm256_madd_epi16(a, w.low), _mm256_madd_epi16(a, w.high)});
}

}  // namespace
