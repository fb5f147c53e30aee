// The W8A8 convolution for CPUs as an implicit matrix product: quantize the input's pixels once, then multiply the
// rows of it that each tap of the kernel meets, where they lie. A plain C interface without torch headers; `conv.py`
// makes a torch operator of it. The definition is kernels/int8_conv/reference.py.
//
//     set_<name>.h         how a product of the set adds, and how large its tiles are
//     group_norm.h         the statistics of a GroupNorm before the convolution
//     pixels.h, planes.h   pixels to bytes
//     conv_product.h       the geometry, and which pixels a block meets
//     register_products.h  the sums of a tile in registers
//     conv_tiles.h         a block: sums of a tap, scaled; amx_conv_tiles.h: by AMX's tiles
//     conv.h               the layout, the loop over blocks, the C interface
//
// The quantized input and the output are channels-last: a pixel is a row of C bytes, and one of N outputs. Images have
// one frame.
//
// Packed weight: int8 [ceil(N / 64)][taps][1 + ceil(C / 4)][256 bytes], for each panel of 64 output columns and each
// tap what linear.h draws: a row of compensations, 128 * sum_c w[c], and rows of four weights of each column. The
// compensations also give the sums of weights that the pixels' centers are multiplied by.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_product.h"
#include "group_norm.h"
#include "planes.h"

namespace {

// A block of output pixels by the panels from `first_panel` to `last_panel`
template <class Y>
void compute_task(const Conv& p, int64_t block, int64_t first_panel, int64_t last_panel, ConvWorkspace& space) {
  space.block.first = block * PIXEL_BLOCK;
  space.block.end = std::min(p.pixels(), space.block.first + PIXEL_BLOCK);
  find_all_rows(p, space.block);
  compute_panels<Y>(p, first_panel, last_panel, space);
}

// The whole convolution. A task is one block of pixels by some neighboring panels; threads take tasks as they come.
template <class Y>
void convolve(const Conv& p, int threads) {
  const int64_t panels = ceil_div(p.N, PANEL), blocks = ceil_div(p.pixels(), PIXEL_BLOCK);
  if (blocks == 0) return;
  // enough tasks for every thread to end at about the same time
  const int64_t chunks = std::clamp<int64_t>(ceil_div(8 * threads, blocks), 1, panels);
  const int64_t width = std::min(MOST_PANELS, ceil_div(panels, chunks));  // panels of a chunk
  const int64_t tasks = blocks * ceil_div(panels, width);
  MemoryGuard memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ConvWorkspace space;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      if (memory.has_failed()) continue;
      const int64_t first_panel = task / blocks * width, last_panel = std::min(panels, first_panel + width);
      memory.run([&] { compute_task<Y>(p, task % blocks, first_panel, last_panel, space); });
    }
  }
  memory.rethrow();
}

void convolve(const Conv& p, int dtype, int threads) {
  switch (dtype) {
    case BF16: return convolve<BFloat16>(p, threads);
    case F16: return convolve<Float16>(p, threads);
    default: return convolve<Float32>(p, threads);
  }
}

}  // namespace

// All return a Status
extern "C" {

// The GroupNorm of x: what its numbers are multiplied by, and what is added then. factor and shift [images, C]
int int8run_group_norm(const PixelsInput* in, const GroupNorm* norm, float* factor, float* shift, int threads) {
  return report_status([&] { measure_norm(*in, *norm, {factor, shift}, threads); });
}

// x -> q + 128: uint8 [images * plane, round_up(C, 4)], scale and center [images * plane]
int int8run_quantize_pixels(const PixelsInput* in, uint8_t* q, float* scale, float* center, int threads) {
  return report_status([&] { quantize_pixels(*in, {q, round_up(in->C, 4), scale, center}, threads); });
}

// y [pixels of the output, N] with `y_stride`, of an input as int8run_quantize_pixels writes it. `geometry`: a
// Geometry, 16 numbers.
int int8run_conv(const int64_t* geometry, const uint8_t* q, const float* scale, const float* center, int64_t C,
                 int64_t N, const int8_t* packed, const float* w_scale, const float* bias, void* y, int64_t y_stride,
                 int dtype, int threads) {
  const Geometry& g = *reinterpret_cast<const Geometry*>(geometry);
  const int64_t bytes = round_up(C, 4);
  return report_status([&] {
    Buffer buffer;
    const Rows input = prepare_input(q, bytes, g.batch * g.input.count(), threads, buffer);
    convolve({g, input, scale, center, C, N, packed, w_scale, bias, y, y_stride}, dtype, threads);
  });
}
}
