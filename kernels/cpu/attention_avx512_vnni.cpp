// Attention for AVX512-VNNI.

#include "set_avx512_vnni.h"

#include "attention_products.h"
#include "attention.h"
