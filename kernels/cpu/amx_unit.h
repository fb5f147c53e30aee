// The tile instructions of AMX. A thread has the unit while such an object lives.
//
// In assembly, since the compilers' intrinsics take the number of a register as a literal only, and GCC 12's do not
// say that they read memory: it left out the stores of a configuration that nothing but ldtilecfg reads.
#pragma once

#include <cstdint>

#include "common.h"

namespace {

// What ldtilecfg reads: eight registers of 16 rows of 64 bytes
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

class TileUnit {
 public:
  TileUnit() {
    const TileConfiguration configuration;
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~TileUnit() { asm volatile("tilerelease"); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

  template <int T>
  INLINED void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  INLINED void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  INLINED void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  // sums += a . b, unsigned by signed bytes
  template <int SUMS, int A, int B>
  INLINED void multiply() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
  }
};

}  // namespace
