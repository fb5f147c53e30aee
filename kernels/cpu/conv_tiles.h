// A block of a convolution by tiles that stay in vector registers: some output pixels by some columns of a panel, one tap
// of the kernel after the other. amx_conv_tiles.h has the same for AMX.
//
// The input pixels that a tap meets are rows of bytes, anywhere in the input, so that each row of a tile has its own
// pointer and nothing is copied. Each of them has a scale, too; so the sums of a tap are scaled before those of the
// next are added, in float32, and wait in memory between two taps.
#pragma once

#include <cstdint>
#include <memory>

#include "conv_product.h"
#include "register_products.h"

namespace {

static_assert(PIXEL_BLOCK % TILE_ROWS == 0);
static_assert(TILE_ROWS <= 6, "compute_tiles has no code for larger tiles");
constexpr int64_t MOST_PANELS = INT64_MAX;  // of a task

// What a thread keeps while it works
struct ConvWorkspace {
  PixelBlock block;
  Buffer weights;
  std::unique_ptr<float[]> sums;
};

// What a block of output pixels by one panel is made of
struct PanelBlock {
  int64_t pixels;         // of the block
  int64_t columns;        // of the panel
  int64_t steps;          // ceil(C / 4)
  const float* w_scale;   // of the panel's columns, like `bias`, which may be null
  const float* bias;
  void* y;                // the block's first pixel, the panel's first column
  int64_t y_stride;
  float* sums;            // float32 [PIXEL_BLOCK, 64]: of the taps before
};

// One tap of the kernel
struct Tap {
  const TapRows* met;
  const int8_t* compensation;  // 128 * sum of the weights, for each column of the panel
  Panel weights;
  bool is_first, is_last;
};

// What the sums of 16 columns begin at, so that they end as sums of q . w
INLINE Ints begin_at_compensation(const int8_t* compensation) {
  if constexpr (SIGNED_PRODUCTS) return fill_ints(0);
  return subtract(fill_ints(0), load(reinterpret_cast<const int32_t*>(compensation)));
}

// The sums of MR pixels from `start` on, after this tap, to the next one or to the output
template <int MR, class Y, bool IS_FIRST, bool IS_LAST>
INLINE void scale_tap(const PanelBlock& b, const Tap& tap, const Sums<MR>& c, int64_t start, int64_t column) {
  float* sums = b.sums + start * PANEL + column;
  auto* y = static_cast<typename Y::T*>(b.y) + start * b.y_stride + column;
  const float *scale = tap.met->scale + start, *center_128th = tap.met->center_128th + start;
  unroll<TILE_VECTORS>([&](auto j) INLINED {
    const auto* compensation = reinterpret_cast<const int32_t*>(tap.compensation + 4 * column) + 16 * j;
    const Floats w_sum_128 = to_floats(load(compensation));
    const Mask m = first_lanes(b.columns - column - 16 * j);
    const Floats w_scale = IS_LAST ? load(b.w_scale + column + 16 * j, m) : fill(0.0f);
    const Floats bias = IS_LAST && b.bias ? load(b.bias + column + 16 * j, m) : fill(0.0f);
    unroll<MR>([&](auto i) INLINED {
      const Floats before = IS_FIRST ? fill(0.0f) : load(sums + i * PANEL + 16 * j);
      const Floats v = add_tap(before, c[i][j], w_sum_128, scale[i], center_128th[i]);
      if constexpr (IS_LAST)
        Y::store(y + i * b.y_stride + 16 * j, m, multiply_add(v, w_scale, bias));
      else
        store(sums + i * PANEL + 16 * j, v);
    });
  });
}

// MR pixels from `start` on by 16 TILE_VECTORS columns. Not inlined: the pointers to rows are to stay in registers.
template <int MR, class Y>
__attribute__((noinline)) void compute_tile(const PanelBlock& b, const Tap& tap, int64_t start, int64_t part) {
  const int64_t column = 16 * TILE_VECTORS * part;  // in the panel
  Sums<MR> c;
  unroll<TILE_VECTORS>([&](auto j) INLINED {
    const Ints begin = begin_at_compensation(tap.compensation + 4 * column + 64 * j);
    unroll<MR>([&](auto i) INLINED { c[i][j] = begin; });
  });
  const uint8_t* rows[MR];
  unroll<MR>([&](auto i) INLINED { rows[i] = tap.met->rows[start + i]; });
  accumulate_rows<MR>(
      c, [&](int i) INLINED { return rows[i]; }, tap.weights.w + TILE_VECTORS * part * tap.weights.part,
      STEPS_OF_FOUR * b.steps);
  // code of its own for each: what is asked inside would be asked for every register
  if (tap.is_last)
    tap.is_first ? scale_tap<MR, Y, true, true>(b, tap, c, start, column)
                 : scale_tap<MR, Y, false, true>(b, tap, c, start, column);
  else
    tap.is_first ? scale_tap<MR, Y, true, false>(b, tap, c, start, column)
                 : scale_tap<MR, Y, false, false>(b, tap, c, start, column);
}

// The pixels of a block by a panel; the number of pixels of a tile must be a constant, so the last tile has its own
// code
template <class Y>
void compute_tap(const PanelBlock& b, const Tap& tap) {
  for (int64_t part = 0; 16 * TILE_VECTORS * part < b.columns; part++)
    for (int64_t start = 0; start < b.pixels; start += TILE_ROWS)
      switch (std::min<int64_t>(TILE_ROWS, b.pixels - start)) {
        case 6: compute_tile<6, Y>(b, tap, start, part); break;
        case 5: compute_tile<5, Y>(b, tap, start, part); break;
        case 4: compute_tile<4, Y>(b, tap, start, part); break;
        case 3: compute_tile<3, Y>(b, tap, start, part); break;
        case 2: compute_tile<2, Y>(b, tap, start, part); break;
        default: compute_tile<1, Y>(b, tap, start, part);
      }
}

// The block of the workspace by one panel, tap after tap
template <class Y>
void compute_panel(const Conv& p, int64_t panel, ConvWorkspace& space) {
  const PixelBlock& pixels = space.block;
  const int64_t column = panel * PANEL;
  auto* y = static_cast<typename Y::T*>(p.y) + pixels.first * p.y_stride + column;
  const PanelBlock block{pixels.end - pixels.first,
                         std::min(PANEL, p.N - column),
                         p.steps(),
                         p.w_scale + column,
                         p.bias ? p.bias + column : nullptr,
                         y,
                         p.y_stride,
                         space.sums.get()};
  for (const int64_t tap : pixels.taps) {
    const int8_t* compensation = p.get_weights(panel, tap);
    const Panel weights = prepare_weights(compensation + 4 * PANEL, block.steps, space.weights);
    const bool is_first = tap == pixels.taps.front(), is_last = tap == pixels.taps.back();
    compute_tap<Y>(block, {&pixels.met[tap], compensation, weights, is_first, is_last});
  }
}

// The block of the workspace by the panels from `first` to `last`: the weights of a tap come from memory once for the
// block, and the pixels around it stay in L2
template <class Y>
void compute_panels(const Conv& p, int64_t first, int64_t last, ConvWorkspace& space) {
  if (!space.sums) space.sums.reset(new float[PIXEL_BLOCK * PANEL]);
  for (int64_t panel = first; panel < last; panel++) compute_panel<Y>(p, panel, space);
}

}  // namespace
