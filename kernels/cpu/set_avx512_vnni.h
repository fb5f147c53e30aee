// AVX512-VNNI: vpdpbusd on 16 columns at once.
#pragma once

#include "vectors_avx512.h"
#include "operands_as_stored.h"

namespace {

// A tile of the output is TILE_ROWS x 16 TILE_VECTORS. Its 6 x 4 = 24 registers of sums, four of weights and
// one of activations leave three of the 32 registers for what the compiler needs. Each register of weights that
// is loaded serves 6 products, each broadcast of activations 4; 24 independent sums hide the latency of the
// product instruction.
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
// Inputs of a piece, see linear.h. 192 rows of 2048 activations (384 KB) and as many rows of a panel (128 KB) fit
// an L2 cache of 1 MB together.
constexpr int64_t K_BLOCK = 2048;
constexpr bool SIGNED_PRODUCTS = false;
constexpr bool HAS_MATRIX_PRODUCTS = false;

// sums + a . w, four products for each of 16 columns
INLINE Ints add_products(Ints sums, Four a, Weights w) { return _mm512_dpbusd_epi32(sums, a, w); }

}  // namespace
