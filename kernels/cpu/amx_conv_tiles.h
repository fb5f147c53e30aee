// A block of a convolution by AMX's tiles; conv_tiles.h has the same for vector registers.
//
// The rows of bytes that a tap meets are copied into tiles once for all panels of a task. So taps come first here, and
// the float32 sums of every panel wait in L2 for the next tap. As in amx_tiles.h, int32 sums pass through memory: those
// of 32 pixels by 32 columns are scaled, a few rows at a time, between the products of the next ones.
//
//     for each tap                        its rows: 192 x C bytes in tiles
//       for each panel of the task        the weights of the tap; the next ones are fetched meanwhile
//         for each 32 columns, 32 pixels  int32 [32, 32], then + scale * them + center * sum of weights
#pragma once

#include <algorithm>
#include <memory>

#include "amx_tiles.h"
#include "conv_product.h"

namespace {

static_assert(PIXEL_BLOCK % PAIR == 0);
constexpr int64_t MOST_PANELS = 8;  // of a task: their sums are 48 KB each
constexpr int LINES_AHEAD = 6;      // of weights to come, for each step of the products

// Four tiles of sums of a tap, and what becomes of them
struct TapSums {
  alignas(64) int32_t sums[PAIR * PAIR];
  const TapRows* met;
  const int8_t* compensation;  // of the first column, like w_scale, bias (or null) and the two that follow
  const float *w_scale, *bias;
  float* kept;  // float32 with PANEL numbers to a row: sums of the taps before
  void* y;
  int64_t y_stride;
  int64_t start;    // the first pixel, in the block
  int64_t columns;  // of the output from here on
  bool is_first, is_last;
  int64_t rows = 0;  // that there are
  int64_t next = 0;  // the first row that is not yet scaled
};

// What a thread keeps while it works
struct ConvWorkspace {
  PixelBlock block;
  Buffer rows, weights;
  std::unique_ptr<float[]> kept;  // [MOST_PANELS, PIXEL_BLOCK, PANEL]
  // one is computed while the other is scaled
  TapSums tap_sums[2];
  TapSums* computed = tap_sums;
  TapSums* scaled = tap_sums + 1;
  // weights to come, of which some are fetched at every step
  const char *ahead = nullptr, *ahead_end = nullptr;
  TileUnit unit;
};

// Scale the next `count` rows
template <class Y>
INLINE void scale_pixels(TapSums& t, int64_t count) {
  const int64_t first = t.next, end = std::min(t.rows, first + count);
  if (first >= end) return;
  t.next = end;
  const float *scale = t.met->scale + t.start, *center_128th = t.met->center_128th + t.start;
  for (int64_t j = 0; j < PAIR; j += 16) {
    const Mask m = first_lanes(t.columns - j);
    const Ints compensation = load(reinterpret_cast<const int32_t*>(t.compensation) + j);
    const Floats w_sum_128 = to_floats(compensation);
    const Floats w_scale = load(t.w_scale + j, m), bias = t.bias ? load(t.bias + j, m) : fill(0.0f);
    auto* y = static_cast<typename Y::T*>(t.y) + j;
    for (int64_t i = first; i < end; i++) {
      float* kept = t.kept + i * PANEL + j;
      const Floats before = t.is_first ? fill(0.0f) : load(kept);
      const Ints sum = subtract(load(t.sums + i * PAIR + j), compensation);
      const Floats v = add_tap(before, sum, w_sum_128, scale[i], center_128th[i]);
      if (t.is_last)
        Y::store(y + i * t.y_stride, m, multiply_add(v, w_scale, bias));
      else
        store(kept, v);
    }
  }
}

// One tap for one panel
struct TapOfPanel {
  const TapRows* met;
  Rows rows;  // in tiles
  int64_t panel;
  const int8_t* compensation;
  Panel weights;
  float* kept;
  bool is_first, is_last;
};

// Up to 32 pixels from `start` on by the 32 columns of the panel from `column` on
template <int TILES, class Y>
void compute_tap_tiles(const Conv& p, const TapOfPanel& tap, int64_t start, int64_t column, ConvWorkspace& space) {
  const int64_t steps = p.steps(), tiles = ceil_div(steps, TILE_STEPS);
  const int64_t rows_each = ceil_div(space.scaled->rows - space.scaled->next, tiles);
  auto work_between = [&]() INLINED {
    scale_pixels<Y>(*space.scaled, rows_each);
    for (int line = 0; line < LINES_AHEAD && space.ahead < space.ahead_end; line++, space.ahead += 64)
      __builtin_prefetch(space.ahead, 0, 2);  // into the second cache
  };
  TapSums& t = *space.computed;
  multiply_tiles<TILES>(space.unit, tap.rows.q + start / TILE_ROWS * tap.rows.stride, tap.rows.stride, tap.weights, column,
                        steps, nullptr, 0, t.sums, PAIR, work_between);
  const int64_t output = tap.panel * PANEL + column, pixel = space.block.first + start;
  t.met = tap.met;
  t.compensation = tap.compensation + 4 * column;
  t.w_scale = p.w_scale + output;
  t.bias = p.bias ? p.bias + output : nullptr;
  t.kept = tap.kept + start * PANEL + column;
  t.y = static_cast<typename Y::T*>(p.y) + pixel * p.y_stride + output;
  t.y_stride = p.y_stride;
  t.start = start;
  t.columns = p.N - output;
  t.is_first = tap.is_first;
  t.is_last = tap.is_last;
  t.rows = std::min(PAIR, space.block.end - pixel);
  t.next = 0;
  std::swap(space.computed, space.scaled);
}

template <class Y>
void compute_tap(const Conv& p, const TapOfPanel& tap, ConvWorkspace& space) {
  const int64_t columns = std::min(PANEL, p.N - tap.panel * PANEL), pixels = space.block.end - space.block.first;
  for (int64_t column = 0; column < columns; column += PAIR)
    for (int64_t start = 0; start < pixels; start += PAIR) {
      if (pixels - start > TILE_ROWS)
        compute_tap_tiles<2, Y>(p, tap, start, column, space);
      else
        compute_tap_tiles<1, Y>(p, tap, start, column, space);
    }
}

// The block of the workspace by the panels from `first` to `last`
template <class Y>
void compute_panels(const Conv& p, int64_t first, int64_t last, ConvWorkspace& space) {
  const PixelBlock& block = space.block;
  if (!space.kept) space.kept.reset(new float[MOST_PANELS * PIXEL_BLOCK * PANEL]);
  for (const int64_t index : block.taps) {
    const TapRows& met = block.met[index];
    TapOfPanel tap;
    tap.met = &met;
    tap.rows = copy_rows([&](int64_t i) { return met.rows[i]; }, block.end - block.first, 4 * p.steps(), space.rows);
    tap.is_first = index == block.taps.front();
    tap.is_last = index == block.taps.back();
    for (int64_t panel = first; panel < last; panel++) {
      tap.panel = panel;
      tap.compensation = p.get_weights(panel, index);
      tap.weights = prepare_weights(tap.compensation + 4 * PANEL, p.steps(), space.weights);
      tap.kept = space.kept.get() + (panel - first) * PIXEL_BLOCK * PANEL;
      const bool has_next = panel + 1 < last;
      space.ahead = reinterpret_cast<const char*>(p.get_weights(has_next ? panel + 1 : panel, index));
      space.ahead_end = has_next ? space.ahead + (1 + p.steps()) * 4 * PANEL : space.ahead;
      compute_tap<Y>(p, tap, space);
    }
  }
  // what is left to scale
  scale_pixels<Y>(*space.scaled, PAIR);
  space.scaled->rows = space.scaled->next = 0;
}

}  // namespace
