// Calls the kernels of a linear layer while C++ has no more memory than for a few allocations, for test_cpu_memory.py.
// Prints how many calls of each function failed until they had enough, and ends with 0 where the results are then
// those of a call with any amount.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

extern "C" {
int int8run_quantize(const void*, int, int64_t, int64_t, int64_t, const float*, int64_t, int, int64_t, uint8_t*,
                     float*, int);
int int8run_linear(const uint8_t*, const float*, int64_t, int64_t, int64_t, const int8_t*, const float*, const float*,
                   int64_t, const int8_t*, const float*, const int8_t*, const float*, void*, int, int);
int int8run_grouped_linear(const uint8_t*, const float*, int64_t, int64_t, int64_t, const int8_t*, const void*, int,
                           const float*, int, int64_t, const float*, const float*, int64_t, const int8_t*, const float*,
                           const int8_t*, const float*, void*, int, int);
}

constexpr int ANY_NUMBER = 1 << 30;
std::atomic<int> allocations_left{ANY_NUMBER};

void* operator new(std::size_t size) {
  if (allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
  void* memory = std::malloc(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

// How many times f fails while it may allocate nothing, once, twice, ...; -1: in another way than it should
template <class F>
int count_failures(F f) {
  for (int allowed = 0;; allowed++) {
    allocations_left = allowed;
    const int status = f();
    allocations_left = ANY_NUMBER;
    if (status == 0) return allowed;
    if (status != -1) return -1;
  }
}

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  // more inputs than a piece of any set, so that sums are kept between pieces
  constexpr int64_t M = 250, K = 9000, N = 70, RANK = 5;
  std::vector<float> x(M * K), w_scale(N, 0.01f), down_scale(RANK, 0.01f), scale(M), y(M * N), expected(M * N);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i * 37 % 101) - 50;
  std::vector<int8_t> packed(2 * (1 + K / 4) * 256), down((1 + K / 4) * 256), up(2 * (1 + 2) * 256);
  for (auto* weights : {&packed, &down, &up})
    for (size_t i = 0; i < weights->size(); i++) (*weights)[i] = static_cast<int8_t>(i * 29 % 113);
  // codes of 4 bits, all in one group for each output
  std::vector<int8_t> codes(2 * (256 + K * 32));
  for (size_t i = 0; i < codes.size(); i++) codes[i] = static_cast<int8_t>(i * 29 % 113);
  std::vector<float> group_scale(2 * 64, 2.5f), levels(16);
  for (int i = 0; i < 16; i++) levels[i] = static_cast<float>(i - 8);
  std::vector<float> expected_of_codes(M * N);
  std::vector<uint8_t> q(M * K);

  auto quantize = [&] {
    return int8run_quantize(x.data(), 0, M, K, K, nullptr, 4, 0, 0, q.data(), scale.data(), threads);
  };
  auto multiply = [&](std::vector<float>& to) {
    return int8run_linear(q.data(), scale.data(), M, K, N, packed.data(), w_scale.data(), nullptr, RANK, down.data(),
                          down_scale.data(), up.data(), w_scale.data(), to.data(), 0, threads);
  };
  auto multiply_codes = [&](std::vector<float>& to) {
    return int8run_grouped_linear(q.data(), scale.data(), M, K, N, codes.data(), group_scale.data(), 0, levels.data(), 4,
                                  K, w_scale.data(), nullptr, 0, nullptr, nullptr, nullptr, nullptr, to.data(), 0,
                                  threads);
  };
  if (quantize() || multiply(expected) || multiply_codes(expected_of_codes)) return 1;
  const std::vector<uint8_t> expected_q = q;
  const int quantize_failures = count_failures(quantize), multiply_failures = count_failures([&] { return multiply(y); });
  const bool is_same = q == expected_q && y == expected;
  const int codes_failures = count_failures([&] { return multiply_codes(y); });
  std::printf("%d %d %d\n", quantize_failures, multiply_failures, codes_failures);
  return !is_same || y != expected_of_codes;
}
