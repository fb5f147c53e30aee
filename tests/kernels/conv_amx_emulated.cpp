// The loops of conv_amx.cpp over emulated tiles, for CPUs without AMX.

#include "../../kernels/cpu/vectors_avx2.h"
#include "../../kernels/cpu/operands_amx.h"
#include "amx_emulated_unit.h"

#include "../../kernels/cpu/amx_conv_tiles.h"
#include "../../kernels/cpu/conv.h"
