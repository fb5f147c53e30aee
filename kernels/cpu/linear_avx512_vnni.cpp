// The linear layer for AVX512-VNNI.

#include "set_avx512_vnni.h"

#include "register_tiles.h"
#include "linear.h"
