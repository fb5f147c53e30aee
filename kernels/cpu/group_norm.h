// GroupNorm in front of a convolution: the statistics of each group, as a factor and a shift of each channel, which
// pixels.h and planes.h apply on their way to bytes. The definition is `measure_norm` in kernels/int8_conv/reference.py.
//
// Numbers are summed in float32 for some pixels at a time, about a number that the channel has, so that a mean far from 0
// costs no digits; those sums in float64. It is the middle one of three pixels, so that none far from all others is it.
// One order for each layout, whatever the set and the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "norm.h"
#include "pixels.h"

namespace {

constexpr int64_t CHUNK = 256;  // pixels whose sums stay in float32
constexpr int64_t TOGETHER = 4;    // pixels that are added in registers

// As pixels.py lays it out
struct GroupNorm {
  int64_t groups;
  const float* weight;  // [C] or null
  const float* bias;    // [C] or null
  double eps;
};

// What is found: [images, C] each
struct ChannelSteps {
  float *factor, *shift;
};

// ChannelSums over chunks of pixels, about a number of each channel
struct ChannelSums {
  int64_t C, chunks;
  std::vector<float> origins;  // [images, C]
  std::vector<float> numbers;  // [images, chunks, 2, C]: sums, and sums of squares
  ChannelSums(const PixelsInput& in)
      : C(in.C), chunks(ceil_div(in.plane, CHUNK)), origins(in.images * C), numbers(in.images * chunks * 2 * C) {}
  float* of_chunk(int64_t image, int64_t chunk) { return numbers.data() + (image * chunks + chunk) * 2 * C; }
};

template <class X>
float read_number(const typename X::T* x) {
  float lanes[16];
  store(lanes, X::load(x, first_lanes(1)));
  return lanes[0];
}

// What the sums of a channel are about. The pixels lie where an image whose width is a power of 2 has no edge.
template <class X>
float choose_origin(const PixelsInput& in, const typename X::T* x) {
  const auto read = [&](int64_t sevenths) { return read_number<X>(x + in.plane * sevenths / 7 * in.pixel_stride); };
  const float a = read(1), b = read(3), c = read(5);
  return std::max(std::min(a, b), std::min(std::max(a, b), c));
}

// COUNT pixels, whose channels lie side by side, on top of the sums of those before
template <class X, int COUNT>
void add_rows(const typename X::T* x, int64_t stride, int64_t C, const float* origins, float* sums, float* squares) {
  for_each_16(C, [&](int64_t c, Mask inside) INLINED {
    const Floats origin = load(origins + c, inside);
    Floats sum = load(sums + c, inside), square = load(squares + c, inside);
    unroll<COUNT>([&](auto i) INLINED {
      const Floats v = subtract(X::load(x + i * stride + c, inside), origin);
      sum = add(sum, v);
      square = multiply_add(v, v, square);
    });
    store(sums + c, sum, inside);
    store(squares + c, square, inside);
  });
}

template <class X>
void sum_rows(const PixelsInput& in, const typename X::T* x, int64_t count, const float* origins, float* sums) {
  float* squares = sums + in.C;
  int64_t pixel = 0;
  for (; pixel + TOGETHER <= count; pixel += TOGETHER)
    add_rows<X, TOGETHER>(x + pixel * in.pixel_stride, in.pixel_stride, in.C, origins, sums, squares);
  for (; pixel < count; pixel++)
    add_rows<X, 1>(x + pixel * in.pixel_stride, in.pixel_stride, in.C, origins, sums, squares);
}

// The same where pixels lie side by side
template <class X>
void sum_planes(const PixelsInput& in, const typename X::T* x, int64_t count, const float* origins, float* sums) {
  for (int64_t c = 0; c < in.C; c++, x += in.channel_stride) {
    const Floats origin = fill(origins[c]);
    Floats sum = fill(0.0f), square = sum;
    for_each_16(count, [&](int64_t pixel, Mask inside) INLINED {
      const Floats v = select(inside, subtract(X::load(x + pixel, inside), origin), fill(0.0f));
      sum = add(sum, v);
      square = multiply_add(v, v, square);
    });
    sums[c] = sum_lanes(sum);
    sums[in.C + c] = sum_lanes(square);
  }
}

// Factors and shifts of a group of channels
void finish_group(const PixelsInput& in, const GroupNorm& norm, int64_t image, int64_t group, ChannelSums& sums,
                  const ChannelSteps& out) {
  const int64_t width = in.C / norm.groups, first = group * width;
  std::vector<double> means(width);
  double group_mean = 0, spread = 0;
  for (int64_t i = 0; i < width; i++) {
    double sum = 0, square = 0;
    for (int64_t chunk = 0; chunk < sums.chunks; chunk++) {
      const float* of_chunk = sums.of_chunk(image, chunk) + first + i;
      sum += of_chunk[0];
      square += of_chunk[in.C];
    }
    means[i] = sums.origins[image * in.C + first + i] + sum / in.plane;
    group_mean += means[i] / width;
    spread += square - sum * (sum / in.plane);
  }
  for (const double mean : means) spread += in.plane * ((mean - group_mean) * (mean - group_mean));
  if (spread < 0) spread = 0;  // by rounding; NaN stays
  const double scale = 1 / std::sqrt(spread / (in.plane * width) + norm.eps);
  for (int64_t c = first; c < first + width; c++) {
    const double factor = norm.weight ? norm.weight[c] * scale : scale, bias = norm.bias ? norm.bias[c] : 0;
    out.factor[image * in.C + c] = static_cast<float>(factor);
    out.shift[image * in.C + c] = static_cast<float>(bias - group_mean * factor);
  }
}

template <class X>
void measure_norm(const PixelsInput& in, const GroupNorm& norm, const ChannelSteps& out, int threads) {
  const auto* x = static_cast<const typename X::T*>(in.x);
  ChannelSums sums(in);
  for (int64_t image = 0; image < in.images; image++)
    for (int64_t c = 0; c < in.C; c++)
      sums.origins[image * in.C + c] = choose_origin<X>(in, x + image * in.image_stride + c * in.channel_stride);
  MemoryGuard memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < in.images * sums.chunks; task++) {
      const int64_t image = task / sums.chunks, chunk = task % sums.chunks;
      const auto* from = x + image * in.image_stride + chunk * CHUNK * in.pixel_stride;
      const int64_t count = std::min(CHUNK, in.plane - chunk * CHUNK);
      const float* origins = sums.origins.data() + image * in.C;
      if (in.channel_stride == 1)
        sum_rows<X>(in, from, count, origins, sums.of_chunk(image, chunk));
      else
        sum_planes<X>(in, from, count, origins, sums.of_chunk(image, chunk));
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < in.images * norm.groups; task++)
      memory.run([&] { finish_group(in, norm, task / norm.groups, task % norm.groups, sums, out); });
  }
  memory.rethrow();
}

void measure_norm(const PixelsInput& in, const GroupNorm& norm, const ChannelSteps& out, int threads) {
  switch (in.dtype) {
    case BF16: return measure_norm<BFloat16>(in, norm, out, threads);
    case F16: return measure_norm<Float16>(in, norm, out, threads);
    default: return measure_norm<Float32>(in, norm, out, threads);
  }
}

}  // namespace
