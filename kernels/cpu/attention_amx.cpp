// Attention for AMX.

#include "amx_unit.h"
#include "operands_amx.h"
#include "vectors_avx512.h"

#include "amx_attention_products.h"
#include "attention.h"
