// Attention for AVX-VNNI.

#include "set_avx_vnni.h"

#include "attention_products.h"
#include "attention.h"
