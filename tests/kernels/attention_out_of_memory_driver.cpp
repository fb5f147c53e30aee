// Calls the attention kernel while C++ has no more memory than for a few allocations, as out_of_memory_driver.cpp does
// with linear layers. Prints how many calls failed until they had enough.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

extern "C" int int8run_attention(const void*);

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

int main(int, char** arguments) {
  constexpr int64_t HEADS = 2, TOKENS = 400, WIDTH = 20, SIZE = HEADS * TOKENS * WIDTH;
  std::vector<float> q(SIZE), output(SIZE), expected(SIZE);
  for (size_t i = 0; i < q.size(); i++) q[i] = static_cast<float>(i * 37 % 101) / 50 - 1;
  // an Attention of attention.h in words: four operands and no mask, sizes, rotation, no options, threads, scale
  int64_t call[38] = {};
  for (int operand = 0; operand < 4; operand++) {
    int64_t* words = call + 5 * operand;
    words[0] = reinterpret_cast<int64_t>(operand < 3 ? q.data() : output.data());
    words[2] = SIZE, words[3] = TOKENS * WIDTH, words[4] = WIDTH;
  }
  const int64_t rest[] = {1, HEADS, HEADS, TOKENS, TOKENS, WIDTH, WIDTH, 4, 0, 1, std::atoi(arguments[1])};
  std::memcpy(call + 26, rest, sizeof rest);
  const double scale = 0.2;
  std::memcpy(call + 37, &scale, sizeof scale);

  if (int8run_attention(call)) return 1;
  expected = output;
  for (int allowed = 0;; allowed++) {
    allocations_left = allowed;
    const int status = int8run_attention(call);
    allocations_left = ANY_NUMBER;
    if (status != 0 && status != -1) return 1;
    if (status == 0) {
      std::printf("%d\n", allowed);
      return output != expected;
    }
  }
}
