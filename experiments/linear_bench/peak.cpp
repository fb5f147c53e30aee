// The most that a product of an instruction set can reach: its instruction on the sums and weights of a tile, which stay
// in registers. KERNELS is the source of the kernels, as a string; peak.py builds this and times it.

#include KERNELS

#include <cstring>

constexpr int64_t OPERAND_BYTES = 1 << 10;

extern "C" {

// As many operations as were done, products and sums each counted as one. `bytes`: OPERAND_BYTES of any value.
double int8run_multiply_repeatedly(const void* bytes, int64_t times) {
  alignas(64) static uint8_t operands[OPERAND_BYTES];  // at the beginning of a line of the cache
  std::memcpy(operands, bytes, sizeof operands);
#ifdef __AMX_INT8__
  TileUnit unit;
  unroll<8>([&](auto i) INLINED { unit.template load<i>(operands, 64); });
  for (int64_t time = 0; time < times; time++) {
    unit.template multiply<0, 4, 6>();
    unit.template multiply<1, 4, 7>();
    unit.template multiply<2, 5, 6>();
    unit.template multiply<3, 5, 7>();
  }
  return 2.0 * times * PAIR * PAIR * 4 * TILE_STEPS;
#else
  Sums<TILE_ROWS> sums;
  Weights b[TILE_VECTORS];
  unroll<TILE_VECTORS>([&](auto j) INLINED { b[j] = load_weights(reinterpret_cast<int8_t*>(operands) + 64 * j); });
  unroll<TILE_ROWS, TILE_VECTORS>([&](auto i, auto j) INLINED { sums[i][j] = fill_ints(0); });
  for (int64_t time = 0; time < times; time++) {
    asm volatile("" : : : "memory");  // for the compiler, the activations may have changed
    unroll<TILE_ROWS>([&](auto i) INLINED {
      const Four a = broadcast(operands + 64 * i);
      unroll<TILE_VECTORS>([&](auto j) INLINED { sums[i][j] = add_products(sums[i][j], a, b[j]); });
    });
  }
  unroll<TILE_ROWS, TILE_VECTORS>([&](auto i, auto j) INLINED { keep_in_register(sums[i][j]); });
  // four inputs of a column at a time, or two where they are widened
  return 2.0 * times * TILE_ROWS * TILE_VECTORS * 16 * 4 / STEPS_OF_FOUR;
#endif
}
}
