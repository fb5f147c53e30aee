"""Give single modules of a model another forward: a class like their own, under its name, that wraps it.

`fused_norm` and `int8_attention` do so with modules of an INT8 model. The module keeps its tensors and its
attributes, the class that it had is not changed, and so neither are modules of the float model.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import nn

Forward = Callable[..., Any]  # takes the module first, as a function in a class does


def wrap_forward_of(module: nn.Module, base: type, make_forward: Callable[[Forward], Forward]) -> None:
    """Give one module another forward; one that has the base already is left as it is.

    Args:
        module: gets the derived class.
        base: mixed in, so that such modules can be told by `isinstance`; it says what they have in addition.
        make_forward: takes the forward of the module's class and returns the one in its place.
    """
    if isinstance(module, base):
        return
    module_class: Any = type(module)  # mypy takes a class of modules for something without a hash
    module.__class__ = derive_class(module_class, base, make_forward)


@cache
def derive_class(
    module_class: type[nn.Module], base: type, make_forward: Callable[[Forward], Forward]
) -> type[nn.Module]:
    """One class for all modules of a class, so that torch.compile compiles its forward once.

    Args:
        module_class: of the modules.
        base: mixed in.
        make_forward: as in `wrap_forward_of`.
    """
    own_forward = module_class.forward  # a function, which torch.compile follows, unlike one of a class
    forward = wraps(own_forward)(make_forward(own_forward))
    members = {"forward": forward, "__module__": module_class.__module__, "__doc__": module_class.__doc__}
    derived: type[nn.Module] = type(module_class.__name__, (base, module_class), members)
    return derived
