// The convolution for AVX2 without any VNNI.

#include "set_avx2.h"

#include "conv_tiles.h"
#include "conv.h"
