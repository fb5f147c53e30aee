// Queries, keys and values as the products read them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention_softmax.h"
#include "quantize.h"

namespace {

// A tensor [batch, heads, tokens, channels]; strides in numbers, channels lie side by side
struct Operand {
  const void* data;
  int64_t dtype;
  int64_t batch_stride, head_stride, token_stride;
};
// Tokens of one head
template <class X>
struct Tokens {
  const typename X::T* x;
  int64_t stride;
  Tokens(const Operand& o, int64_t batch, int64_t head)
      : x(static_cast<const typename X::T*>(o.data) + batch * o.batch_stride + head * o.head_stride),
        stride(o.token_stride) {}
  const typename X::T* operator[](int64_t i) const { return x + i * stride; }
};

// f with the type whose `load` and `store` know the dtype
template <class F>
INLINE void with_dtype(int64_t dtype, F f) {
  switch (dtype) {
    case BF16: return f(BFloat16{});
    case F16: return f(Float16{});
    default: return f(Float32{});
  }
}

// What happens to a query or key before it is rounded
struct TokenTransform {
  int64_t width;
  const float* mean;  // is subtracted; null: none
  int64_t rotation;   // channels of a group; 0: none
};

bool is_power_of_4(int64_t n) { return (n & (n - 1)) == 0 && (n & 0x5555555555555555) != 0 && n > 1; }

// Rotate x [width] into `row`, which may be x; returns the largest magnitude
template <class X>
float rotate_token(const typename X::T* x, const TokenTransform& by, float* row) {
  return is_power_of_4(by.rotation) ? rotate<X, Regular>(x, row, by.width, by.rotation)
                                    : rotate<X, Sylvester>(x, row, by.width, by.rotation);
}

// One token to bytes, q + 128, with zeros behind it up to a multiple of four; returns its scale. `row` has room for
// round_up(width, 16) numbers.
template <class X>
float quantize_token(const typename X::T* x, const TokenTransform& by, float* row, uint8_t* q) {
  const float unit = by.rotation ? std::sqrt(static_cast<float>(by.rotation)) : 1.0f;
  if (!by.mean) {
    if (!by.rotation) return quantize_row<X>(x, by.width, absmax<X>(x, by.width), unit, q);
    return quantize_row<Float32>(row, by.width, rotate_token<X>(x, by, row), unit, q);
  }
  for (int64_t c = 0; c < by.width; c += 16) {
    const Mask inside = first_lanes(by.width - c);
    store(row + c, subtract(X::load(x + c, inside), load(by.mean + c, inside)));
  }
  const float magnitude =
      by.rotation ? rotate_token<Float32>(row, by, row) : absmax<Float32>(row, by.width);
  return quantize_row<Float32>(row, by.width, magnitude, unit, q);
}

// --- keys and values of a head, in the panels that linear.h has a picture of

struct alignas(64) Line {
  int8_t bytes[64];
};
using Lines = std::vector<Line>;  // panels are read in whole lines of the cache

// Keys are the columns of panels whose inputs are channels, [ceil(keys / 64)][1 + steps][256 bytes]. Values are the
// weights of panels whose inputs are the keys of a block, [blocks][ceil(channels / 64)][1 + KEY_BLOCK / 4][256 bytes].
struct PackedHead {
  Lines keys, values;
  std::vector<float> key_mean;                // [width], or none
  std::vector<float> key_scale;               // [keys]
  std::vector<float> value_mean, value_scale;  // [channels]
};

constexpr int64_t STEP_BYTES = 4 * PANEL;
constexpr int64_t VALUE_PANEL_BYTES = (1 + KEY_BLOCK / 4) * STEP_BYTES;
constexpr int64_t KEY_BLOCK_PANELS = KEY_BLOCK / PANEL;

// The mean over all tokens of 64 channels from `channel` on
template <class X>
void compute_mean(const Tokens<X>& tokens, int64_t count, int64_t channel, int64_t channels, float* mean) {
  Floats sum[4] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
  for (int64_t t = 0; t < count; t++)
    unroll<4>([&](auto j) INLINED {
      const int64_t c = channel + 16 * j;
      if (c < channels) sum[j] = add(sum[j], X::load(tokens[t] + c, first_lanes(channels - c)));
    });
  unroll<4>([&](auto j) INLINED {
    const int64_t c = channel + 16 * j;
    if (c < channels) store(mean + c, divide(sum[j], fill(static_cast<float>(count))), first_lanes(channels - c));
  });
}

// The scale of each of 64 channels of values about their mean
template <class X>
void compute_value_scale(const Tokens<X>& values, int64_t count, int64_t channel, int64_t channels, const float* mean,
                         float* scale) {
  Ints magnitude[4] = {fill_ints(0), fill_ints(0), fill_ints(0), fill_ints(0)};
  for (int64_t t = 0; t < count; t++)
    unroll<4>([&](auto j) INLINED {
      const int64_t c = channel + 16 * j;
      if (c >= channels) return;
      const Mask inside = first_lanes(channels - c);
      magnitude[j] = max_magnitude(magnitude[j], subtract(X::load(values[t] + c, inside), load(mean + c, inside)));
    });
  unroll<4>([&](auto j) INLINED {
    const int64_t c = channel + 16 * j;
    if (c >= channels) return;
    float largest[16];
    store(largest, as_floats(magnitude[j]));
    for (int64_t lane = 0; lane < std::min<int64_t>(16, channels - c); lane++) {
      const float s = largest[lane] / 127.0f;
      scale[c + lane] = s < TINY ? TINY : s;  // NaN stays
    }
  });
}

// 64 keys to a panel, from `first` on
template <class X>
void pack_keys(const Tokens<X>& keys, int64_t first, int64_t end, const TokenTransform& by, float* scale,
               int8_t* panel) {
  const int64_t steps = ceil_div(by.width, 4);
  std::vector<float> row(round_up(by.width, 16));
  std::vector<uint8_t> q(4 * steps);
  if (end - first < PANEL) std::memset(panel, 0, (1 + steps) * STEP_BYTES);
  for (int64_t key = first; key < end; key++) {
    scale[key] = quantize_token<X>(keys[key], by, row.data(), q.data());
    int8_t* column = panel + 4 * (key - first);
    int32_t sum = 0;  // bytes behind the last channel stand for 0
    for (const uint8_t code : q) sum += code - ZERO_POINT;
    sum *= ZERO_POINT;
    std::memcpy(column, &sum, sizeof sum);
    for (int64_t step = 0; step < steps; step++) {
      uint32_t four;
      std::memcpy(&four, q.data() + 4 * step, sizeof four);
      four ^= 0x80808080;  // q + 128 to q
      std::memcpy(column + (1 + step) * STEP_BYTES, &four, sizeof four);
    }
  }
}

// A block of keys' values, from `first` on, 64 channels from `channel` on, to a panel
template <class X>
void pack_values(const Tokens<X>& values, int64_t first, int64_t end, int64_t channel, int64_t channels,
                 const PackedHead& head, int8_t* panel) {
  for (int64_t c = channel; c < channel + PANEL; c += 16) {
    const Mask inside = first_lanes(channels - c);
    const Floats mean = load(head.value_mean.data() + c, inside);
    const Floats scale = select(inside, load(head.value_scale.data() + c, inside), fill(1.0f));
    Ints sum = fill_ints(0);
    int8_t* to = panel + 4 * (c - channel);
    for (int64_t step = 0; 4 * step < end - first; step++) {
      Ints codes[4];
      unroll<4>([&](auto i) INLINED {
        const int64_t key = first + 4 * step + i;
        codes[i] = fill_ints(0);
        if (key < end)
          codes[i] = round_to_ints(divide(subtract(X::load(values[key] + c, inside), mean), scale));
        sum = add(sum, codes[i]);
        codes[i] = bits_and(codes[i], fill_ints(0xFF));
      });
      // four bytes of each channel side by side
      const Ints low = add(codes[0], shift_left_8(codes[1])), high = add(codes[2], shift_left_8(codes[3]));
      store(reinterpret_cast<int32_t*>(to + (1 + step) * STEP_BYTES), add(low, shift_left_16(high)));
    }
    int32_t sums[16];
    store(sums, sum);
    for (int32_t& each : sums) each *= ZERO_POINT;
    std::memcpy(to, sums, sizeof sums);
  }
}

}  // namespace
