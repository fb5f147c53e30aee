// The tile instructions of AMX in plain C++, as the manual describes them: the loops of amx_tiles.h and their
// arithmetic of indices run with it where no CPU has AMX. test_cpu_amx.py compares the results.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../kernels/cpu/common.h"

namespace {

class TileUnit {
 public:
  template <int T>
  void zero() {
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    for (int i = 0; i < 16; i++) std::memcpy(tiles_[T][i], static_cast<const char*>(p) + i * stride, 64);
  }
  template <int T>
  void store(void* p, int64_t stride) {
    for (int i = 0; i < 16; i++) std::memcpy(static_cast<char*>(p) + i * stride, tiles_[T][i], 64);
  }
  template <int SUMS, int A, int B>
  void multiply() {
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 16; j++) {
        uint32_t sum;  // wraps around
        std::memcpy(&sum, tiles_[SUMS][i] + 4 * j, 4);
        for (int k = 0; k < 64; k++)
          sum += static_cast<uint32_t>(tiles_[A][i][k] * static_cast<int8_t>(tiles_[B][k / 4][4 * j + k % 4]));
        std::memcpy(tiles_[SUMS][i] + 4 * j, &sum, 4);
      }
  }

 private:
  uint8_t tiles_[8][16][64];
};

}  // namespace
