// The two products of attention with AMX's tiles; attention_products.h has the same for vector registers. The sums of 32
// rows and 32 columns, four tiles, pass through memory.
#pragma once

#include <cstdint>

#include "amx_tiles.h"

namespace {

constexpr int64_t ATTENTION_ROWS = PAIR;  // rows that are computed together

// What the bytes of rows stand for: queries are stored as q + 128, probabilities are unsigned themselves
enum class Bytes { OFFSET, UNSIGNED };

// What a thread needs for products
using ProductUnit = TileUnit;

// ATTENTION_ROWS rows from `row` on by the first `columns` of a panel; out(i, column, sums) takes 16 sums of a row.
// `compensation`: 128 times the sum of each column's weights, which is what an offset of 128 adds.
template <Bytes BYTES, class Out>
INLINE void multiply_rows(ProductUnit& unit, Rows rows, int64_t row, Panel weights, const int8_t* compensation,
                          int64_t columns, int64_t steps, Out out) {
  alignas(64) int32_t sums[PAIR * PAIR];
  const uint8_t* q = rows.q + row / TILE_ROWS * rows.stride;
  for (int64_t column = 0; column < columns; column += PAIR) {
    multiply_tiles<2>(unit, q, rows.stride, weights, column, steps, nullptr, 0, sums, PAIR, []() INLINED {});
    for (int64_t j = 0; j < PAIR; j += 16) {
      const auto* offset = reinterpret_cast<const int32_t*>(compensation) + column + j;
      const Ints added = BYTES == Bytes::OFFSET ? load(offset) : fill_ints(0);
      for (int64_t i = 0; i < PAIR; i++) out(i, column + j, subtract(load(sums + i * PAIR + j), added));
    }
  }
}

}  // namespace
