// The convolution for Arm with i8mm.

#include "set_i8mm.h"

#include "conv_tiles.h"
#include "conv.h"
