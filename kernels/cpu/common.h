// What all parts of the CPU kernels use.
#pragma once

#include <cstdint>
#include <utility>

#define INLINED __attribute__((always_inline))
#define INLINE static inline INLINED

namespace {

// f(0), f(1), ... f(N - 1) with constants: arrays indexed by them live in registers. Loops that the compiler
// unrolls later do not promise that: GCC 12 then stored every sum at every step.
template <class F, int... I>
INLINE void unroll(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}
template <int N, int M, class F>
INLINE void unroll(F f) {
  unroll<N>([&](auto i) INLINED { unroll<M>([&](auto j) INLINED { f(i, j); }); });
}

constexpr int64_t PANEL = 64;  // output columns of a panel of packed weights

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
