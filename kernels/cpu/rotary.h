// Rotary position embedding in one pass over memory, where torch makes seven: each pair of neighbors is rotated by its
// token's angle. Products and sums are rounded one by one, as torch rounds them, so that the bits are torch's.
//
//     y[2i]     = x[2i] * cos[2i]         - x[2i + 1] * sin[2i]
//     y[2i + 1] = x[2i + 1] * cos[2i + 1] + x[2i] * sin[2i + 1]
#pragma once

#include "quantize.h"

namespace {

struct RotaryInput {
  const void* x;           // [rows, width]
  const float *cos, *sin;  // [tokens, width]
  int64_t rows, tokens;
  int64_t heads;  // rows of a token that follow each other
  int64_t width;  // even
};

constexpr int EVEN_LANES = 0x5555;

template <class X>
void rotate_positions(const RotaryInput& in, void* y, int threads) {
  using T = typename X::T;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < in.rows; i++) {
    const int64_t token = i / in.heads % in.tokens;
    const T* row = static_cast<const T*>(in.x) + i * in.width;
    const float *cos = in.cos + token * in.width, *sin = in.sin + token * in.width;
    T* to = static_cast<T*>(y) + i * in.width;
    for_each_16(in.width, [&](int64_t k, Mask inside) INLINED {
      const Floats v = X::load(row + k, inside);
      const Floats straight = multiply(v, load(cos + k, inside));
      const Floats crossed = multiply(swap_neighbors(v), load(sin + k, inside));
      X::store(to + k, inside, add_or_subtract<EVEN_LANES>(straight, crossed));
    });
  }
}

}  // namespace

// x [rows, width] -> y, both in one dtype
extern "C" void int8run_rotary(const void* x, const float* cos, const float* sin, int dtype, int64_t rows, int64_t tokens,
                               int64_t heads, int64_t width, void* y, int threads) {
  const RotaryInput in{x, cos, sin, rows, tokens, heads, width};
  switch (dtype) {
    case BF16: return rotate_positions<BFloat16>(in, y, threads);
    case F16: return rotate_positions<Float16>(in, y, threads);
    default: return rotate_positions<Float32>(in, y, threads);
  }
}
