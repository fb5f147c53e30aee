// A tile of a convolution: some output pixels by some columns of a panel, one tap of the kernel after the other.
//
// The input pixels that a tap meets are rows of bytes, anywhere in the input, so that each row of a tile has its own
// pointer and nothing is copied. Each of them has a scale, too; so the sums of a tap are scaled before those of the
// next are added, in float32, and wait in memory between two taps.
#pragma once

#include <cstdint>

#include "quantize.h"
#include "register_products.h"

namespace {

constexpr int64_t PIXEL_BLOCK = 192;  // output pixels that share a pass over the weights
static_assert(PIXEL_BLOCK % TILE_ROWS == 0);
static_assert(TILE_ROWS <= 6, "compute_tiles has no code for larger tiles");

// What a tap meets from each pixel of a block: a row of the input, its scale and its center. Beyond the input's
// edge it is any row, with 0 for both. Centers are divided by 128, since compensations are 128 times the sums of weights
// that they are multiplied by.
struct TapRows {
  const uint8_t* rows[PIXEL_BLOCK];
  float scale[PIXEL_BLOCK], center_128th[PIXEL_BLOCK];
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

// sums + scale * (q . w) + center * (sum of w), for MR pixels from `start` on, to the next tap or to the output
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
      Floats v = multiply_add(to_floats(c[i][j]), fill(scale[i]), before);
      v = multiply_add(w_sum_128, fill(center_128th[i]), v);
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

}  // namespace
