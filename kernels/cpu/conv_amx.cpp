// The convolution for CPUs with AMX: tdpbusd on tiles of 16 x 16 sums; all else is AVX512.

#include "amx_unit.h"
#include "operands_amx.h"
#include "vectors_avx512.h"

#include "amx_conv_tiles.h"
#include "conv.h"
