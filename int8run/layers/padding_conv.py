"""An INT8 convolution inside a subclass of a convolution that pads its input, or remembers parts of it.

Causal convolutions of video VAEs are such: their `forward` changes the input and calls that of their
base class. The module keeps its class, because its model counts modules of that class; only what the base
class computes is replaced.
"""

import copy
import functools
from typing import Any

from torch import Tensor, nn

from int8run.layers.derived_class import make_picklable
from int8run.layers.int8_conv import Int8Conv

INNER = "int8"  # the name of the INT8 layer in the module


class ConvolvesInside:
    """Computes what a convolution computes by a layer inside it. Comes before the module's own class."""

    int8: Int8Conv

    def _conv_forward(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        """What the forward of the base class calls, with a weight that is not there any more."""
        return self.int8(x)  # type: ignore[no-any-return]


@functools.cache
def make_class(base: Any) -> type[nn.Module]:
    """The class of a convolution with an INT8 layer inside, once for each class.

    Args:
        base: the class of the convolution.
    """
    derived = type(base.__name__, (ConvolvesInside, base), {"__module__": base.__module__})
    make_picklable(derived, make_class, base)
    return derived


def put_inside(conv: nn.Module, layer: Int8Conv) -> nn.Module:
    """A copy of a convolution that computes by an INT8 layer inside it, without a float weight.

    Args:
        conv: a subclass of `nn.Conv2d` or `nn.Conv3d` whose forward calls that of its base.
        layer: the INT8 layer, of the same geometry.
    """
    made = copy.copy(conv)
    base: Any = type(conv)
    made.__class__ = make_class(base)
    # a copy has the dictionaries of the original
    made._parameters = {"weight": None, "bias": None}
    made._buffers = dict(conv._buffers)
    made._modules = {INNER: layer}
    return made
