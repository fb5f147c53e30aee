// INT8 attention for CPUs, without scores in memory; a plain C interface without torch headers. `attention.py` makes a
// torch operator of it. The definition is kernels/int8_attention/reference.py.
//
// There is one library for each instruction set, from attention_<name>.cpp, which includes all of these:
//
//     set_<name>.h            how a product of the set adds, and how large its tiles are
//     attention_products.h    rows by panels (amx_attention_products.h: with AMX's tiles)
//     attention_softmax.h     scores of a block of keys to probabilities in bytes
//     attention_operands.h    queries, keys and values as the products read them
//     attention_mask.h        what is added to scores
//     attention.h             the loops, the C interface
//
// Keys and values of a head are packed once, as linear.h describes for weights: a step of the first product reads four
// channels of 64 keys, one of the second the values of four keys in 64 channels. Then, for each block of queries:
//
//     for each block of 256 keys                     packed keys and values stay in the second cache
//       for each tile of rows (six queries)          what follows stays in the first one
//         scores   [6, 256]   = q kᵀ                 int32 in registers, stored as float32 times the keys' scales
//         codes    [6, 256]   = 255 exp(scores - largest of the row and block)          bytes
//         products [6, 64]    = codes v              int32 in registers
//         output   [6, 64]    = output * old weight + products * weight
//
// The weights are exp(maximum - new maximum) of what was summed before and of the block, so that the output is what it
// would be with the largest score of all keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "attention_mask.h"
#include "attention_operands.h"
#include "attention_softmax.h"

namespace {

constexpr int64_t QUERY_BLOCK = 192;  // queries of a task
static_assert(QUERY_BLOCK % ATTENTION_ROWS == 0);
static_assert(KEY_BLOCK % PANEL == 0);

// What int8run_attention computes; attention.py has the same fields
struct Attention {
  Operand q, k, v, output;
  Mask4 mask;
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  int64_t rotation;  // channels of a group; 0: none. A power of 4: the regular matrix, else Sylvester's
  int64_t is_causal, center_keys;
  int64_t threads;
  double scale;  // of the scores
};

// --- keys and values

// Heads whose keys and values are packed at a time: enough for every thread to have tasks
int64_t count_packed_heads(const Attention& a) {
  const int64_t tasks = a.heads / a.key_heads * ceil_div(a.queries, QUERY_BLOCK);
  return std::clamp<int64_t>(ceil_div(4 * a.threads, tasks), 1, a.batch * a.key_heads);
}

void make_room(const Attention& a, PackedHead& head) {
  const int64_t steps = ceil_div(a.width, 4), value_panels = ceil_div(a.value_width, PANEL);
  head.keys.resize(ceil_div(a.keys, PANEL) * (1 + steps) * STEP_BYTES / sizeof(Line));
  head.values.resize(ceil_div(a.keys, KEY_BLOCK) * value_panels * VALUE_PANEL_BYTES / sizeof(Line));
  head.key_scale.resize(a.keys);
  head.key_mean.resize(a.center_keys ? a.width : 0);
  head.value_mean.resize(a.value_width);
  head.value_scale.resize(a.value_width);
}

// Where the heads of a pass are
struct HeadRange {
  int64_t first, count;  // of batch * key heads
};

// What is the same for all tokens of a head: means and the values' scales
void measure_heads(const Attention& a, HeadRange range, std::vector<PackedHead>& heads) {
  const int64_t key_panels = a.center_keys ? ceil_div(a.width, PANEL) : 0;
  const int64_t panels = key_panels + ceil_div(a.value_width, PANEL);
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(dynamic)
  for (int64_t task = 0; task < range.count * panels; task++) {
    PackedHead& head = heads[task / panels];
    const int64_t index = range.first + task / panels, panel = task % panels;
    const int64_t batch = index / a.key_heads, key_head = index % a.key_heads;
    if (panel < key_panels) {
      with_dtype(a.k.dtype, [&](auto x) {
        compute_mean(Tokens<decltype(x)>(a.k, batch, key_head), a.keys, PANEL * panel, a.width, head.key_mean.data());
      });
      continue;
    }
    const int64_t channel = PANEL * (panel - key_panels);
    with_dtype(a.v.dtype, [&](auto x) {
      const Tokens<decltype(x)> values(a.v, batch, key_head);
      float* mean = head.value_mean.data();
      compute_mean(values, a.keys, channel, a.value_width, mean);
      compute_value_scale(values, a.keys, channel, a.value_width, mean, head.value_scale.data());
    });
  }
}

// A block of keys and their values; `index`: of batch * key heads
void pack_block(const Attention& a, int64_t index, int64_t block, PackedHead& head) {
  const int64_t steps = ceil_div(a.width, 4), value_panels = ceil_div(a.value_width, PANEL);
  const int64_t batch = index / a.key_heads, key_head = index % a.key_heads;
  const int64_t first = block * KEY_BLOCK, end = std::min(a.keys, first + KEY_BLOCK);
  const TokenTransform by{a.width, a.center_keys ? head.key_mean.data() : nullptr, a.rotation};
  with_dtype(a.k.dtype, [&](auto x) {
    const Tokens<decltype(x)> keys(a.k, batch, key_head);
    for (int64_t key = first; key < end; key += PANEL)
      pack_keys(keys, key, std::min(end, key + PANEL), by, head.key_scale.data(),
                head.keys.data()->bytes + key / PANEL * (1 + steps) * STEP_BYTES);
  });
  with_dtype(a.v.dtype, [&](auto x) {
    const Tokens<decltype(x)> values(a.v, batch, key_head);
    for (int64_t panel = 0; panel < value_panels; panel++)
      pack_values(values, first, end, PANEL * panel, a.value_width, head,
                  head.values.data()->bytes + (block * value_panels + panel) * VALUE_PANEL_BYTES);
  });
}

void pack_heads(const Attention& a, HeadRange range, std::vector<PackedHead>& heads) {
  const int64_t blocks = ceil_div(a.keys, KEY_BLOCK);
  MemoryGuard memory;
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1) schedule(dynamic)
  for (int64_t task = 0; task < range.count * blocks; task++) {
    const int64_t local = task / blocks;
    memory.run([&] { pack_block(a, range.first + local, task % blocks, heads[local]); });
  }
  memory.rethrow();
}

