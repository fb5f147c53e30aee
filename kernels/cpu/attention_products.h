// The two products of attention for sets with vector registers: rows of bytes by a panel, whose sums are handed on as
// they leave the registers. amx_attention_products.h has the same for AMX.
#pragma once

#include <cstdint>

#include "register_products.h"

namespace {

constexpr int64_t ATTENTION_ROWS = TILE_ROWS;  // rows that are computed together

// What the bytes of rows stand for: queries are stored as q + 128, probabilities are unsigned themselves
enum class Bytes { OFFSET, UNSIGNED };

// What the sums of 16 columns begin at, so that they end as sums of what the bytes stand for. `compensation`:
// 128 times the sum of each column's weights.
template <Bytes BYTES>
INLINE Ints begin_attention_sums(const int8_t* compensation) {
  constexpr bool IS_READ_AS_MEANT = SIGNED_PRODUCTS == (BYTES == Bytes::OFFSET);
  if constexpr (IS_READ_AS_MEANT) return fill_ints(0);
  const Ints c = load(reinterpret_cast<const int32_t*>(compensation));
  return BYTES == Bytes::OFFSET ? subtract(fill_ints(0), c) : c;
}

// What a thread needs for products
struct ProductUnit {};

// ATTENTION_ROWS rows from `row` on by the first `columns` of a panel; out(i, column, sums) takes 16 sums of a row
template <Bytes BYTES, class Out>
INLINE void multiply_rows(ProductUnit&, Rows rows, int64_t row, Panel weights, const int8_t* compensation,
                          int64_t columns, int64_t steps, Out out) {
  const uint8_t* q = rows.q + row * rows.stride;
  for (int64_t part = 0; 16 * TILE_VECTORS * part < columns; part++) {
    const int64_t column = 16 * TILE_VECTORS * part;
    Sums<TILE_ROWS> c;
    unroll<TILE_ROWS, TILE_VECTORS>([&](auto i, auto j) INLINED {
      c[i][j] = begin_attention_sums<BYTES>(compensation + 4 * column + 64 * j);
    });
    accumulate<TILE_ROWS>(c, q, rows.stride, weights.w + TILE_VECTORS * part * weights.part, STEPS_OF_FOUR * steps);
    unroll<TILE_ROWS, TILE_VECTORS>([&](auto i, auto j) INLINED { out(i, column + 16 * j, c[i][j]); });
  }
}

}  // namespace
