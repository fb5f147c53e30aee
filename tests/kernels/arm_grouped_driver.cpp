// Runs the product with weights of 4 and 6 bits on what a file holds, for test_cpu_arm.py, which writes it and reads the
// results.

#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" int int8run_grouped_linear(const uint8_t*, const float*, int64_t, int64_t, int64_t, const int8_t*,
                                      const void*, int, const float*, int, int64_t, const float*, const float*,
                                      int64_t, const int8_t*, const float*, const int8_t*, const float*, void*, int,
                                      int);

// A length in bytes and as many bytes
std::vector<char> read_field(std::FILE* file) {
  int64_t size = 0;
  if (std::fread(&size, sizeof size, 1, file) != 1) return {};
  std::vector<char> bytes(size);
  if (std::fread(bytes.data(), 1, size, file) != static_cast<size_t>(size)) bytes.clear();
  return bytes;
}
template <class T>
const T* as(const std::vector<char>& bytes) {
  return reinterpret_cast<const T*>(bytes.data());
}

int main(int, char** arguments) {
  std::FILE* in = std::fopen(arguments[1], "rb");
  std::FILE* out = std::fopen(arguments[2], "wb");
  int64_t count;
  if (!in || !out || std::fread(&count, sizeof count, 1, in) != 1) return 1;
  for (; count; count--) {
    int64_t n[6];  // M, K, N, has_byte_scales, bits, group
    if (std::fread(n, sizeof n, 1, in) != 1) return 1;
    const auto q = read_field(in), x_scale = read_field(in), codes = read_field(in), scale = read_field(in);
    const auto levels = read_field(in), w_scale = read_field(in);
    std::vector<float> y(n[0] * n[2]);
    const int status = int8run_grouped_linear(
        as<uint8_t>(q), as<float>(x_scale), n[0], n[1], n[2], as<int8_t>(codes), as<void>(scale), n[3],
        as<float>(levels), n[4], n[5], as<float>(w_scale), nullptr, 0, nullptr, nullptr, nullptr, nullptr, y.data(), 0,
        1);
    if (status) return 1;
    std::fwrite(y.data(), sizeof(float), y.size(), out);
  }
  return std::fclose(out);
}
