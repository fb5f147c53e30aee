// What all parts of the CPU kernels use.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
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

// What functions of the C interface return; library.py checks it
enum Status { DONE = 0, OUT_OF_MEMORY = -1 };

// Memory that runs out in a parallel region: an exception that left it would end the process. It is kept here, and
// thrown again behind the region.
class MemoryGuard {
 public:
  template <class F>
  void run(F f) {
    try {
      f();
    } catch (const std::bad_alloc&) {
      failed_.store(true, std::memory_order_relaxed);
    }
  }
  // Whether any thread has run out of memory: there is no use in what is left to do
  bool has_failed() const { return failed_.load(std::memory_order_relaxed); }
  void rethrow() const {
    if (has_failed()) throw std::bad_alloc();
  }

 private:
  std::atomic<bool> failed_{false};
};

// The body of a function of the C interface, which no exception may leave
template <class F>
int report_status(F f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return DONE;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
