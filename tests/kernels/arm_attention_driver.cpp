// Runs the attention kernel on what a file holds, for test_cpu_attention_arm.py, which writes it and reads the results.

#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" int int8run_attention(const void*);

// An Attention of attention.h in words of eight bytes, and where the pointers are: q, k, v, output, mask
constexpr int WORDS = 38, OUTPUT = 15;
constexpr int OPERANDS[] = {0, 5, 10, 20};

std::vector<char> read_field(std::FILE* file) {
  int64_t size = 0;
  if (std::fread(&size, sizeof size, 1, file) != 1) return {};
  std::vector<char> bytes(size);
  if (size && std::fread(bytes.data(), size, 1, file) != 1) return {};
  return bytes;
}

int main(int, char** arguments) {
  std::FILE* in = std::fopen(arguments[1], "rb");
  std::FILE* out = std::fopen(arguments[2], "wb");
  int64_t count, output_size;
  if (!in || !out || std::fread(&count, sizeof count, 1, in) != 1) return 1;
  for (; count; count--) {
    int64_t call[WORDS];
    if (std::fread(call, sizeof call, 1, in) != 1 || std::fread(&output_size, sizeof output_size, 1, in) != 1) return 1;
    std::vector<char> operands[4], output(output_size);
    for (int i = 0; i < 4; i++) {
      operands[i] = read_field(in);
      call[OPERANDS[i]] = operands[i].empty() ? 0 : reinterpret_cast<int64_t>(operands[i].data());
    }
    call[OUTPUT] = reinterpret_cast<int64_t>(output.data());
    if (int8run_attention(call)) return 1;
    std::fwrite(output.data(), 1, output.size(), out);
  }
  return std::fclose(out);
}
