// Pixels to unsigned bytes where pixels lie side by side and not their channels, as in NCHW: 16 pixels at a time, a
// register for each channel. Each pixel keeps to its lane, so that nothing has to be added across lanes; only the bytes
// change places. All numbers are those of pixels.h, to the bit.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "pixels.h"

namespace {

constexpr int64_t STRIP = 16;  // pixels

// What a thread keeps for a strip
struct StripSpace {
  std::vector<float> numbers;  // [C, STRIP]
  std::vector<int32_t> words;  // [C / 4, STRIP]: the bytes of four channels
  explicit StripSpace(int64_t C) : numbers(C * STRIP), words(ceil_div(C, 4) * STRIP) {}
};

template <class X>
INLINE void load_strip(const PixelsInput& in, const typename X::T* x, int64_t image, Mask inside, float* numbers) {
  for (int64_t c = 0; c < in.C; c++) {
    const int64_t at = image * in.step_stride + c;
    Floats v = X::load(x + c * in.channel_stride, inside);
    if (in.factor) v = multiply_add(v, fill(in.factor[at]), fill(in.shift[at]));
    store(numbers + c * STRIP, in.silu ? silu(v) : v);
  }
}

// Rotates groups of channels in rounds, as `rotate` does
template <class H>
void rotate_strip(float* numbers, int64_t C, int64_t group) {
  for (int64_t apart = 1; apart < group; apart *= H::RADIX)
    for (int64_t c = 0; c < C; c++) {
      if (c / apart % H::RADIX) continue;  // not the first of those that are combined
      Floats r[H::RADIX];
      unroll<H::RADIX>([&](auto i) INLINED { r[i] = load(numbers + (c + i * apart) * STRIP); });
      H::butterfly(r, 1);
      unroll<H::RADIX>([&](auto i) INLINED { store(numbers + (c + i * apart) * STRIP, r[i]); });
    }
}

// The steps of all 16 pixels
struct StripSteps {
  alignas(64) float scale[STRIP], middle[STRIP];
};
inline StripSteps choose_steps(const float* numbers, int64_t C, float unit) {
  Floats high = load(numbers), minus_low = subtract(fill(0.0f), high);
  Ints magnitude = fill_ints(0);
  for (int64_t c = 0; c < C; c++) {
    const Floats v = load(numbers + c * STRIP);
    high = maximum(high, v);
    minus_low = maximum(minus_low, subtract(fill(0.0f), v));
    magnitude = max_magnitude(magnitude, v);
  }
  float highs[STRIP], minus_lows[STRIP], magnitudes[STRIP];
  store(highs, high);
  store(minus_lows, minus_low);
  store(magnitudes, as_floats(magnitude));
  StripSteps steps;
  for (int64_t i = 0; i < STRIP; i++) {
    const Step step = choose_step({-minus_lows[i], highs[i], magnitudes[i]}, unit);
    steps.scale[i] = step.scale;
    steps.middle[i] = step.middle;
  }
  return steps;
}

// The codes of four channels of 16 pixels, a word of four bytes for each pixel; beyond C anything
inline void pack_words(const float* numbers, int64_t C, const StripSteps& steps, float unit, int32_t* words) {
  const Floats middle = load(steps.middle), divisor = multiply(load(steps.scale), fill(unit));
  auto get_codes = [&](int64_t c) INLINED {
    return c < C ? to_codes(load(numbers + c * STRIP), middle, divisor) : fill_ints(0);
  };
  for (int64_t c = 0; c < C; c += 4) {
    const Ints low = add(get_codes(c), shift_left_8(get_codes(c + 1)));
    const Ints high = add(get_codes(c + 2), shift_left_8(get_codes(c + 3)));
    store(words + c / 4 * STRIP, add(low, shift_left_16(high)));
  }
}

// The pixels of an image from `first` on, a strip or what is left of one
template <class X>
void quantize_strip(const PixelsInput& in, int64_t image, int64_t first, StripSpace& space, const PixelsOutput& out) {
  const auto* x = static_cast<const typename X::T*>(in.x) + image * in.image_stride + first;
  const int64_t pixels = std::min(STRIP, in.plane - first), i = image * in.plane + first;
  float* numbers = space.numbers.data();
  // code of its own for a whole strip, see for_each_16
  if (pixels == STRIP)
    load_strip<X>(in, x, image, ALL, numbers);
  else
    load_strip<X>(in, x, image, first_lanes(pixels), numbers);
  if (in.rotation && in.sylvester) rotate_strip<Sylvester>(numbers, in.C, in.rotation);
  if (in.rotation && !in.sylvester) rotate_strip<Regular>(numbers, in.C, in.rotation);
  const StripSteps steps = choose_steps(numbers, in.C, in.unit());
  pack_words(numbers, in.C, steps, in.unit(), space.words.data());
  for (int64_t pixel = 0; pixel < pixels; pixel++) {
    out.scale[i + pixel] = steps.scale[pixel];
    out.center[i + pixel] = steps.middle[pixel] / in.unit();
    uint8_t* q = out.q + (i + pixel) * out.stride;
    for (int64_t word = 0; word < ceil_div(in.C, 4); word++)
      std::memcpy(q + 4 * word, &space.words[word * STRIP + pixel], 4);
  }
}

template <class X>
void quantize_planes(const PixelsInput& in, const PixelsOutput& out, int threads) {
  const int64_t strips = ceil_div(in.plane, STRIP);  // of an image
  MemoryGuard memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::unique_ptr<StripSpace> space;
    memory.run([&] { space.reset(new StripSpace(in.C)); });
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < in.images * strips; strip++) {
      if (memory.has_failed()) continue;
      quantize_strip<X>(in, strip / strips, strip % strips * STRIP, *space, out);
    }
  }
  memory.rethrow();
}

template <class X>
void quantize_pixels(const PixelsInput& in, const PixelsOutput& out, int threads) {
  in.channel_stride == 1 ? quantize_rows_of_pixels<X>(in, out, threads) : quantize_planes<X>(in, out, threads);
}

void quantize_pixels(const PixelsInput& in, const PixelsOutput& out, int threads) {
  switch (in.dtype) {
    case BF16: return quantize_pixels<BFloat16>(in, out, threads);
    case F16: return quantize_pixels<Float16>(in, out, threads);
    default: return quantize_pixels<Float32>(in, out, threads);
  }
}

}  // namespace
