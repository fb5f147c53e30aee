// The convolution for CPUs with AMX, by their AVX512-VNNI. Tiles of AMX hold 64 inputs and pass their sums through
// memory; here that would be at every tap, since each pixel has its own scale.

#include "set_avx512_vnni.h"

#include "conv.h"
