// Rows of a weight to int8, for files that are quantized as they are read; a plain C interface, no torch
// headers. `rows.py` calls it, and has the same in torch.
//
// Plain C++ in loops of 16 numbers, which compilers turn into the vector instructions that they are allowed.
// The order of every addition is written down and no product is fused with one, so that all machines,
// compilers and numbers of threads give the same integers and scales, and the same as `rows.py`.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t LANES = 16;
constexpr float TINY = 1e-30f;  // the scale of a row of zeros, as in quantize_rowwise/reference.py
// 1.5 * 2^23. Between 2^23 and 2^24 float32 has no fractions: a small number that is added to this is rounded
// to an integer, ties to even, which then stands in the lowest bits.
constexpr float ROUND = 12582912.0f;
constexpr int32_t ROUND_BITS = 0x4B400000;
constexpr int32_t INFINITE = 0x7F800000;   // magnitudes from here on are infinity or NaN
constexpr int64_t SUM_BLOCK = 64 * LANES;  // numbers summed in float32 before they are added in float64

// --- one row to float32

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// bfloat16 is the high half of a float32
inline float from_bf16(uint16_t h) { return bit_cast<float>(static_cast<uint32_t>(h) << 16); }
inline float from_f16(uint16_t h) {
  const int32_t sign = (h & 0x8000) << 16, magnitude = h & 0x7FFF;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  // float32's exponent has a bias of 127, float16's of 15: 112 more, in the bits from 23 on (0x38000000). Of
  // infinity and NaN all bits of the exponent are set in both, which takes 224 more (0x70000000).
  const int32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 0x70000000 : 0x38000000);
  return bit_cast<float>((magnitude < 0x0400 ? bit_cast<int32_t>(subnormal) : normal) | sign);
}

void load_row(const void* from, int dtype, int64_t K, float* row) {
  const auto* half = static_cast<const uint16_t*>(from);
  if (dtype == F32)
    std::memcpy(row, from, K * sizeof *row);
  else if (dtype == BF16)
    for (int64_t k = 0; k < K; k++) row[k] = from_bf16(half[k]);
  else
    for (int64_t k = 0; k < K; k++) row[k] = from_f16(half[k]);
}

// The bits of the largest magnitude: as integers, those of infinity and NaN are the largest.
int32_t max_magnitude(const float* row, int64_t K) {
  int32_t m = 0;
  for (int64_t k = 0; k < K; k++) m = std::max(m, bit_cast<int32_t>(row[k]) & 0x7FFFFFFF);
  return m;
}

// --- rotation: each group of a row times a Hadamard matrix, as a butterfly
//
// The matrix is a Kronecker power of a small block. Groups of 16 are multiplied by a matrix of signs; parts
// that are rotated already are then joined, `radix` at a time, until they are as large as the group. For a
// group of 256 and the regular matrix, radix 4:
//
//     16 | 16 | 16 | 16 | 16 | ...    each 16 numbers by the matrix of signs
//     |<-  4 x 16 = 64  ->| ...       join4, span 16: the k-th numbers of four parts become four new ones
//     |<-      4 x 64 = 256       ->| join4, span 64
//
// The square root of the group is divided out once, at the end.

struct Rotation {
  int64_t group;  // numbers that are rotated together; 0: none
  // [16, 16]: the matrix of 16 numbers; of a smaller group, its matrix several times along the diagonal
  const float* signs;
  int64_t radix;  // how many parts are joined at a time: 4 for the regular matrix, 2 for Sylvester's
  float norm;     // 1 / sqrt(group)
};

// Each 16 numbers times the matrix of signs
void rotate_lanes(float* row, int64_t K, const float* signs) {
  // a vector type stays in registers where a loop over 16 sums would not
  typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
  Lanes matrix[LANES];
  std::memcpy(matrix, signs, sizeof matrix);
  for (int64_t start = 0; start < K; start += LANES) {
    Lanes sum = {};
    for (int64_t i = 0; i < LANES; i++) sum += row[start + i] * matrix[i];
    std::memcpy(row + start, &sum, sizeof sum);
  }
}

