// What the product instruction of an instruction set gives while all of its operands stay in registers: the most that
// a product with it can reach. KERNELS is the source of the kernels, as a string; peak.py builds and times it.

#include KERNELS

extern "C" {

// As many operations as were done, products and sums each counted as one. Operands: 1 KB of any numbers.
double int8run_multiply_registers(const void* operands, int64_t steps) {
#ifdef __AMX_INT8__
  TileUnit unit;
  unroll<8>([&](auto i) INLINED { unit.template zero<i>(); });
  for (int64_t step = 0; step < steps; step++) {
    unit.template multiply<0, 4, 6>();
    unit.template multiply<1, 4, 7>();
    unit.template multiply<2, 5, 6>();
    unit.template multiply<3, 5, 7>();
  }
  return 2.0 * steps * PAIR * PAIR * 4 * TILE_STEPS;
#else
  const auto* weights = static_cast<const int8_t*>(operands);
  Sums<TILE_ROWS> sums;
  Weights b[TILE_VECTORS];
  unroll<TILE_VECTORS>([&](auto j) INLINED { b[j] = load_weights(weights + 64 * j); });
  unroll<TILE_ROWS, TILE_VECTORS>([&](auto i, auto j) INLINED { sums[i][j] = fill_ints(0); });
  Four a = broadcast(static_cast<const uint8_t*>(operands));
  for (int64_t step = 0; step < steps; step++)
    unroll<TILE_ROWS>([&](auto i) INLINED {
      // other activations for each row, for the compiler
#ifdef __aarch64__
      asm volatile("" : "+w"(a));
#else
      asm volatile("" : "+x"(a));
#endif
      unroll<TILE_VECTORS>([&](auto j) INLINED { sums[i][j] = add_products(sums[i][j], a, b[j]); });
    });
  unroll<TILE_ROWS, TILE_VECTORS>([&](auto i, auto j) INLINED { keep_in_register(sums[i][j]); });
  // a step takes four inputs, or two where they are widened
  return 2.0 * steps * TILE_ROWS * TILE_VECTORS * 16 * 4 / STEPS_OF_FOUR;
#endif
}
}
