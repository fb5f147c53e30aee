// The loops of attention_amx.cpp over emulated tiles, for CPUs without AMX.

#include "../../kernels/cpu/vectors_avx2.h"
#include "../../kernels/cpu/operands_amx.h"
#include "amx_emulated_unit.h"

#include "../../kernels/cpu/amx_attention_products.h"
#include "../../kernels/cpu/attention.h"
