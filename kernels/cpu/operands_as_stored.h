// Operands of a product that reads unsigned rows and packed weights as they are stored.
#pragma once

#include <cstdint>

#include "common.h"

namespace {

// Steps that the product takes for four input columns, and bytes from one step of the weights to the next
constexpr int64_t STEPS_OF_FOUR = 1;
constexpr int64_t WEIGHT_STEP = 4 * 64;
// Blocks of rows that one decoding of a weight of few bits serves (grouped.h)
constexpr int64_t DECODED_BLOCKS = 4;

// Some rows of activations: four columns of a row follow each other
struct Rows {
  const uint8_t* q;
  int64_t stride;
};
// A panel of weights; `part`: bytes from its first 16 columns to the next 16
struct Panel {
  const int8_t* w;
  int64_t part;
};
// What a thread keeps for rewritten operands: nothing here
struct Buffer {};

INLINE Rows prepare_rows(const uint8_t* q, int64_t stride, int64_t, int64_t, Buffer&) { return {q, stride}; }
// The input of a convolution
INLINE Rows prepare_input(const uint8_t* q, int64_t stride, int64_t, int, Buffer&) { return {q, stride}; }
INLINE Panel prepare_weights(const int8_t* w, int64_t, Buffer&) { return {w, 64}; }

}  // namespace
