// Attention for Arm with dotprod.

#include "set_dotprod.h"

#include "attention_products.h"
#include "attention.h"
