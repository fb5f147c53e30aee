// The W8A8 linear layer for CPUs: quantize rows, multiply, scale. A plain C interface without torch headers;
// `linear.py` makes torch operators of it. The definitions are kernels/quantize_rowwise/reference.py and
// kernels/int8_linear/reference.py.
//
// There is one library for each instruction set, from linear_<name>.cpp, which includes all of these. The packed
// weight, the integers and the scales are the same for all of them, to the bit.
//
//     set_<name>.h         how a product of the set adds, and how large its tiles are
//     vectors_*.h          16 numbers in registers
//     operands_*.h         rows and weights as the product reads them
//     register_products.h  the sums of a tile in registers
//     row_pairs.h          the same by Arm's matrix instruction, two rows at a time
//     product.h            the parts of a product
//     grouped.h            weights of 4 and 6 bits, decoded to the panels drawn below
//     *_tiles.h            a block of the product
//     quantize.h           rows to bytes
//     norm.h, rotary.h     the norm of rows, and their rotary embedding
//     linear.h             the layout, the loop over blocks, the C interface
//
// Shapes: M rows (tokens), K input columns, N output columns.
//
//
// Compensation for unsigned activations
//
// The product instruction vpdpbusd adds four products of unsigned by signed bytes to each 32-bit sum:
//
//     sum += u0 * s0 + u1 * s1 + u2 * s2 + u3 * s3          u: unsigned, s: signed
//
// AVX512-VNNI and AVX-VNNI have no such instruction for signed by signed bytes; AMX has one (tdpbssd), and takes
// the same layout as they do, for the same bits. Weights are signed, so they are s.
// Activations q are signed as well (-127..127), so that u = q + 128 (1..255) is stored in their place, and
// what that adds is taken off again:
//
//     sum_k u[k] w[k]  =  sum_k (q[k] + 128) w[k]
//                      =  sum_k q[k] w[k]  +  128 * sum_k w[k]
//                                             ----------------
//                                             compensation of the output column
//
//     for K = 2:   q = (-3, 100)   u = (125, 228)   w = (5, -7)
//                  125 * 5 - 228 * 7 = -971         128 * (5 - 7) = -256         -971 + 256 = -715
//                                                                                -3 * 5 - 100 * 7 = -715
//
// The compensation does not depend on the activations. It is computed once, when the weight is packed, and
// subtracted once, when a column's sum is complete. vpdpbusd wraps around at 32 bits and does not saturate
// (its sibling vpdpbusds does). So sums of u w may exceed 32 bits: the subtraction wraps back, as long as the
// sum of q w fits, and whoever calls this sees to that (at most 132,104 columns: 2^31 / (128 * 127)).
//
// Beyond K, packed weights are 0, so that whatever stands in the activations there adds nothing.
//
//
// Packed weight: int8 [ceil(N / 64)][1 + ceil(K / 4)][256 bytes], a panel for each 64 output columns.
//
//              column 0        column 1               column 63
//            +---------------+---------------+-----+---------------+
//     row 0  |  int32: 128 * sum_k w[k]      | ... |               |   compensations
//            +---------------+---------------+-----+---------------+
//     row 1  |  w0 w1 w2 w3  |  w0 w1 w2 w3  | ... |  w0 w1 w2 w3  |   k = 0 .. 3
//            +---------------+---------------+-----+---------------+
//     row 2  |  w4 w5 w6 w7  |  w4 w5 w6 w7  | ... |  w4 w5 w6 w7  |   k = 4 .. 7
//            +---------------+---------------+-----+---------------+
//       ...    4 bytes         4 bytes               4 bytes           beyond N and K: 0
//
// A row of 256 bytes is four registers of 16 columns (eight of 8, sixteen of 4). One step of the product
// broadcasts four activations u[4k] .. u[4k+3] to all places of a register and multiplies it by each of these: no
// shuffles, and each panel is read from its beginning to its end. 16 rows of 64 bytes, 256 bytes apart, are also
// what AMX takes as a tile of weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "norm.h"
#include "product.h"
#include "quantize.h"
#include "rotary.h"

