// A block of the product by AMX's tiles: eight registers of 16 rows of 64 bytes, and an instruction that multiplies
// two of them.
//
//     sums[16 rows][16 columns] += a[16 rows][64 inputs] . b[16 steps][16 columns x 4 inputs]        tdpbusd
//
// Four tiles are sums, of 32 rows by 32 columns, two are activations and two weights: four loads for four products.
//
//                b0   b1
//         a0   | c0 | c1 |
//         a1   | c2 | c3 |
//
// Sums pass through memory to be scaled by the vector unit. That is done a few rows at a time between the products
// of the next tiles: they take 16 cycles each, and leave the vector unit idle.
//
// TileUnit has the five instructions: that of amx_unit.h, or one of the tests that computes the same without.
#pragma once

#include <algorithm>
#include <memory>

#include "grouped.h"
#include "product.h"

namespace {

constexpr int64_t ROW_BLOCK = 256;  // rows that share a pass over the weights
// Inputs of a piece: above twice this, sums are kept between pieces
constexpr int64_t K_BLOCK = 2048;
static_assert(ROW_BLOCK % PAIR == 0);
static_assert(PANEL % PAIR == 0);
static_assert(K_BLOCK % (4 * TILE_STEPS) == 0);

// --- scaling

// Four tiles of sums that are complete, int32 [32, 32], and where their results go
struct Finished {
  alignas(64) int32_t sums[PAIR * PAIR];
  alignas(64) int32_t branch_sums[PAIR * PAIR];
  int64_t row, column;  // of the output
  int64_t panel;
  int64_t rows = 0;  // that there are
  int64_t next = 0;  // the first row that is not yet scaled

