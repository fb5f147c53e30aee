// Pixels to unsigned bytes for convolutions: SiLU, rotation, and then rounding around the middle of what the pixel's
// channels hold. The definition is `quantize_pixels` in kernels/int8_conv/reference.py.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "quantize.h"

namespace {

// The pixels that are quantized, and what happens to them first. A pixel is a row of C channels.
struct PixelsInput {
  const void* x;  // [pixels, C]
  int64_t pixels, C, stride;  // numbers from one pixel to the next
  int64_t rotation;           // channels of a group; 0: none
  bool sylvester, silu;
};
// A pixel holds q * scale + center; bytes are q + 128, as those of rows are
struct PixelsOutput {
  uint8_t* q;  // [pixels, stride]
  int64_t stride;
  float* scale;   // [pixels]
  float* center;  // [pixels]
};

// x / (1 + e^-x). NaN, which the clamp in `exponential` may hide, is still in x.
INLINE Floats silu(Floats x) {
  const Floats e = exponential(subtract(fill(0.0f), x));
  return divide(x, add(fill(1.0f), e));
}

// --- the range of a pixel's numbers

struct Range {
  float low, high;
  float magnitude;  // of the largest, NaN among them
  bool is_finite() const { return magnitude <= std::numeric_limits<float>::max(); }
};

template <class X>
Range find_range(const typename X::T* x, int64_t C) {
  constexpr float INFINITE = std::numeric_limits<float>::infinity();
  Floats high = fill(-INFINITE), minus_low = high;
  Ints magnitude = fill_ints(0);
  int64_t c = 0;
  for (; c + 16 <= C; c += 16) {
    const Floats v = X::load(x + c, ALL);
    high = maximum(high, v);
    minus_low = maximum(minus_low, subtract(fill(0.0f), v));
    magnitude = max_magnitude(magnitude, v);
  }
  if (c < C) {
    const Mask inside = first_lanes(C - c);
    const Floats v = X::load(x + c, inside);  // 0 beyond C, which may be out of the pixel's range
    high = maximum(high, select(inside, v, high));
    minus_low = maximum(minus_low, select(inside, subtract(fill(0.0f), v), minus_low));
    magnitude = max_magnitude(magnitude, v);
  }
  return {-reduce_maximum(minus_low), reduce_maximum(high), reduce_magnitude(magnitude)};
}

// --- one pixel

// SiLU on one pixel x [C], to float32 `row`
template <class X>
void apply_silu(const typename X::T* x, float* row, int64_t C) {
  for (int64_t c = 0; c < C; c += 16) store(row + c, silu(X::load(x + c, first_lanes(C - c))));
}

// One pixel x [C], which is `unit` times too large, to place i of the output. Bytes from C to a multiple of 4 are
// written too (their weights are 0).
template <class X>
void quantize_pixel(const typename X::T* x, int64_t C, float unit, int64_t i, const PixelsOutput& out) {
  const Range range = find_range<X>(x, C);
  // halved before they are added: their difference may be beyond float32
  float middle = range.high / 2 + range.low / 2;
  float scale = (range.high / 2 - range.low / 2) / unit / 127.0f;
  if (scale < TINY) scale = TINY;
  if (!range.is_finite()) {
    middle = 0;
    scale = range.magnitude;  // shows in all outputs that the pixel meets
  }
  const Floats divisor = fill(scale * unit), center = fill(middle);
  auto to_codes = [&](Floats v) INLINED {
    const Floats steps = clamp(divide(subtract(v, center), divisor), -127.0f, 127.0f);
    return maximum(add(round_to_ints(steps), fill_ints(ZERO_POINT)), fill_ints(0));
  };
  uint8_t* q = out.q + i * out.stride;
  int64_t c = 0;
  for (; c + 16 <= C; c += 16) store_bytes(q + c, to_codes(X::load(x + c, ALL)));
  if (c < C) store_bytes(q + c, to_codes(X::load(x + c, first_lanes(C - c))), first_lanes(round_up(C, 4) - c));
  out.scale[i] = scale;
  out.center[i] = middle / unit;
}

template <class X, class From>
void rotate_pixel(const PixelsInput& in, const From* x, float* row) {
  if (in.sylvester)
    rotate<X, Sylvester>(x, row, in.C, in.rotation);
  else
    rotate<X, Regular>(x, row, in.C, in.rotation);
}

// --- all pixels, divided among threads

template <class X>
void quantize_pixels(const PixelsInput& in, const PixelsOutput& out, int threads) {
  const auto* x = static_cast<const typename X::T*>(in.x);
  const float unit = in.rotation ? std::sqrt(static_cast<float>(in.rotation)) : 1.0f;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> buffer(in.silu || in.rotation ? round_up(in.C, 16) : 0);
    float* row = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < in.pixels; i++) {
      const auto* from = x + i * in.stride;
      if (!in.silu && !in.rotation) {
        quantize_pixel<X>(from, in.C, unit, i, out);
        continue;
      }
      if (in.silu) apply_silu<X>(from, row, in.C);
      if (in.silu && in.rotation) rotate_pixel<Float32>(in, row, row);
      if (!in.silu && in.rotation) rotate_pixel<X>(in, from, row);
      quantize_pixel<Float32>(row, in.C, unit, i, out);
    }
  }
}

void quantize_pixels(const PixelsInput& in, int dtype, const PixelsOutput& out, int threads) {
  switch (dtype) {
    case BF16: return quantize_pixels<BFloat16>(in, out, threads);
    case F16: return quantize_pixels<Float16>(in, out, threads);
    default: return quantize_pixels<Float32>(in, out, threads);
  }
}

}  // namespace