namespace {

// Rows `row` .. `end` as the product reads them
Rows prepare_block(const Quantized& x, int64_t row, int64_t end, Buffer& buffer) {
  return prepare_rows(x.q + row * x.stride, x.stride, end - row, x.stride, buffer);
}

// Rows that share a pass over the weights: more where these have to be decoded at each pass
INLINE int64_t get_row_block(const Weight& w) { return w.groups.levels ? DECODED_BLOCKS * ROW_BLOCK : ROW_BLOCK; }

// One block of rows by the panels from `first` to `last`
template <class Y>
void compute_task(const Product& p, int64_t block, int64_t first, int64_t last, int64_t k_block, Workspace& space) {
  const int64_t row_block = get_row_block(p.w);
  if (k_block < p.w.steps && !space.sums) space.sums.reset(new int32_t[row_block * PANEL]);
  const int64_t row = block * row_block, end = std::min(p.M, row + row_block);
  const Rows x = prepare_block(p.x, row, end, space.x);
  const Rows t = p.t.q ? prepare_block(p.t, row, end, space.t) : Rows{};
  for (int64_t panel = first; panel < last; panel++)
    compute_block<Y>(p, {row, end, panel, x, t, Panel{}}, k_block, space);
  finish_blocks<Y>(p, space);
}

// The whole product. A task is one block of rows by some neighboring panels; threads take tasks as they come.
//
//     for each task (block of rows, panels of a chunk)
//       for each panel of the chunk                    its weights come from memory once for the block
//         for each piece of K                          one piece where K <= 2 * K_BLOCK
//           for each tile of the block                 activations of the block stay in L2
template <class Y>
void multiply(const Product& p, int threads) {
  if (p.M == 0) return;
  const int64_t panels = ceil_div(p.N, PANEL), blocks = ceil_div(p.M, get_row_block(p.w));
  const int64_t k_block = p.w.steps > 2 * K_BLOCK / 4 ? K_BLOCK / 4 : p.w.steps;
  // enough tasks for every thread to end at about the same time, few enough that a row block stays in cache
  // over many panels
  const int64_t chunks = std::clamp<int64_t>(ceil_div(8 * threads, blocks), 1, panels);
  const int64_t width = ceil_div(panels, chunks);  // panels of a chunk
  const int64_t tasks = blocks * ceil_div(panels, width);
  MemoryGuard memory;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Workspace space;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      if (memory.has_failed()) continue;
      const int64_t block = task % blocks, first = task / blocks * width;
      memory.run([&] { compute_task<Y>(p, block, first, std::min(panels, first + width), k_block, space); });
    }
  }
  memory.rethrow();
}

void multiply(const Product& p, int dtype, int threads) {
  switch (dtype) {
    case BF16: return multiply<BFloat16>(p, threads);
    case F16: return multiply<Float16>(p, threads);
    default: return multiply<Float32>(p, threads);
  }
}

void quantize_rows(const RowsInput& in, int dtype, uint8_t* q, int64_t q_stride, float* scale, int threads) {
  switch (dtype) {
    case BF16: return quantize_rows<BFloat16>(in, q, q_stride, scale, threads);
    case F16: return quantize_rows<Float16>(in, q, q_stride, scale, threads);
    default: return quantize_rows<Float32>(in, q, q_stride, scale, threads);
  }
}

// A low-rank branch before its rows are known
struct Branch {
  int64_t rank;
  Weight down, up;
};

