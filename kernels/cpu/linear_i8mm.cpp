// The linear layer for Arm with i8mm.

#include "set_i8mm.h"

#include "register_tiles.h"
#include "linear.h"
