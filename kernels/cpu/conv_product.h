// What a convolution is made of: its geometry, operands, and which pixels of the input a block of output pixels meets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "quantize.h"

namespace {

constexpr int64_t PIXEL_BLOCK = 192;  // output pixels that share a pass over the weights

// A number for each dimension of a video; an image has one frame
struct Extent {
  int64_t t, h, w;
  int64_t count() const { return t * h * w; }
};
// As conv.py lays it out
struct Geometry {
  int64_t batch;
  Extent input, kernel, stride, padding, output;
};

struct Conv {
  Geometry g;
  Rows input;  // [batch, g.input], as the product reads it
  const float* scale;   // of each pixel
  const float* center;  // of each pixel
  int64_t C, N;
  const int8_t* packed;
  const float* w_scale;
  const float* bias;  // [N] or null
  void* y;
  int64_t y_stride;  // numbers from one output pixel to the next

  int64_t steps() const { return ceil_div(C, 4); }
  int64_t pixels() const { return g.batch * g.output.count(); }
  const int8_t* get_weights(int64_t panel, int64_t tap) const {
    return packed + (panel * g.kernel.count() + tap) * (steps() + 1) * 4 * PANEL;
  }
};

// What a tap meets from each pixel of a block: a row of the input, its scale and its center. Beyond the input's
// edge it is any row, with 0 for both. Centers are divided by 128, since compensations are 128 times the sums of weights
// that they are multiplied by.
struct TapRows {
  const uint8_t* rows[PIXEL_BLOCK];
  float scale[PIXEL_BLOCK], center_128th[PIXEL_BLOCK];
};

// Where the first tap of an output pixel is in the input, which may be beyond its edge
struct Corner {
  int64_t image;
  Extent at;
};

// A block of output pixels, and what the taps meet from there
struct PixelBlock {
  int64_t first, end;
  Corner corners[PIXEL_BLOCK];
  std::vector<TapRows> met;   // of each tap
  std::vector<int64_t> taps;  // those that meet the input from anywhere in the block
};

// Without a division for each pixel: they would take as long as the products of a tile
void find_corners(const Geometry& g, PixelBlock& block) {
  const Extent& size = g.output;
  const int64_t frame = block.first / (size.h * size.w), in_frame = block.first % (size.h * size.w);
  int64_t image = frame / size.t;
  Extent at{frame % size.t, in_frame / size.w, in_frame % size.w};
  for (int64_t i = 0; i < block.end - block.first; i++) {
    block.corners[i] = {image,
                        {at.t * g.stride.t - g.padding.t, at.h * g.stride.h - g.padding.h,
                         at.w * g.stride.w - g.padding.w}};
    if (++at.w < size.w) continue;
    at.w = 0;
    if (++at.h < size.h) continue;
    at.h = 0;
    if (++at.t < size.t) continue;
    at.t = 0;
    image++;
  }
}

// The input pixel that a tap meets from an output pixel; -1 beyond the edge
INLINE int64_t find_pixel(const Extent& input, const Corner& corner, const Extent& tap) {
  const int64_t t = corner.at.t + tap.t, h = corner.at.h + tap.h, w = corner.at.w + tap.w;
  if (t < 0 || t >= input.t || h < 0 || h >= input.h || w < 0 || w >= input.w) return -1;
  return ((corner.image * input.t + t) * input.h + h) * input.w + w;
}

// What one tap meets from a block; returns whether it meets the input at all
bool find_rows(const Conv& p, const PixelBlock& block, const Extent& tap, TapRows& met) {
  bool any = false;
  for (int64_t i = 0; i < block.end - block.first; i++) {
    const int64_t from = find_pixel(p.g.input, block.corners[i], tap);
    met.rows[i] = p.input.q + std::max<int64_t>(from, 0) * p.input.stride;
    met.scale[i] = from < 0 ? 0.0f : p.scale[from];
    met.center_128th[i] = from < 0 ? 0.0f : p.center[from] / ZERO_POINT;
    any = any || from >= 0;
  }
  return any;
}

void find_all_rows(const Conv& p, PixelBlock& block) {
  const Extent& kernel = p.g.kernel;
  find_corners(p.g, block);
  block.met.resize(kernel.count());
  block.taps.clear();
  for (int64_t tap = 0; tap < kernel.count(); tap++) {
    const Extent at{tap / (kernel.h * kernel.w), tap / kernel.w % kernel.h, tap % kernel.w};
    if (find_rows(p, block, at, block.met[tap])) block.taps.push_back(tap);
  }
  // a block that lies in the padding altogether still gets its bias
  if (block.taps.empty()) block.taps.push_back(0);
}

// What becomes of the sums of 16 columns of a pixel after a tap: sums + scale * (q . w) + center * (sum of w). This order
// of operations, written once, is why all sets give the same bits.
INLINE Floats add_tap(Floats before, Ints sum, Floats w_sum_128, float scale, float center_128th) {
  const Floats v = multiply_add(to_floats(sum), fill(scale), before);
  return multiply_add(w_sum_128, fill(center_128th), v);
}

}  // namespace