// y = x . w + branch, see int8run_linear
void multiply_with_branch(Product p, const Branch& branch, int dtype, int threads) {
  // x . down, float32 [M, rank], as a product of its own
  const int64_t M = p.M, rank = branch.rank;
  const Quantized no_rows{nullptr, 0, nullptr};
  const Weight no_weight{nullptr, nullptr, 0};
  std::unique_ptr<float[]> t(new float[M * rank]);
  multiply({p.x, branch.down, nullptr, no_rows, no_weight, t.get(), M, rank}, F32, threads);

  // its rows as bytes, as x itself is
  const int64_t t_stride = round_up(rank, 4);
  std::unique_ptr<uint8_t[]> t_q(new uint8_t[M * t_stride]);
  std::unique_ptr<float[]> t_scale(new float[M]);
  const RowsInput t_rows{t.get(), M, rank, /* stride */ rank, /* factor */ nullptr,
                         /* rotation */ 0, /* sylvester */ false, /* gelu_from */ -1};
  quantize_rows(t_rows, F32, t_q.get(), t_stride, t_scale.get(), threads);

  p.t = {t_q.get(), t_stride, t_scale.get()};
  p.up = branch.up;
  multiply(p, dtype, threads);
}

// A layer with or without a branch (rank 0). Returns a Status.
int multiply_layer(const Quantized& x, const Weight& weight, const float* bias, const Branch& branch, void* y,
                   int64_t M, int64_t N, int dtype, int threads) {
  const Quantized no_rows{nullptr, 0, nullptr};
  const Weight no_weight{nullptr, nullptr, 0};
  const Product product{x, weight, bias, no_rows, no_weight, y, M, N};
  return report_status([&] {
    if (branch.rank)
      multiply_with_branch(product, branch, dtype, threads);
    else
      multiply(product, dtype, threads);
  });
}

}  // namespace

// All return a Status
extern "C" {

// x [M, K] with `stride` -> q + 128: uint8 [M, round_up(K, 4)], scale [M]. In this order: GELU on columns >=
// gelu_from (-1: none), factor [K] (or null), rotation in groups of `rotation` that divide K (0: none), by
// Sylvester's Hadamard matrix (2, 4, 8, 16, ...) or else by the regular one (4, 16, 64, 256, ...).
int int8run_quantize(const void* x, int dtype, int64_t M, int64_t K, int64_t stride, const float* factor,
                     int64_t rotation, int sylvester, int64_t gelu_from, uint8_t* q, float* scale, int threads) {
  const RowsInput rows{x, M, K, stride, factor, rotation, sylvester != 0, gelu_from};
  return report_status([&] { quantize_rows(rows, dtype, q, round_up(K, 4), scale, threads); });
}

// y [M, N] = q . w * w_scale * x_scale + bias + low-rank branch; q and x_scale as int8run_quantize writes
// them. Branch (rank 0: none): t = q . down * down_scale * x_scale * strengths, quantized per row, then t .
// up * up_scale on top.
int int8run_linear(const uint8_t* q, const float* x_scale, int64_t M, int64_t K, int64_t N, const int8_t* packed,
                   const float* w_scale, const float* bias, int64_t rank, const int8_t* down,
                   const float* down_scale, const int8_t* up, const float* up_scale, void* y, int dtype,
                   int threads) {
  const Quantized x{q, round_up(K, 4), x_scale};
  const Weight weight{packed, w_scale, ceil_div(K, 4)};
  const Branch branch{rank, {down, down_scale, weight.steps}, {up, up_scale, ceil_div(rank, 4)}};
  return multiply_layer(x, weight, bias, branch, y, M, N, dtype, threads);
}

// The same with a weight of 4 or 6 bits in groups of `group` inputs, as grouped.h draws it; levels: float32 [16].
int int8run_grouped_linear(const uint8_t* q, const float* x_scale, int64_t M, int64_t K, int64_t N,
                           const int8_t* codes, const void* group_scale, int has_byte_scales, const float* levels,
                           int bits, int64_t group, const float* w_scale, const float* bias, int64_t rank,
                           const int8_t* down, const float* down_scale, const int8_t* up, const float* up_scale,
                           void* y, int dtype, int threads) {
  const Quantized x{q, round_up(K, 4), x_scale};
  const Groups groups{group_scale, levels, group / 4, bits, has_byte_scales != 0};
  const Weight weight{codes, w_scale, ceil_div(K, 4), groups};
  const Branch branch{rank, {down, down_scale, weight.steps}, {up, up_scale, ceil_div(rank, 4)}};
  return multiply_layer(x, weight, bias, branch, y, M, N, dtype, threads);
}
}
