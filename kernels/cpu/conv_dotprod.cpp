// The convolution for Arm with dotprod.

#include "set_dotprod.h"

#include "conv_tiles.h"
#include "conv.h"
