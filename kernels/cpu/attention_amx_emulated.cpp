// The loops of attention_amx.cpp over emulated tiles, for tests on CPUs without AMX.

#include "vectors_avx2.h"
#include "operands_amx.h"
#include "amx_emulated_unit.h"

#include "amx_attention_products.h"
#include "attention.h"
