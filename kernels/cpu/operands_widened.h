// Operands of a product of 16-bit numbers: bytes are widened once for all tiles that use them.
//
// vpmaddwd adds two products of signed 16-bit numbers to a 32-bit sum. (vpmaddubsw would take bytes, but adds its
// products into 16 bits, where 255 * 127 + 255 * 127 does not fit.) So the four inputs of a step become two pairs.
// To spare shuffles they are the even and the odd ones, of activations and weights alike:
//
//     4 bytes        w0 w1 w2 w3
//     even pair      w0    w2          first step
//     odd pair       w1    w3          second step
//
// Activations are widened for a block of rows, weights for a piece of a panel: 16 columns after the other, and
// there step after step of 64 bytes.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "vectors_avx2.h"

namespace {

constexpr int64_t STEPS_OF_FOUR = 2;
constexpr int64_t WEIGHT_STEP = 64;
// Blocks of rows that one decoding serves (grouped.h): widened rows of more blocks would leave the cache, which costs
// more than a decoding does beside products that are this slow
constexpr int64_t DECODED_BLOCKS = 1;

struct Rows {
  const uint8_t* q;  // int16 pairs
  int64_t stride;    // bytes
};
struct Panel {
  const int8_t* w;  // int16 pairs
  int64_t part;
};
struct Buffer {
  std::unique_ptr<uint8_t[]> bytes;
  int64_t size = 0;
  // Room for n bytes and what a step may write beyond; what was there before is lost
  void* make_room(int64_t n) {
    if (size < n + 64) bytes.reset(new uint8_t[n + 64]);
    size = std::max(size, n + 64);
    return bytes.get();
  }
};

// 16 unsigned bytes, four steps: their even and odd pairs in turn
INLINE void widen_16(const uint8_t* q, uint8_t* to) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m128i even = _mm_and_si128(v, _mm_set1_epi16(0xFF)), odd = _mm_srli_epi16(v, 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(even, odd));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi32(even, odd));
}
// A row of `columns` bytes, a multiple of four
inline void widen_row(const uint8_t* from, int64_t columns, uint8_t* to) {
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) widen_16(from + k, to + 2 * k);
  if (k == columns) return;
  uint8_t last[16] = {}, last_widened[32];
  std::memcpy(last, from + k, columns - k);
  widen_16(last, last_widened);
  std::memcpy(to + 2 * k, last_widened, 2 * (columns - k));
}
Rows prepare_rows(const uint8_t* q, int64_t stride, int64_t rows, int64_t columns, Buffer& buffer) {
  auto* widened = static_cast<uint8_t*>(buffer.make_room(2 * rows * columns));
  for (int64_t i = 0; i < rows; i++) widen_row(q + i * stride, columns, widened + 2 * i * columns);
  return {widened, 2 * columns};
}
// The input of a convolution, all of it: each pixel is met by many taps
Rows prepare_input(const uint8_t* q, int64_t stride, int64_t rows, int threads, Buffer& buffer) {
  auto* widened = static_cast<uint8_t*>(buffer.make_room(2 * rows * stride));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < rows; i++) widen_row(q + i * stride, stride, widened + 2 * i * stride);
  return {widened, 2 * stride};
}

// `steps` rows of a panel, of 64 columns by four weights each
Panel prepare_weights(const int8_t* w, int64_t steps, Buffer& buffer) {
  const int64_t part = 2 * WEIGHT_STEP * steps;  // bytes of 16 columns
  auto* widened = static_cast<int8_t*>(buffer.make_room(4 * part));
  for (int64_t step = 0; step < steps; step++)
    for (int64_t column = 0; column < 64; column += 8) {
      const __m256i v = load_register(w + 256 * step + 4 * column);
      int8_t* to = widened + column / 16 * part + 2 * WEIGHT_STEP * step + 4 * (column % 16);
      store_register(to, _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
      store_register(to + WEIGHT_STEP, _mm256_srai_epi16(v, 8));
    }
  return {widened, part};
}

}  // namespace