// --- a block of queries

// A block of keys as a thread reads it
struct KeyBlock {
  int64_t first, count;    // keys
  int64_t padded;          // count as a multiple of 16
  const int8_t* keys;      // packed, its first panel
  const int8_t* values;
  float scale[KEY_BLOCK];  // 0 of those that are broken
  std::vector<int64_t> broken;  // keys with NaN or infinity
};

// What a thread keeps
struct AttentionWorkspace {
  explicit AttentionWorkspace(const Attention& a)
      : rows(round_up(std::min(QUERY_BLOCK, a.queries), ATTENTION_ROWS)),
        q(rows * 4 * ceil_div(a.width, 4)),
        row(round_up(a.width, 16)),
        q_scale(rows),
        row_is_broken(rows),
        output(rows * round_up(a.value_width, PANEL)),
        states(rows / ATTENTION_ROWS),
        key_buffers(KEY_BLOCK_PANELS),
        value_buffers(ceil_div(a.value_width, PANEL)),
        key_panels(KEY_BLOCK_PANELS),
        value_panels(ceil_div(a.value_width, PANEL)) {}
  int64_t rows;  // of the largest block of queries, in whole tiles
  std::vector<uint8_t> q;
  std::vector<float> row;  // a query between two steps
  std::vector<float> q_scale;
  std::vector<uint8_t> row_is_broken;
  std::vector<float> output;  // [rows, channels in whole panels], times the sum of weights
  std::vector<RowStates> states;
  Buffer q_buffer, code_buffer;
  std::vector<Buffer> key_buffers, value_buffers;
  std::vector<Panel> key_panels, value_panels;
  KeyBlock block;
  alignas(64) float scores[ATTENTION_ROWS * KEY_BLOCK];
  alignas(64) uint8_t codes[ATTENTION_ROWS * KEY_BLOCK];
  float bias[KEY_BLOCK];
  ProductUnit unit;
};

