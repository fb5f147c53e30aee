// The linear layer for AVX2 without any VNNI.

#include "set_avx2.h"

#include "register_tiles.h"
#include "linear.h"
