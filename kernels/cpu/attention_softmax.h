// From scores of a block of keys to probabilities in bytes, row by row, and what a row remembers from block to block.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "quantize.h"

namespace {

constexpr int64_t KEY_BLOCK = 256;  // keys whose probabilities share a scale, as in int8_attention/reference.py
constexpr float LOG2_E = 1.44269504f;
constexpr float LOG2_CODE_MAX = 7.99435344f;  // log2(255): the largest probability of a row and block is 255
// Smaller exponents of 2 are taken for this one: its power is a normal number still, and nothing beside 255
constexpr float SMALLEST_EXPONENT = -100.0f;
// The maximum of a row that attends to nothing yet. Not -infinity, so that differences of two of them are 0.
constexpr float LOWEST = -FLT_MAX;

// 2^t for t from -126 to 127, to 7.5e-5 of it, which is less than 0.02 of a code. 2^t = 2^n 2^f with whole n and f
// from -1/2 to 1/2; the polynomial has the smallest relative error of its degree there.
INLINE Floats power_of_2(Floats t) {
  const Floats n = round(t), f = subtract(t, n);
  Floats p = fill(0.0551716685f);
  p = multiply_add(p, f, fill(0.242611125f));
  p = multiply_add(p, f, fill(0.693260968f));
  p = multiply_add(p, f, fill(0.999928057f));
  return scale_normal_by_power_of_2(p, n);
}

// The largest of n scores, a multiple of 16
INLINE float find_maximum(const float* scores, int64_t n) {
  Floats m = load(scores);
  for (int64_t k = 16; k < n; k += 16) m = maximum(m, load(scores + k));
  return reduce_maximum(m);
}

// 255 exp((score - maximum) * factor) of n scores, rounded to bytes; returns their sum before the rounding, which is NaN
// if a score is. n is a multiple of 16.
INLINE float round_probabilities(const float* scores, int64_t n, float maximum_score, float factor, uint8_t* codes) {
  const Floats shift = fill(maximum_score), scale = fill(factor * LOG2_E);
  Floats sum = fill(0.0f);
  for (int64_t k = 0; k < n; k += 16) {
    const Floats exponent = multiply_add(subtract(load(scores + k), shift), scale, fill(LOG2_CODE_MAX));
    // in this order x86 keeps NaN, which a mask may hold, as Arm does in any: the sum shows it
    const Floats probability = power_of_2(maximum(fill(SMALLEST_EXPONENT), exponent));
    sum = add(sum, probability);
    store_bytes(codes + k, round_to_ints(probability));
  }
  return reduce_sum(sum);
}

// What ATTENTION_ROWS rows know of the keys so far. Arrays of whole registers: all rows go through exp at once.
constexpr int64_t STATE_ROWS = (ATTENTION_ROWS + 15) / 16 * 16;
struct RowStates {
  float maximum[STATE_ROWS];  // of the scores
  float sum[STATE_ROWS];      // of 255 exp(score - maximum)
};
// The same of one block, and what it makes of the sums
struct BlockStates {
  float maximum[STATE_ROWS], sum[STATE_ROWS];
  float old_weight[STATE_ROWS];  // of what was summed before
  float weight[STATE_ROWS];      // of the block's own sums
};

// Add a block to what rows know, and find the weights of both
INLINE void update_states(RowStates& all, BlockStates& block) {
  for (int64_t i = 0; i < STATE_ROWS; i += 16) {
    const Floats before = load(all.maximum + i), here = load(block.maximum + i), now = maximum(before, here);
    const Floats old_weight = exponential(subtract(before, now)), weight = exponential(subtract(here, now));
    store(block.old_weight + i, old_weight);
    store(block.weight + i, weight);
    store(all.maximum + i, now);
    store(all.sum + i, multiply_add(load(block.sum + i), weight, multiply(load(all.sum + i), old_weight)));
  }
}

}  // namespace