// A block of queries of a head
struct QueryBlock {
  int64_t batch, head;
  int64_t first, count;
  Rows rows;
};

void quantize_queries(const Attention& a, QueryBlock& queries, AttentionWorkspace& space) {
  const int64_t stride = 4 * ceil_div(a.width, 4);
  const TokenTransform by{a.width, nullptr, a.rotation};
  with_dtype(a.q.dtype, [&](auto x) {
    const Tokens<decltype(x)> tokens(a.q, queries.batch, queries.head);
    for (int64_t i = 0; i < queries.count; i++) {
      const float scale = quantize_token<decltype(x)>(tokens[queries.first + i], by, space.row.data(),
                                                      space.q.data() + i * stride);
      space.row_is_broken[i] = !std::isfinite(scale);
      space.q_scale[i] = space.row_is_broken[i] ? TINY : scale;
    }
  });
  // rows that fill the last tile: computed, not stored
  const int64_t padded = round_up(queries.count, ATTENTION_ROWS);
  std::fill(space.q.begin() + queries.count * stride, space.q.begin() + padded * stride, uint8_t{ZERO_POINT});
  std::fill(space.q_scale.begin() + queries.count, space.q_scale.begin() + padded, TINY);
  queries.rows = prepare_rows(space.q.data(), stride, padded, stride, space.q_buffer);
}

void load_key_block(const Attention& a, const PackedHead& head, int64_t first, AttentionWorkspace& space) {
  const int64_t steps = ceil_div(a.width, 4), value_panels = ceil_div(a.value_width, PANEL);
  KeyBlock& block = space.block;
  block.first = first;
  block.count = std::min(KEY_BLOCK, a.keys - first);
  block.padded = round_up(block.count, 16);
  block.keys = head.keys.data()->bytes + first / PANEL * (1 + steps) * STEP_BYTES;
  block.values = head.values.data()->bytes + first / KEY_BLOCK * value_panels * VALUE_PANEL_BYTES;
  block.broken.clear();
  const float sign = a.scale < 0 ? -1.0f : 1.0f;  // the scale of a row is positive, so that maxima stay maxima
  for (int64_t k = 0; k < KEY_BLOCK; k++) {
    const float scale = k < block.count ? head.key_scale[first + k] : 0.0f;
    const bool is_broken = !std::isfinite(scale);
    block.scale[k] = is_broken ? 0.0f : sign * scale;
    if (is_broken) block.broken.push_back(k);
  }
  for (int64_t p = 0; p * PANEL < block.count; p++)
    space.key_panels[p] = prepare_weights(block.keys + (p * (1 + steps) + 1) * STEP_BYTES, steps, space.key_buffers[p]);
  for (int64_t p = 0; p < value_panels; p++)
    space.value_panels[p] = prepare_weights(block.values + p * VALUE_PANEL_BYTES + STEP_BYTES,
                                            ceil_div(block.count, 4), space.value_buffers[p]);
}

// scores = q kᵀ times the keys' scales; beyond the keys that there are: -infinity
__attribute__((noinline)) void compute_scores(const Attention& a, const QueryBlock& queries, int64_t row,
                                              AttentionWorkspace& space) {
  const KeyBlock& block = space.block;
  const int64_t steps = ceil_div(a.width, 4);
  for (int64_t p = 0; p * PANEL < block.count; p++) {
    const float* scale = block.scale + p * PANEL;
    float* scores = space.scores + p * PANEL;
    multiply_rows<Bytes::OFFSET>(space.unit, queries.rows, row, space.key_panels[p],
                                 block.keys + p * (1 + steps) * STEP_BYTES,
                                 std::min(PANEL, block.count - p * PANEL), steps,
                                 [&](auto i, auto column, Ints sums) INLINED {
                                   store(scores + i * KEY_BLOCK + column, multiply(to_floats(sums), load(scale + column)));
                                 });
  }
  for (int64_t i = 0; i < ATTENTION_ROWS; i++)
    std::fill(space.scores + i * KEY_BLOCK + block.count, space.scores + i * KEY_BLOCK + block.padded,
              -std::numeric_limits<float>::infinity());
}

