// Arm with dotprod: sdot, signed by signed bytes, on 4 columns at once.
//
// Activations are unsigned and sdot takes signed ones. Flipping the highest bit of u = q + 128 gives q back, and the
// sums begin at the compensation, which is then subtracted as it is for the other sets:
//
//     sum q w  =  (compensation + sum q w)  -  compensation
#pragma once

#include "vectors_neon.h"
#include "operands_as_stored.h"

namespace {

// 6 rows x 16 columns: 24 registers of sums, four of weights and one of activations, of 32
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;
constexpr int64_t K_BLOCK = 2048;
constexpr bool SIGNED_PRODUCTS = true;
constexpr bool HAS_MATRIX_PRODUCTS = false;

// One row after the other: GCC 12 would flip the bits of all rows first, and have no registers left for the sums
INLINE Ints add_products(Ints sums, Four a, Weights w) {
  int8x16_t q = vreinterpretq_s8_u8(veorq_u8(a, vdupq_n_u8(0x80)));
  asm volatile("" : "+w"(q));
  Ints added = map_ints([&](int i) INLINED { return vdotq_s32(sums.q[i], q, w.q[i]); });
  keep_in_register(added);
  return added;
}

}  // namespace
