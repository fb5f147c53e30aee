// Weights of 4 or 6 bits with a scale for each group of inputs, decoded to int8 in a thread's own memory: the products
// behind it are those of an int8 weight. The definition is kernels/grouped_weight/reference.py.
//
//     int8 = level[code] * scale of the group, rounded to even, within -127..127
//
// A panel of 64 output columns has what a panel of int8 has (linear.h), in fewer bytes. c0 .. c3: codes of the inputs
// 4 step .. 4 step + 3 of a column.
//
//              column 0              column 63
//            +---------------+-----+---------------+
//            |  int32         | ... |               |   compensations, 256 bytes
//            +---------------+-----+---------------+
//     step 0 |  c0 c1  c2 c3 | ... |               |   low four bits of each, 2 bytes a column: 128 bytes
//       ...  +---------------+-----+---------------+
//     0, 1   |  step 0 step 1| ... |               |   6 bits alone: the upper two bits of each, a byte for a step,
//       ...  +---------------+-----+---------------+   128 bytes for two steps, behind the low bits of all steps
//
// These are the bytes of a file in another order. Scales lie apart: [panels][groups][64].
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "product.h"

namespace {

constexpr int VECTORS_OF_PANEL = PANEL / 16;

// Room of a thread for steps of a panel as int8, on a line of the cache
class DecodedSteps {
 public:
  int8_t* make_room(int64_t bytes) {
    if (size_ < bytes) {
      bytes_.reset(new int8_t[bytes + 64]);
      size_ = bytes;
    }
    return bytes_.get() + (64 - reinterpret_cast<uintptr_t>(bytes_.get()) % 64) % 64;
  }

 private:
  std::unique_ptr<int8_t[]> bytes_;
  int64_t size_ = 0;
};

// Scales of one group of a panel, 16 columns in each register
template <bool BYTES>
INLINE void load_scales(const void* scale, int64_t group, Floats (&scales)[VECTORS_OF_PANEL]) {
  unroll<VECTORS_OF_PANEL>([&](auto j) INLINED {
    const int64_t place = group * PANEL + 16 * j;
    if constexpr (BYTES)
      scales[j] = load_float8(static_cast<const uint8_t*>(scale) + place);
    else
      scales[j] = load(static_cast<const float*>(scale) + place);
  });
}

// The levels of input I of a step, of 16 columns. `low`: four bits of each of the four codes, `high`: two bits of each
template <int BITS, int I>
INLINE Floats get_levels(Floats levels, Ints low, Ints high) {
  const Floats level = look_up(levels, shift_right<4 * I>(low));
  if constexpr (BITS == 4) return level;
  const Ints upper = bits_and(shift_right<2 * I>(high), fill_ints(3));
  return multiply_add(to_floats(upper), fill(16.0f), level);
}

template <int BITS, int I>
INLINE Ints decode_input(Floats levels, Ints low, Ints high, Floats scale) {
  return round_to_ints(multiply(get_levels<BITS, I>(levels, low, high), scale));
}

// The steps from `from` to `to` of a panel as int8 [steps][256]
template <int BITS, bool BYTES>
void decode_steps(const Weight& w, int64_t panel, int64_t from, int64_t to, int8_t* out) {
  const Groups& groups = w.groups;
  const auto* low = reinterpret_cast<const uint16_t*>(w.panel(panel) + 4 * PANEL);
  const uint16_t* high = low + w.steps * PANEL;
  const int64_t scales_of_panel = ceil_div(w.steps, groups.steps) * PANEL * (BYTES ? 1 : 4);
  const void* scale = static_cast<const uint8_t*>(groups.scale) + panel * scales_of_panel;
  const Floats levels = load(groups.levels);
  Floats scales[VECTORS_OF_PANEL];
  int64_t group = from / groups.steps, group_end = from;
  for (int64_t step = from; step < to; step++, out += 4 * PANEL) {
    if (step == group_end) {
      load_scales<BYTES>(scale, group++, scales);
      group_end = group * groups.steps;
    }
    unroll<VECTORS_OF_PANEL>([&](auto j) INLINED {
      const Ints low_bits = load_halves(low + step * PANEL + 16 * j, ALL);
      Ints high_bits = low_bits;  // 4 bits: not looked at
      if constexpr (BITS == 6) {
        high_bits = load_halves(high + step / 2 * PANEL + 16 * j, ALL);
        if (step % 2) high_bits = shift_right<8>(high_bits);
      }
      const Ints bytes = saturate_to_bytes(decode_input<BITS, 0>(levels, low_bits, high_bits, scales[j]),
                                           decode_input<BITS, 1>(levels, low_bits, high_bits, scales[j]),
                                           decode_input<BITS, 2>(levels, low_bits, high_bits, scales[j]),
                                           decode_input<BITS, 3>(levels, low_bits, high_bits, scales[j]));
      store(reinterpret_cast<int32_t*>(out + 64 * j), bytes);
    });
  }
}

// Steps of a panel as int8: where they lie, or decoded
INLINE const int8_t* get_steps(const Weight& w, int64_t panel, int64_t from, int64_t to, DecodedSteps& decoded) {
  const Groups& groups = w.groups;
  if (!groups.levels) return w.panel(panel) + 4 * PANEL * (1 + from);
  int8_t* steps = decoded.make_room(4 * PANEL * (to - from));
  if (groups.bits == 4)
    (groups.has_byte_scales ? decode_steps<4, true> : decode_steps<4, false>)(w, panel, from, to, steps);
  else
    (groups.has_byte_scales ? decode_steps<6, true> : decode_steps<6, false>)(w, panel, from, to, steps);
  return steps;
}

}  // namespace