// scores * scale + mask
void add_mask(const Attention& a, const QueryBlock& queries, int64_t row, AttentionWorkspace& space) {
  const KeyBlock& block = space.block;
  for (int64_t i = 0; i < ATTENTION_ROWS && row + i < queries.count; i++) {
    const int64_t query = queries.first + row + i;
    float* scores = space.scores + i * KEY_BLOCK;
    if (a.mask.data) {
      read_mask(a.mask, queries.batch, queries.head, query, block.first, block.count, space.bias);
      const Floats factor = fill(space.q_scale[row + i]);
      for (int64_t k = 0; k < block.padded; k += 16)
        store(scores + k, multiply_add(load(scores + k), factor, load(space.bias + k)));
    } else {
      const Floats factor = fill(space.q_scale[row + i]);
      for (int64_t k = 0; k < block.padded; k += 16) store(scores + k, multiply(load(scores + k), factor));
    }
    if (a.is_causal)
      for (int64_t k = std::max<int64_t>(0, query + 1 - block.first); k < block.count; k++)
        scores[k] = -std::numeric_limits<float>::infinity();
    // NaN where a row attends to a broken key
    for (const int64_t k : block.broken)
      if (scores[k] != -std::numeric_limits<float>::infinity()) space.row_is_broken[row + i] = true;
  }
}

// output = output * old weight + codes v * weight
__attribute__((noinline)) void add_values(const Attention& a, int64_t row, const BlockStates& states, Rows codes,
                                          AttentionWorkspace& space) {
  const int64_t width = round_up(a.value_width, PANEL);
  for (int64_t p = 0; p * PANEL < width; p++) {
    float* output = space.output.data() + row * width + p * PANEL;
    multiply_rows<Bytes::UNSIGNED>(space.unit, codes, 0, space.value_panels[p],
                                   space.block.values + p * VALUE_PANEL_BYTES,
                                   std::min(PANEL, a.value_width - p * PANEL), ceil_div(space.block.count, 4),
                                   [&](auto i, auto column, Ints sums) INLINED {
                                     float* to = output + i * width + column;
                                     const Floats old = multiply(load(to), fill(states.old_weight[i]));
                                     store(to, multiply_add(to_floats(sums), fill(states.weight[i]), old));
                                   });
  }
}

// A tile of rows by a block of keys
void attend(const Attention& a, const QueryBlock& queries, int64_t row, AttentionWorkspace& space) {
  const KeyBlock& block = space.block;
  compute_scores(a, queries, row, space);
  // scores that are not yet multiplied by the scale of their row are where nothing is added to them
  const bool is_masked = a.mask.data || (a.is_causal && block.first + block.count - 1 > queries.first + row);
  if (is_masked) add_mask(a, queries, row, space);
  if (!is_masked && !block.broken.empty()) std::fill_n(space.row_is_broken.begin() + row, ATTENTION_ROWS, true);

  BlockStates states;
  for (int64_t i = 0; i < ATTENTION_ROWS; i++) {
    const float* scores = space.scores + i * KEY_BLOCK;
    const float factor = is_masked ? 1.0f : space.q_scale[row + i];
    const float found = find_maximum(scores, block.padded), largest = std::max(found, LOWEST);
    states.maximum[i] = largest * factor;
    if (states.maximum[i] == std::numeric_limits<float>::infinity()) space.row_is_broken[row + i] = true;
    const float sum = round_probabilities(scores, block.padded, largest, factor, space.codes + i * KEY_BLOCK);
    const bool attends_to_nothing = found < LOWEST;  // -infinity; all codes are 0
    states.sum[i] = attends_to_nothing ? 0.0f : sum;
  }
  for (int64_t i = ATTENTION_ROWS; i < STATE_ROWS; i++) states.maximum[i] = states.sum[i] = 0.0f;
  update_states(space.states[row / ATTENTION_ROWS], states);
  const Rows codes = prepare_rows(space.codes, KEY_BLOCK, ATTENTION_ROWS, round_up(block.count, 4), space.code_buffer);
  add_values(a, row, states, codes, space);
}

