// A block of the product by tiles that stay in vector registers, from their first product to the stored result.
// The instruction set says how large a tile is and how it adds products.
#pragma once

#include <algorithm>
#include <memory>

#include "grouped.h"
#include "product.h"
#include "register_products.h"

namespace {

constexpr int64_t ROW_BLOCK = 192;  // rows that share a pass over the weights
static_assert(ROW_BLOCK % TILE_ROWS == 0);
static_assert(TILE_ROWS <= 6, "compute_tiles has no code for larger tiles");
static_assert(K_BLOCK % 64 == 0);

// What a thread keeps while it works: operands as the product reads them, and sums between pieces of K
struct Workspace {
  Buffer x, w, t, up;  // rows, weights, and those of the branch
  DecodedSteps decoded;
  std::unique_ptr<int32_t[]> sums;
};

// The scaled sums of one tile, on top of what `base` gives, are handed to `out`
template <int MR, class Base, class Out>
INLINE void scale_sums(const Sums<MR>& c, const int8_t* compensation, const float* w_scale,
                       const float* x_scale, int64_t columns, Base base, Out out) {
  unroll<TILE_VECTORS>([&](auto j) INLINED {
    const Mask m = first_lanes(columns - 16 * j);
    const Floats ws = load(w_scale + 16 * j, m);
    const Ints correction = load(reinterpret_cast<const int32_t*>(compensation) + 16 * j);
    unroll<MR>([&](auto i) INLINED {
      out(i, j, m, scale_sum(c[i][j], correction, ws, x_scale[i], base(i, j, m)));
    });
  });
}

// A tile of the block: rows from `row` on by 16 TILE_VECTORS columns of the panel
struct Tile {
  int64_t row, part;                                    // `part`: which columns of the panel
  int64_t get_column() const { return 16 * TILE_VECTORS * part; }  // in the panel
};

// Add the low-rank branch to one tile and store it. `held`: what the layer itself gave, float32 [MR, 16
// TILE_VECTORS]. Not inlined: with both products in one function GCC 12 keeps sums in memory.
template <int MR, class Y>
__attribute__((noinline)) void add_branch(const Product& p, const Block& block, Tile tile, const float* held) {
  constexpr int64_t WIDTH = 16 * TILE_VECTORS;
  const int8_t* compensation = p.up.panel(block.panel) + 4 * tile.get_column();
  Sums<MR> c;
  unroll<MR, TILE_VECTORS>([&](auto i, auto j) INLINED { c[i][j] = begin_sums(compensation + 64 * j); });
  accumulate<MR>(c, block.t.q + (tile.row - block.row) * block.t.stride, block.t.stride,
                 block.up.w + TILE_VECTORS * tile.part * block.up.part, STEPS_OF_FOUR * p.up.steps);
  const int64_t column = block.panel * PANEL + tile.get_column();
  auto* y = static_cast<typename Y::T*>(p.y) + tile.row * p.N + column;
  scale_sums<MR>(
      c, compensation, p.up.scale + column, p.t.scale + tile.row, p.N - column,
      [&](int i, int j, Mask) INLINED { return load(held + i * WIDTH + 16 * j); },
      [&](int i, int j, Mask m, Floats v) INLINED { Y::store(y + i * p.N + 16 * j, m, v); });
}

// A tile of MR rows: products from step `from` to step `to`; `sums`, int32 [MR, 64], holds those before.
// Scaled and stored at the last step.
template <int MR, class Y>
INLINE void compute_tile(const Product& p, const Block& block, Tile tile, Panel weights, int64_t from, int64_t to,
                         int32_t* sums) {
  const int8_t* compensation = p.w.panel(block.panel) + 4 * tile.get_column();
  Sums<MR> c;
  unroll<MR, TILE_VECTORS>([&](auto i, auto j) INLINED {
    c[i][j] = from ? load(sums + i * PANEL + 16 * j) : begin_sums(compensation + 64 * j);
  });
  const uint8_t* q = block.x.q + (tile.row - block.row) * block.x.stride + 4 * STEPS_OF_FOUR * from;
  accumulate<MR>(c, q, block.x.stride, weights.w + TILE_VECTORS * tile.part * weights.part,
                 STEPS_OF_FOUR * (to - from));
  if (to < p.w.steps) {
    unroll<MR, TILE_VECTORS>([&](auto i, auto j) INLINED { store(sums + i * PANEL + 16 * j, c[i][j]); });
    return;
  }
  const int64_t column = block.panel * PANEL + tile.get_column(), columns = p.N - column;
  auto bias = [&](int, int j, Mask m) INLINED {
    return p.bias ? load(p.bias + column + 16 * j, m) : fill(0.0f);
  };
  if (p.t.q) {
    constexpr int64_t WIDTH = 16 * TILE_VECTORS;
    float held[MR * WIDTH];  // the layer's own result, in L1 until the branch is added
    scale_sums<MR>(
        c, compensation, p.w.scale + column, p.x.scale + tile.row, columns, bias,
        [&](int i, int j, Mask, Floats v) INLINED { store(held + i * WIDTH + 16 * j, v); });
    add_branch<MR, Y>(p, block, tile, held);
  } else {
    auto* y = static_cast<typename Y::T*>(p.y) + tile.row * p.N + column;
    scale_sums<MR>(
        c, compensation, p.w.scale + column, p.x.scale + tile.row, columns, bias,
        [&](int i, int j, Mask m, Floats v) INLINED { Y::store(y + i * p.N + 16 * j, m, v); });
  }
}

// The rows of a block by some columns of its panel, six at a time; the number of rows of a tile must be a
// constant, so the last tile has its own code
template <class Y>
void compute_tiles(const Product& p, const Block& block, int64_t part, Panel weights, int64_t from, int64_t to,
                   int32_t* sums) {
  for (int64_t row = block.row; row < block.end; row += TILE_ROWS) {
    const Tile tile{row, part};
    int32_t* s = sums + (row - block.row) * PANEL + tile.get_column();
    switch (std::min<int64_t>(TILE_ROWS, block.end - row)) {
      case 6: compute_tile<6, Y>(p, block, tile, weights, from, to, s); break;
      case 5: compute_tile<5, Y>(p, block, tile, weights, from, to, s); break;
      case 4: compute_tile<4, Y>(p, block, tile, weights, from, to, s); break;
      case 3: compute_tile<3, Y>(p, block, tile, weights, from, to, s); break;
      case 2: compute_tile<2, Y>(p, block, tile, weights, from, to, s); break;
      default: compute_tile<1, Y>(p, block, tile, weights, from, to, s);
    }
  }
}

// A block of rows by one panel
template <class Y>
void compute_block(const Product& p, Block block, int64_t k_block, Workspace& space) {
  if (p.t.q) block.up = prepare_weights(p.up.panel(block.panel) + 4 * PANEL, p.up.steps, space.up);
  const int64_t columns = std::min(PANEL, p.N - block.panel * PANEL);
  for (int64_t from = 0; from < p.w.steps; from += k_block) {
    const int64_t to = std::min(p.w.steps, from + k_block);
    const int8_t* steps = get_steps(p.w, block.panel, from, to, space.decoded);
    const Panel weights = prepare_weights(steps, to - from, space.w);
    for (int64_t part = 0; 16 * TILE_VECTORS * part < columns; part++)
      compute_tiles<Y>(p, block, part, weights, from, to, space.sums.get());
  }
}

// Nothing is left over from a block
template <class Y>
void finish_blocks(const Product&, Workspace&) {}

}  // namespace
