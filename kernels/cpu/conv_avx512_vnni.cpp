// The convolution for AVX512-VNNI.

#include "set_avx512_vnni.h"

#include "conv_tiles.h"
#include "conv.h"
