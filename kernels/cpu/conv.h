// The W8A8 convolution for CPUs as an implicit matrix product: quantize the input's pixels once, then multiply the
// rows of it that each tap of the kernel meets, where they lie. A plain C interface without torch headers; `conv.py`
// makes a torch operator of it. The definition is kernels/int8_conv/reference.py.
//
//     set_<name>.h         how a product of the set adds, and how large its tiles are
//     pixels.h, planes.h   pixels to bytes
//     register_products.h  the sums of a tile in registers
//     conv_tiles.h         a tile: sums of a tap, scaled
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
#include <memory>
#include <vector>

#include "conv_tiles.h"
#include "planes.h"

namespace {

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

// What a thread keeps while it works
struct ConvWorkspace {
  Buffer weights;
  std::vector<TapRows> met;   // of each tap
  std::vector<int64_t> taps;  // those that meet the input from anywhere in the block
  std::unique_ptr<float[]> sums;
};

// --- which input pixels a block meets

// The input pixel that a tap meets from an output pixel; -1 beyond the edge
int64_t find_pixel(const Geometry& g, int64_t image, Extent output, Extent tap) {
  const int64_t t = output.t * g.stride.t - g.padding.t + tap.t;
  const int64_t h = output.h * g.stride.h - g.padding.h + tap.h;
  const int64_t w = output.w * g.stride.w - g.padding.w + tap.w;
  if (t < 0 || t >= g.input.t || h < 0 || h >= g.input.h || w < 0 || w >= g.input.w) return -1;
  return ((image * g.input.t + t) * g.input.h + h) * g.input.w + w;
}

// What one tap meets from the output pixels `first` to `end`; returns whether it meets the input at all
bool find_rows(const Conv& p, int64_t first, int64_t end, Extent tap, TapRows& met) {
  bool any = false;
  const Extent& size = p.g.output;
  for (int64_t pixel = first; pixel < end; pixel++) {
    const int64_t frame = pixel / (size.h * size.w), in_frame = pixel % (size.h * size.w);
    const Extent at{frame % size.t, in_frame / size.w, in_frame % size.w};
    const int64_t i = pixel - first, from = find_pixel(p.g, frame / size.t, at, tap);
    met.rows[i] = p.input.q + std::max<int64_t>(from, 0) * p.input.stride;
    met.scale[i] = from < 0 ? 0.0f : p.scale[from];
    met.center_128th[i] = from < 0 ? 0.0f : p.center[from] / ZERO_POINT;
    any = any || from >= 0;
  }
  return any;
}

void find_all_rows(const Conv& p, int64_t first, int64_t end, ConvWorkspace& space) {
  const Extent& kernel = p.g.kernel;
  if (!space.sums) space.sums.reset(new float[PIXEL_BLOCK * PANEL]);
  space.met.resize(kernel.count());
  space.taps.clear();
  for (int64_t tap = 0; tap < kernel.count(); tap++) {
    const Extent at{tap / (kernel.h * kernel.w), tap / kernel.w % kernel.h, tap % kernel.w};
    if (find_rows(p, first, end, at, space.met[tap])) space.taps.push_back(tap);
  }
  // a block that lies in the padding altogether still gets its bias
  if (space.taps.empty()) space.taps.push_back(0);
}

// --- products

// A block of output pixels by one panel, tap after tap
template <class Y>
void compute_panel(const Conv& p, int64_t first, int64_t end, int64_t panel, ConvWorkspace& space) {
  const int64_t column = panel * PANEL;
  auto* y = static_cast<typename Y::T*>(p.y) + first * p.y_stride + column;
  const PanelBlock block{end - first,
                         std::min(PANEL, p.N - column),
                         p.steps(),
                         p.w_scale + column,
                         p.bias ? p.bias + column : nullptr,
                         y,
                         p.y_stride,
                         space.sums.get()};
  for (const int64_t tap : space.taps) {
    const int8_t* compensation = p.get_weights(panel, tap);
    const Panel weights = prepare_weights(compensation + 4 * PANEL, block.steps, space.weights);
    compute_tap<Y>(block, {&space.met[tap], compensation, weights, tap == space.taps.front(), tap == space.taps.back()});
  }
}

// A block of output pixels by the panels from `first_panel` to `last_panel`
template <class Y>
void compute_task(const Conv& p, int64_t block, int64_t first_panel, int64_t last_panel, ConvWorkspace& space) {
  const int64_t first = block * PIXEL_BLOCK, end = std::min(p.pixels(), first + PIXEL_BLOCK);
  find_all_rows(p, first, end, space);
  for (int64_t panel = first_panel; panel < last_panel; panel++) compute_panel<Y>(p, first, end, panel, space);
}

// The whole convolution. A task is one block of pixels by some neighboring panels; threads take tasks as they come.
//
//     for each task (block of pixels, panels of a chunk)
//       for each panel of the chunk
//         for each tap                   its weights come from memory once for the block
//           for each tile of the block   the pixels around the block stay in L2
template <class Y>
void convolve(const Conv& p, int threads) {
  const int64_t panels = ceil_div(p.N, PANEL), blocks = ceil_div(p.pixels(), PIXEL_BLOCK);
  if (blocks == 0) return;
  // enough tasks for every thread to end at about the same time
  const int64_t chunks = std::clamp<int64_t>(ceil_div(8 * threads, blocks), 1, panels);
  const int64_t width = ceil_div(panels, chunks);  // panels of a chunk
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

// Both return a Status
extern "C" {

// x [images, C, plane] with three strides -> q + 128: uint8 [images * plane, round_up(C, 4)], scale and center
// [images * plane]. Channels or pixels lie side by side, so that the stride of one of them is 1. SiLU comes first, then
// a rotation in groups of `rotation` that divide C (0: none), by Sylvester's Hadamard matrix (2, 4, 8, 16, ...) or else
// by the regular one (4, 16, 64, 256, ...).
int int8run_quantize_pixels(const void* x, int dtype, int64_t images, int64_t C, int64_t plane, int64_t image_stride,
                            int64_t channel_stride, int64_t pixel_stride, int64_t rotation, int sylvester, int silu,
                            uint8_t* q, float* scale, float* center, int threads) {
  PixelsInput in{x, images, C, plane};
  in.image_stride = image_stride;
  in.channel_stride = channel_stride;
  in.pixel_stride = pixel_stride;
  in.rotation = rotation;
  in.sylvester = sylvester != 0;
  in.silu = silu != 0;
  return report_status([&] { quantize_pixels(in, dtype, {q, round_up(C, 4), scale, center}, threads); });
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
    const Rows input = prepare_rows(q, bytes, g.batch * g.input.count(), bytes, buffer);
    convolve({g, input, scale, center, C, N, packed, w_scale, bias, y, y_stride}, dtype, threads);
  });
}
}
