// The linear layer for AVX-VNNI.

#include "set_avx_vnni.h"

#include "register_tiles.h"
#include "linear.h"
