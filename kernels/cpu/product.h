// What a product is made of: quantized rows, packed weights, and the block of rows and columns that a thread
// computes at a time.
#pragma once

#include <cstdint>

#include "common.h"

namespace {

// How a weight of 4 or 6 bits decodes, see grouped.h
struct Groups {
  const void* scale = nullptr;   // [panels][groups][64], float32 or e4m3
  const float* levels = nullptr;  // [16], of the low four bits of a code; null: the weight is int8
  int64_t steps = 0;             // of a group
  int bits = 8;
  bool has_byte_scales = false;
};
struct Weight {
  const int8_t* packed;
  const float* scale;  // [N]
  int64_t steps;       // ceil(K / 4)
  Groups groups{};
  // Bytes of a step of four inputs and 64 columns
  int64_t step_bytes() const { return groups.bits * PANEL / 2; }
  // Compensations, then the steps
  const int8_t* panel(int64_t p) const { return packed + p * (4 * PANEL + steps * step_bytes()); }
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
