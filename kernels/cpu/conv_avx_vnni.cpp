// The convolution for AVX-VNNI.

#include "set_avx_vnni.h"

#include "conv_tiles.h"
#include "conv.h"
