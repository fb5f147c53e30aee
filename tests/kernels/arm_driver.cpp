// Runs the kernels of a linear layer on what a file holds, for test_cpu_arm.py, which writes it and reads the results.

#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" {
int int8run_quantize(const void*, int, int64_t, int64_t, int64_t, const float*, int64_t, int, int64_t, uint8_t*,
                     float*, int);
int int8run_linear(const uint8_t*, const float*, int64_t, int64_t, int64_t, const int8_t*, const float*, const float*,
                   int64_t, const int8_t*, const float*, const int8_t*, const float*, void*, int, int);
}

// A length in bytes and as many bytes; null where there are none
struct Field {
  std::vector<char> bytes;
  explicit Field(std::FILE* file) {
    int64_t size = 0;
    if (std::fread(&size, sizeof size, 1, file) != 1) return;
    bytes.resize(size);
    if (size && std::fread(bytes.data(), size, 1, file) != 1) bytes.clear();
  }
  template <class T>
  const T* get() const {
    return bytes.empty() ? nullptr : reinterpret_cast<const T*>(bytes.data());
  }
};

int main(int, char** arguments) {
  std::FILE* in = std::fopen(arguments[1], "rb");
  std::FILE* out = std::fopen(arguments[2], "wb");
  int64_t count;
  if (!in || !out || std::fread(&count, sizeof count, 1, in) != 1) return 1;
  for (; count; count--) {
    int64_t n[8];  // dtype, M, K, N, rotation, sylvester, gelu_from, rank
    if (std::fread(n, sizeof n, 1, in) != 1) return 1;
    const int64_t dtype = n[0], M = n[1], K = n[2], N = n[3], rank = n[7];
    const Field x(in), factor(in), packed(in), w_scale(in), bias(in), down(in), down_scale(in), up(in), up_scale(in);
    std::vector<uint8_t> q(M * ((K + 3) / 4 * 4)), y(M * N * (dtype ? 2 : 4));
    std::vector<float> scale(M);
    const int quantized = int8run_quantize(x.get<void>(), dtype, M, K, K, factor.get<float>(), n[4], n[5], n[6],
                                           q.data(), scale.data(), 1);
    const int multiplied = int8run_linear(q.data(), scale.data(), M, K, N, packed.get<int8_t>(), w_scale.get<float>(),
                                          bias.get<float>(), rank, down.get<int8_t>(), down_scale.get<float>(),
                                          up.get<int8_t>(), up_scale.get<float>(), y.data(), dtype, 1);
    if (quantized || multiplied) return 1;
    std::fwrite(q.data(), 1, q.size(), out);
    std::fwrite(scale.data(), sizeof(float), scale.size(), out);
    std::fwrite(y.data(), 1, y.size(), out);
  }
  return std::fclose(out);
}