  int64_t column_in_panel() const { return column - panel * PANEL; }
};
struct Workspace {
  Buffer x, w, t, up;  // rows, weights, and those of the branch
  DecodedSteps decoded;
  std::unique_ptr<int32_t[]> sums;
  // one is computed while the other is scaled
  Finished finished[2];
  Finished* computed = finished;
  Finished* scaled = finished + 1;
  const char* ahead = nullptr;  // weights that are fetched from memory next
  const char* ahead_end = nullptr;
  TileUnit unit;
};

// Scale and store the next rows of finished sums, the branch on top
template <class Y>
INLINE void scale_rows(const Product& p, Finished& f, int64_t count) {
  const int64_t first = f.next, end = std::min(f.rows, first + count);
  if (first >= end) return;
  f.next = end;
  for (int64_t j = 0; j < PAIR; j += 16) {
    const int64_t column = f.column + j, in_panel = f.column_in_panel() + j;
    const Mask m = first_lanes(p.N - column);
    const Floats w_scale = load(p.w.scale + column, m), bias = p.bias ? load(p.bias + column, m) : fill(0.0f);
    const Ints compensation = load(reinterpret_cast<const int32_t*>(p.w.panel(f.panel)) + in_panel);
    const Floats up_scale = p.t.q ? load(p.up.scale + column, m) : fill(0.0f);
    const Ints up_compensation =
        p.t.q ? load(reinterpret_cast<const int32_t*>(p.up.panel(f.panel)) + in_panel) : fill_ints(0);
    auto* y = static_cast<typename Y::T*>(p.y) + f.row * p.N + column;
    for (int64_t i = first; i < end; i++) {
      const int64_t row = f.row + i, place = i * PAIR + j;
      Floats result = scale_sum(load(f.sums + place), compensation, w_scale, p.x.scale[row], bias);
      if (p.t.q)
        result = scale_sum(load(f.branch_sums + place), up_compensation, up_scale, p.t.scale[row], result);
      Y::store(y + i * p.N, m, result);
    }
  }
}

// --- products

// Sums of TILES x 16 rows by 32 columns, from step `from` (in tiles) on; `between` is called after each step.
// They begin at 0 or, where `sums` are those of the pieces before, at these.
template <int TILES, class Between>
INLINE void multiply_tiles(TileUnit& unit, const uint8_t* a, int64_t a_stride, Panel weights, int64_t column,
                           int64_t steps, const int32_t* before, int64_t before_stride, int32_t* sums,
                           int64_t sums_stride, Between between) {
  if (before) {
    unit.template load<0>(before, 4 * before_stride);
    unit.template load<1>(before + 16, 4 * before_stride);
    if constexpr (TILES == 2) {
      unit.template load<2>(before + 16 * before_stride, 4 * before_stride);
      unit.template load<3>(before + 16 * before_stride + 16, 4 * before_stride);
    }
  } else {
    unit.template zero<0>();
    unit.template zero<1>();
    unit.template zero<2>();
    unit.template zero<3>();
  }
  for (int64_t step = 0; step < steps; step += TILE_STEPS, a += TILE_BYTES) {
    const int8_t* b = steps - step < TILE_STEPS ? weights.tail : weights.w + step * 4 * PANEL;
    b += 4 * column;
    unit.template load<4>(a, 64);
    unit.template load<6>(b, 4 * PANEL);
    unit.template load<7>(b + 64, 4 * PANEL);
    unit.template multiply<0, 4, 6>();
    unit.template multiply<1, 4, 7>();
    if constexpr (TILES == 2) {
      unit.template load<5>(a + a_stride, 64);
      unit.template multiply<2, 5, 6>();
      unit.template multiply<3, 5, 7>();
    }
    between();
  }
  unit.template store<0>(sums, 4 * sums_stride);
  unit.template store<1>(sums + 16, 4 * sums_stride);
  if constexpr (TILES == 2) {
    unit.template store<2>(sums + 16 * sums_stride, 4 * sums_stride);
    unit.template store<3>(sums + 16 * sums_stride + 16, 4 * sums_stride);
  }
}

// Up to 32 rows, from row `start` of the block on, by the 32 columns of a panel from `column` on: the steps from
// `from` to `to`. Between them the sums before these are scaled, and the next panel is fetched.
template <int TILES, class Y>
void compute_tiles(const Product& p, const Block& block, int64_t start, int64_t column,
                   Panel weights, int64_t from, int64_t to, Workspace& space) {
  const int64_t steps = to - from, tiles = ceil_div(steps, TILE_STEPS);
  const int64_t rows_each = ceil_div(space.scaled->rows - space.scaled->next, tiles);
  auto work_between = [&]() INLINED {
    scale_rows<Y>(p, *space.scaled, rows_each);
    for (int line = 0; line < 4 && space.ahead < space.ahead_end; line++, space.ahead += 64)
      __builtin_prefetch(space.ahead, 0, 2);  // into the second cache
  };
  const uint8_t* a = block.x.q + start / TILE_ROWS * block.x.stride + from / TILE_STEPS * TILE_BYTES;
  // between pieces of K, sums are kept for the whole block: int32 [ROW_BLOCK, 64]
  int32_t* kept = space.sums ? space.sums.get() + start * PANEL + column : nullptr;
  const bool is_last = to == p.w.steps;
  Finished& f = *space.computed;
  multiply_tiles<TILES>(space.unit, a, block.x.stride, weights, column, steps, from ? kept : nullptr, PANEL,
                        is_last ? f.sums : kept, is_last ? PAIR : PANEL, work_between);
  if (!is_last) return;
  if (p.t.q)
    multiply_tiles<TILES>(space.unit, block.t.q + start / TILE_ROWS * block.t.stride, block.t.stride, block.up, column,
                          p.up.steps, nullptr, 0, f.branch_sums, PAIR, []() INLINED {});
  f.row = block.row + start;
  f.column = block.panel * PANEL + column;
  f.rows = std::min(PAIR, block.end - f.row);
  f.panel = block.panel;
  f.next = 0;
  std::swap(space.computed, space.scaled);
}

// A block of rows by one panel
template <class Y>
void compute_block(const Product& p, Block block, int64_t k_block, Workspace& space) {
  if (p.t.q) block.up = prepare_weights(p.up.panel(block.panel) + 4 * PANEL, p.up.steps, space.up);
  const int64_t columns = std::min(PANEL, p.N - block.panel * PANEL), rows = block.end - block.row;
  // the next panel, if there is one: it begins where this one ends
  const bool is_last_panel = (block.panel + 1) * PANEL >= p.N;
  space.ahead = reinterpret_cast<const char*>(p.w.panel(block.panel + 1));
  space.ahead_end = is_last_panel ? space.ahead : reinterpret_cast<const char*>(p.w.panel(block.panel + 2));
  for (int64_t from = 0; from < p.w.steps; from += k_block) {
    const int64_t to = std::min(p.w.steps, from + k_block);
    const int8_t* steps_of_piece = get_steps(p.w, block.panel, from, to, space.decoded);
    const Panel weights = prepare_weights(steps_of_piece, to - from, space.w);
    for (int64_t column = 0; column < columns; column += PAIR)
      for (int64_t start = 0; start < rows; start += PAIR) {
        if (rows - start > TILE_ROWS)
          compute_tiles<2, Y>(p, block, start, column, weights, from, to, space);
        else
          compute_tiles<1, Y>(p, block, start, column, weights, from, to, space);
      }
  }
}

// What is left to scale when a thread has no more tiles of a task
template <class Y>
void finish_blocks(const Product& p, Workspace& space) {
  scale_rows<Y>(p, *space.scaled, PAIR);
  space.scaled->rows = space.scaled->next = 0;
}

}  // namespace
