// RMSNorm of rows, x / sqrt(mean(x^2) + eps) * weight: two passes over a row that stays in the first cache, where torch
// makes six over all rows. The same bits on every set of instructions, whose registers all stand for 16 numbers.
#pragma once

#include <cmath>

#include "quantize.h"

namespace {

struct NormInput {
  const void* x;       // [M, K]
  const void* weight;  // [K], or null
  int64_t M, K;
  float eps;
};

// The sum of 16 numbers, in an order that no compiler changes
INLINE float sum_lanes(Floats v) {
  float lanes[16];
  store(lanes, v);
  for (int width = 8; width; width /= 2)
    for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
  return lanes[0];
}

template <class X>
INLINE float sum_squares(const typename X::T* row, int64_t K) {
  Floats sums = fill(0.0f);
  for_each_16(K, [&](int64_t k, Mask inside) INLINED {
    const Floats v = X::load(row + k, inside);
    sums = multiply_add(v, v, sums);
  });
  return sum_lanes(sums);
}

template <class X>
void normalize_rows(const NormInput& in, void* y, int threads) {
  using T = typename X::T;
  const auto* weight = static_cast<const T*>(in.weight);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < in.M; i++) {
    const T* row = static_cast<const T*>(in.x) + i * in.K;
    T* to = static_cast<T*>(y) + i * in.K;
    const Floats scale = fill(1.0f / std::sqrt(sum_squares<X>(row, in.K) / in.K + in.eps));
    for_each_16(in.K, [&](int64_t k, Mask inside) INLINED {
      Floats v = multiply(X::load(row + k, inside), scale);
      if (weight) v = multiply(v, X::load(weight + k, inside));
      X::store(to + k, inside, v);
    });
  }
}

}  // namespace

// x [M, K] -> y [M, K], both and the weight in one dtype
extern "C" void int8run_rms_norm(const void* x, const void* weight, int dtype, int64_t M, int64_t K, float eps, void* y,
                                 int threads) {
  const NormInput in{x, weight, M, K, eps};
  switch (dtype) {
    case BF16: return normalize_rows<BFloat16>(in, y, threads);
    case F16: return normalize_rows<Float16>(in, y, threads);
    default: return normalize_rows<Float32>(in, y, threads);
  }
}
