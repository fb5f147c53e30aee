// Operands of a product of AMX's tiles.
//
// The packed weights are such tiles already: 16 rows of a panel, 256 bytes apart, and of each row the 64 bytes of 16
// columns. Rows of activations are copied for a block, so that a tile is 1 KB in one piece: 16 rows of a layer of
// 4096 inputs would all fall on the same few lines of the first cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 1024;
constexpr int64_t TILE_STEPS = 16;  // a tile has 16 steps of four inputs
constexpr int64_t PAIR = 32;        // rows and columns of four tiles of sums
constexpr int64_t DECODED_BLOCKS = 4;  // of rows, that one decoding of a weight of few bits serves (grouped.h)

// Rows of a block in tiles: [rows / 16][inputs / 64][16][64], zero beyond the rows and inputs that there are;
// `stride`: bytes from 16 rows to the next 16
struct Rows {
  const uint8_t* q;
  int64_t stride;
};
// Weights of a piece: whole tiles as they are packed, and a copy of the last steps, padded with zeros
struct Panel {
  const int8_t* w;
  const int8_t* tail;
};
struct Buffer {
  std::vector<uint8_t> bytes;
  // 64 bytes are a line of the cache
  uint8_t* make_room(int64_t n) {
    if (static_cast<int64_t>(bytes.size()) < n + 64) bytes.resize(n + 64);
    return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
};

// Rows of `columns` bytes as tiles; get_row(i): where row i begins
template <class GetRow>
Rows copy_rows(GetRow get_row, int64_t rows, int64_t columns, Buffer& buffer) {
  const int64_t k_tiles = ceil_div(columns, 64), tile_rows = round_up(rows, PAIR);
  uint8_t* tiles = buffer.make_room(tile_rows * k_tiles * 64);
  for (int64_t i = 0; i < tile_rows; i++) {
    const uint8_t* row = i < rows ? get_row(i) : nullptr;
    uint8_t* to = tiles + i / TILE_ROWS * k_tiles * TILE_BYTES + i % TILE_ROWS * 64;
    for (int64_t k = 0; k < k_tiles; k++, to += TILE_BYTES) {
      const int64_t inside = row ? std::min<int64_t>(64, columns - 64 * k) : 0;
      if (inside) std::memcpy(to, row + 64 * k, inside);
      if (inside < 64) std::memset(to + inside, 0, 64 - inside);
    }
  }
  return {tiles, k_tiles * TILE_BYTES};
}
Rows prepare_rows(const uint8_t* q, int64_t stride, int64_t rows, int64_t columns, Buffer& buffer) {
  return copy_rows([&](int64_t i) { return q + i * stride; }, rows, columns, buffer);
}
// The input of a convolution, of which each block copies what its taps meet
INLINE Rows prepare_input(const uint8_t* q, int64_t stride, int64_t, int, Buffer&) { return {q, stride}; }

Panel prepare_weights(const int8_t* w, int64_t steps, Buffer& buffer) {
  const int64_t whole = steps / TILE_STEPS * TILE_STEPS, rest = steps - whole;
  if (!rest) return {w, nullptr};
  auto* tail = reinterpret_cast<int8_t*>(buffer.make_room(TILE_STEPS * 4 * PANEL));
  std::memcpy(tail, w + whole * 4 * PANEL, rest * 4 * PANEL);
  std::memset(tail + rest * 4 * PANEL, 0, (TILE_STEPS - rest) * 4 * PANEL);
  return {w, tail};
}

}  // namespace