// output / sum of weights * scale + mean
void store_output(const Attention& a, const PackedHead& head, const QueryBlock& queries,
                  const AttentionWorkspace& space) {
  const int64_t width = round_up(a.value_width, PANEL);
  with_dtype(a.output.dtype, [&](auto y) {
    using Y = decltype(y);
    const Tokens<Y> tokens(a.output, queries.batch, queries.head);
    for (int64_t i = 0; i < queries.count; i++) {
      const float sum = space.states[i / ATTENTION_ROWS].sum[i % ATTENTION_ROWS];
      const bool attends_to_nothing = sum == 0.0f;
      float divisor = attends_to_nothing ? 1.0f : sum;
      if (space.row_is_broken[i]) divisor = std::numeric_limits<float>::quiet_NaN();
      auto* to = const_cast<typename Y::T*>(tokens[queries.first + i]);
      for (int64_t c = 0; c < a.value_width; c += 16) {
        const Mask inside = first_lanes(a.value_width - c);
        // not those of the values where no value counts: they may be NaN
        const Floats mean = attends_to_nothing ? fill(0.0f) : load(head.value_mean.data() + c, inside);
        const Floats scale = attends_to_nothing ? fill(0.0f) : load(head.value_scale.data() + c, inside);
        const Floats result = divide(load(space.output.data() + i * width + c), fill(divisor));
        Y::store(to + c, inside, multiply_add(result, scale, mean));
      }
    }
  });
}

void attend_to_all(const Attention& a, const PackedHead& head, QueryBlock queries, AttentionWorkspace& space) {
  quantize_queries(a, queries, space);
  for (float& factor : space.q_scale) factor = std::max(factor * static_cast<float>(std::abs(a.scale)), TINY);
  std::fill(space.output.begin(), space.output.end(), 0.0f);
  for (RowStates& states : space.states) {
    std::fill_n(states.maximum, STATE_ROWS, LOWEST);
    std::fill_n(states.sum, STATE_ROWS, 0.0f);
  }
  const int64_t end = a.is_causal ? std::min(a.keys, queries.first + queries.count) : a.keys;
  for (int64_t first = 0; first < end; first += KEY_BLOCK) {
    load_key_block(a, head, first, space);
    for (int64_t row = 0; row < queries.count; row += ATTENTION_ROWS) {
      const bool is_later = a.is_causal && first > queries.first + row + ATTENTION_ROWS - 1;
      if (!is_later) attend(a, queries, row, space);
    }
  }
  store_output(a, head, queries, space);
}

void attend_with_heads(const Attention& a, HeadRange range, const std::vector<PackedHead>& heads) {
  const int64_t blocks = ceil_div(a.queries, QUERY_BLOCK), group = a.heads / a.key_heads;
  MemoryGuard memory;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    std::unique_ptr<AttentionWorkspace> space;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < range.count * group * blocks; task++) {
      if (memory.has_failed()) continue;
      const int64_t local = task / (group * blocks), index = range.first + local;
      const int64_t head = index % a.key_heads * group + task / blocks % group;
      const int64_t first = task % blocks * QUERY_BLOCK;
      const QueryBlock queries{index / a.key_heads, head, first, std::min(QUERY_BLOCK, a.queries - first), Rows{}};
      memory.run([&] {
        if (!space) space.reset(new AttentionWorkspace(a));
        attend_to_all(a, heads[local], queries, *space);
      });
    }
  }
  memory.rethrow();
}

void compute_attention(const Attention& a) {
  if (a.batch * a.heads * a.queries == 0) return;
  const int64_t count = count_packed_heads(a), all = a.batch * a.key_heads;
  std::vector<PackedHead> heads(count);
  for (PackedHead& head : heads) make_room(a, head);
  for (int64_t first = 0; first < all; first += count) {
    const HeadRange range{first, std::min(count, all - first)};
    measure_heads(a, range, heads);
    pack_heads(a, range, heads);
    attend_with_heads(a, range, heads);
  }
}

}  // namespace

// `attention`: an Attention; returns a Status
extern "C" int int8run_attention(const void* attention) {
  return report_status([&] { compute_attention(*static_cast<const Attention*>(attention)); });
}