// Join four parts of `span` numbers by the rows (+ + + -), (+ + - +), (+ - + +), (- + + +)
void join4(float* x, int64_t span) {
  for (int64_t k = 0; k < span; k++) {
    const float a = x[k], b = x[k + span], c = x[k + 2 * span], d = x[k + 3 * span];
    const float sum = a + b, difference = a - b, sum2 = c + d, difference2 = c - d;
    x[k] = sum + difference2;
    x[k + span] = sum - difference2;
    x[k + 2 * span] = sum2 + difference;
    x[k + 3 * span] = sum2 - difference;
  }
}
// Join two parts of `span` numbers by the rows (+ +), (+ -)
void join2(float* x, int64_t span) {
  for (int64_t k = 0; k < span; k++) {
    const float a = x[k], b = x[k + span];
    x[k] = a + b;
    x[k + span] = a - b;
  }
}

void rotate_row(float* row, int64_t K, const Rotation& by) {
  rotate_lanes(row, K, by.signs);
  for (int64_t span = LANES; span < by.group; span *= by.radix)
    for (int64_t start = 0; start < K; start += by.radix * span)
      if (by.radix == 4)
        join4(row + start, span);
      else
        join2(row + start, span);
  for (int64_t k = 0; k < K; k++) row[k] *= by.norm;
}

// --- one row to int8

// 16 numbers to integers; adds to the sums of squares of the numbers and of their errors, and counts the
// largest integers
inline void round_lanes(const float* x, float scale, int8_t* q, float* signal, float* noise,
                        int32_t* saturated) {
  for (int64_t j = 0; j < LANES; j++) {
    const float shifted = x[j] / scale + ROUND;
    const float rounded = shifted - ROUND;
    const int32_t code = bit_cast<int32_t>(shifted) - ROUND_BITS;
    const float error = x[j] - rounded * scale;
    q[j] = static_cast<int8_t>(code);
    signal[j] += x[j] * x[j];
    noise[j] += error * error;
    saturated[j] += (code == 127) | (code == -127);
  }
}

// row [K] -> q [K] and the three sums; returns the scale
float round_row(const float* row, int64_t K, int32_t magnitude, int8_t* q, double* sums) {
  const float scale = std::max(bit_cast<float>(magnitude) / 127.0f, TINY);
  sums[0] = sums[1] = sums[2] = 0.0;
  for (int64_t block = 0; block < K; block += SUM_BLOCK) {
    float signal[LANES] = {}, noise[LANES] = {};
    int32_t saturated[LANES] = {};
    const int64_t end = std::min(K, block + SUM_BLOCK), whole = block + (end - block) / LANES * LANES;
    for (int64_t k = block; k < whole; k += LANES)
      round_lanes(row + k, scale, q + k, signal, noise, saturated);
    if (whole < end) {  // behind the row there are zeros
      int8_t last[LANES];
      round_lanes(row + whole, scale, last, signal, noise, saturated);
      std::memcpy(q + whole, last, end - whole);
    }
    for (int64_t j = 0; j < LANES; j++) {
      sums[0] += signal[j];
      sums[1] += noise[j];
      sums[2] += saturated[j];
    }
  }
  return scale;
}

}  // namespace

// x [M, K] -> q int8 [M, K], scale [M], and of each row its sum of squares, that of its errors, and how many
// integers are +-127: sums [M, 3]. Each row is divided by `factor` [K] (null: not), then rotated. Returns the
// number of rows with NaN or infinity, whose integers mean nothing; OUT_OF_MEMORY: see
// common.h.
extern "C" int64_t int8run_quantize_weight_rows(const void* x, int dtype, int64_t M, int64_t K,
                                                const float* factor, int64_t group, const float* signs,
                                                int64_t radix, float norm, int8_t* q, float* scale,
                                                double* sums, int threads) {
  const int64_t size = dtype == F32 ? 4 : 2;
  int64_t refused = 0;
  MemoryGuard memory;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : refused)
  {
    std::vector<float> buffer;
    memory.run([&] { buffer.resize(round_up(K, LANES)); });
    float* row = buffer.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < M; i++) {
      if (memory.has_failed()) continue;
      load_row(static_cast<const char*>(x) + i * K * size, dtype, K, row);
      // after each row: in the rotation, NaN reaches what is behind it
      std::fill(row + K, row + buffer.size(), 0.0f);
      int32_t magnitude = max_magnitude(row, K);
      bool finite = magnitude < INFINITE;
      if (factor)
        for (int64_t k = 0; k < K; k++) row[k] /= factor[k];
      if (group) rotate_row(row, K, {group, signs, radix, norm});
      if (factor || group) {
        magnitude = max_magnitude(row, K);
        finite &= magnitude < INFINITE;
      }
      refused += !finite;
      scale[i] = round_row(row, K, magnitude, q + i * K, sums + 3 * i);
    }
  }
  return memory.has_failed() ? OUT_OF_MEMORY : refused;
}
