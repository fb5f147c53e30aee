// Attention for Arm with i8mm.

#include "set_i8mm.h"

#include "attention_products.h"
#include "attention.h"
