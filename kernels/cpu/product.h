// What a product is made of: quantized rows, packed weights, and the block of rows and columns that a thread
// computes at a time.
#pragma once

#include <cstdint>

#include "common.h"

namespace {

struct Weight {
  const int8_t* packed;
  const float* scale;  // [N]
  int64_t steps;       // ceil(K / 4)
  const int8_t* panel(int64_t p) const { return packed + p * (steps + 1) * 4 * PANEL; }
};
struct Quantized {
  const uint8_t* q;    // [M, stride]
  int64_t stride;
  const float* scale;  // [M]
};

struct Product {
  Quantized x;
  Weight w;
  const float* bias;  // [N] or null
  // low-rank branch: t = x . down, quantized per row (t.q is null without a branch), times `up`
  Quantized t;
  Weight up;
  void* y;  // [M, N]
  int64_t M, N;
};

// What becomes of the sums of 16 columns of a row: (sum - compensation) * w_scale * x_scale on top of `base`, the bias
// or what the layer itself gave. This order of operations, written once, is why all sets give the same bits.
INLINE Floats scale_sum(Ints sum, Ints compensation, Floats w_scale, float x_scale, Floats base) {
  return multiply_add(multiply(to_floats(subtract(sum, compensation)), w_scale), fill(x_scale), base);
}

// A block of rows by one panel of weights
struct Block {
  int64_t row, end;  // rows
  int64_t panel;
  Rows x, t;  // from `row` on; t: of the low-rank branch
  Panel up;   // weights of the branch
};

}  // namespace
