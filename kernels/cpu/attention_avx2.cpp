// Attention for AVX2 without any VNNI.

#include "set_avx2.h"

#include "attention_products.h"
#include "attention.h"
