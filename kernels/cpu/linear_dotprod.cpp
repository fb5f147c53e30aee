// The linear layer for Arm with dotprod.

#include "set_dotprod.h"

#include "register_tiles.h"
#include "linear.h"
