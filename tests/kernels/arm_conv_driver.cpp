// Runs the kernels of a convolution on what a file holds, for test_cpu_conv_arm.py, which writes it and reads the
// results.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" {
int int8run_group_norm(const int64_t*, const int64_t*, float*, float*, int);
int int8run_quantize_pixels(const int64_t*, uint8_t*, float*, float*, int);
int int8run_conv(const int64_t*, const uint8_t*, const float*, const float*, int64_t, int64_t, const int8_t*,
                 const float*, const float*, void*, int64_t, int, int);
}

// As the test writes it; images as they lie in x are first
struct Header {
  int64_t dtype, images, C, plane, image_stride, channel_stride, pixel_stride, rotation, sylvester, silu;
  int64_t norm_groups, N, output_pixels;
  int64_t geometry[16];
};

std::vector<char> read_field(std::FILE* file) {
  int64_t size = 0;
  if (std::fread(&size, sizeof size, 1, file) != 1) return {};
  std::vector<char> bytes(size);
  if (size && std::fread(bytes.data(), size, 1, file) != 1) return {};
  return bytes;
}

int64_t address(const void* p) { return reinterpret_cast<int64_t>(p); }

int main(int, char** arguments) {
  std::FILE* in = std::fopen(arguments[1], "rb");
  std::FILE* out = std::fopen(arguments[2], "wb");
  int64_t count;
  if (!in || !out || std::fread(&count, sizeof count, 1, in) != 1) return 1;
  for (; count; count--) {
    Header h;
    if (std::fread(&h, sizeof h, 1, in) != 1) return 1;
    const std::vector<char> x = read_field(in), packed = read_field(in), w_scale = read_field(in), bias = read_field(in);
    const int64_t pixels = h.images * h.plane;
    std::vector<uint8_t> q(pixels * ((h.C + 3) / 4 * 4)), y(h.output_pixels * h.N * (h.dtype ? 2 : 4));
    std::vector<float> scale(pixels), center(pixels);
    std::vector<float> factor(h.images * h.C), shift(h.images * h.C);
    // a PixelsInput and a GroupNorm without weights
    int64_t pixels_in[] = {address(x.data()), h.dtype, h.images, h.C, h.plane, h.image_stride, h.channel_stride,
                           h.pixel_stride, 0, 0, h.C, h.silu, h.rotation, h.sylvester};
    int64_t norm[] = {h.norm_groups, 0, 0, 0};
    const double eps = 1e-5;
    std::memcpy(norm + 3, &eps, sizeof eps);
    int status = 0;
    if (h.norm_groups) {
      status = int8run_group_norm(pixels_in, norm, factor.data(), shift.data(), 1);
      pixels_in[8] = address(factor.data());
      pixels_in[9] = address(shift.data());
    }
    if (status) return 1;
    status = int8run_quantize_pixels(pixels_in, q.data(), scale.data(), center.data(), 1);
    if (status) return 1;
    const auto* biases = bias.empty() ? nullptr : reinterpret_cast<const float*>(bias.data());
    status = int8run_conv(h.geometry, q.data(), scale.data(), center.data(), h.C, h.N,
                          reinterpret_cast<const int8_t*>(packed.data()),
                          reinterpret_cast<const float*>(w_scale.data()), biases, y.data(), h.N, h.dtype, 1);
    if (status) return 1;
    std::fwrite(y.data(), 1, y.size(), out);
  }
  return std::fclose(out);
}
