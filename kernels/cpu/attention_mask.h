// What is added to scores, read from a mask of any dtype and stride.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "quantize.h"

namespace {

constexpr int64_t BOOL = 3;  // dtype of a mask, besides common.h's; true: attend

// [batch, heads, queries, keys]; strides in numbers, 0 along dimensions that the mask does not have
struct Mask4 {
  const void* data;  // null: none
  int64_t dtype;
  int64_t batch_stride, head_stride, query_stride, key_stride;
};

// `count` numbers to float32, and 0 behind them up to a multiple of 16
template <class X>
void read_numbers(const typename X::T* x, int64_t stride, int64_t count, float* to) {
  for (int64_t k = 0; k < count; k += 16) {
    const int64_t there = std::min<int64_t>(16, count - k);
    const typename X::T* from = x + k * stride;
    typename X::T copy[16] = {};
    if (stride != 1) {
      for (int64_t lane = 0; lane < there; lane++) copy[lane] = from[lane * stride];
      from = copy;
    }
    store(to + k, X::load(from, first_lanes(there)));
  }
}

// What is added to the scores of a query for `count` keys from `first` on; `bias` has room for a multiple of 16
void read_mask(const Mask4& mask, int64_t batch, int64_t head, int64_t query, int64_t first, int64_t count,
               float* bias) {
  const int64_t offset = batch * mask.batch_stride + head * mask.head_stride + query * mask.query_stride +
                         first * mask.key_stride;
  if (mask.dtype == BOOL) {
    const auto* attends = static_cast<const uint8_t*>(mask.data) + offset;
    const int64_t padded = round_up(count, 16);
    for (int64_t k = 0; k < count; k++)
      bias[k] = attends[k * mask.key_stride] ? 0.0f : -std::numeric_limits<float>::infinity();
    std::fill(bias + count, bias + padded, 0.0f);
    return;
  }
  if (mask.dtype == BF16)
    read_numbers<BFloat16>(static_cast<const uint16_t*>(mask.data) + offset, mask.key_stride, count, bias);
  else if (mask.dtype == F16)
    read_numbers<Float16>(static_cast<const uint16_t*>(mask.data) + offset, mask.key_stride, count, bias);
  else
    read_numbers<Float32>(static_cast<const float*>(mask.data) + offset, mask.key_stride, count, bias);
}

}  // namespace
