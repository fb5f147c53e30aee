// Pixels to unsigned bytes for convolutions: the factor and shift of each channel that group_norm.h finds, SiLU, rotation,
// and then rounding around the middle of what the pixel's channels hold. The definition is `quantize_pixels` in
// kernels/int8_conv/reference.py. planes.h does the same where channels do not lie side by side.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "quantize.h"

namespace {

// Images whose pixels are quantized, and what happens to them first, in this order. Strides: numbers from one to the
// next. pixels.py has the same fields.
struct PixelsInput {
  const void* x;  // [images, C, plane]
  int64_t dtype;
  int64_t images, C, plane;
  int64_t image_stride, channel_stride, pixel_stride;  // one of the last two is 1
  const float *factor, *shift;  // of each image's channels, or null
  int64_t step_stride;          // from the factors of an image to those of the next
  int64_t silu;
  int64_t rotation;   // channels of a group, which divide C; 0: none
  int64_t sylvester;  // whether by Sylvester's Hadamard matrix (2, 4, 8, 16, ...), else by the regular one (4, 16, ...)
  int64_t pixels() const { return images * plane; }
  bool has_steps() const { return factor || silu; }
  // What the numbers are multiplied by in the rotation
  float unit() const { return rotation ? std::sqrt(static_cast<float>(rotation)) : 1.0f; }
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

// How a pixel with this range is rounded
struct Step {
  float scale;
  float middle;  // of the range, `unit` times the center
};
inline Step choose_step(Range range, float unit) {
  if (!(range.magnitude <= std::numeric_limits<float>::max()))
    return {range.magnitude, 0.0f};  // no number: it shows in all outputs that the pixel meets
  // halved before they are added: their difference may be beyond float32
  const float scale = (range.high / 2 - range.low / 2) / unit / 127.0f;
  return {std::max(scale, TINY), range.high / 2 + range.low / 2};
}

INLINE Ints to_codes(Floats v, Floats middle, Floats divisor) {
  const Floats steps = clamp(divide(subtract(v, middle), divisor), -127.0f, 127.0f);
  return maximum(add(round_to_ints(steps), fill_ints(ZERO_POINT)), fill_ints(0));
}

// --- one pixel whose channels lie side by side

// Factors, shifts and SiLU on one pixel x [C] of an image, to float32 `row`
template <class X>
void apply_steps(const PixelsInput& in, const typename X::T* x, int64_t image, float* row) {
  const float *factor = in.factor + image * in.step_stride, *shift = in.shift + image * in.step_stride;
  for_each_16(in.C, [&](int64_t c, Mask inside) INLINED {
    Floats v = X::load(x + c, inside);
    if (in.factor) v = multiply_add(v, load(factor + c, inside), load(shift + c, inside));
    store(row + c, in.silu ? silu(v) : v);
  });
}

// One pixel x [C], which is `unit` times too large, to place i of the output. Bytes from C to a multiple of 4 are
// written too (their weights are 0).
template <class X>
void quantize_pixel(const typename X::T* x, int64_t C, float unit, int64_t i, const PixelsOutput& out) {
  const Step step = choose_step(find_range<X>(x, C), unit);
  out.scale[i] = step.scale;
  out.center[i] = step.middle / unit;
  const Floats divisor = fill(step.scale * unit), middle = fill(step.middle);
  auto codes = [&](Floats v) INLINED { return to_codes(v, middle, divisor); };
  uint8_t* q = out.q + i * out.stride;
  int64_t c = 0;
  for (; c + 16 <= C; c += 16) store_bytes(q + c, codes(X::load(x + c, ALL)));
  if (c < C) store_bytes(q + c, codes(X::load(x + c, first_lanes(C - c))), first_lanes(round_up(C, 4) - c));
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
void quantize_pixel_of(const PixelsInput& in, int64_t i, float* row, const PixelsOutput& out) {
  const int64_t image = i / in.plane, in_plane = i % in.plane;
  const auto* x = static_cast<const typename X::T*>(in.x) + image * in.image_stride + in_plane * in.pixel_stride;
  const bool has_steps = in.has_steps();
  if (!has_steps && !in.rotation) return quantize_pixel<X>(x, in.C, in.unit(), i, out);
  if (has_steps) apply_steps<X>(in, x, image, row);
  if (has_steps && in.rotation) rotate_pixel<Float32>(in, row, row);
  if (!has_steps && in.rotation) rotate_pixel<X>(in, x, row);
  quantize_pixel<Float32>(row, in.C, in.unit(), i, out);
}

template <class X>
void quantize_rows_of_pixels(const PixelsInput& in, const PixelsOutput& out, int threads) {
  MemoryGuard memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> row;
    memory.run([&] { row.resize(in.has_steps() || in.rotation ? round_up(in.C, 16) : 0); });
#pragma omp for schedule(static)
    for (int64_t i = 0; i < in.pixels(); i++)
      if (!memory.has_failed()) quantize_pixel_of<X>(in, i, row.data(), out);
  }
  memory.rethrow();
}

}  // namespace
