"""Give single modules of a model another forward: a class like their own, under its name, that wraps it.

`fused_norm` and `int8_attention` do so with modules of an INT8 model. The module keeps its tensors and its
attributes, the class that it had is not changed, and so neither are modules of the float model.

A derived class is in no module of Python, by whose name pickle would find it. `make_picklable`, for those
that `fused_rotary` and `padding_conv` make as well, has it made again on loading.
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
    make_picklable(derived, derive_class, module_class, base, make_forward)
    return derived


def make_picklable(derived: Any, make_class: Callable[..., type], *arguments: Any) -> None:
    """Let objects of a derived class be pickled: what is written says how to make the class.

    Args:
        derived: is changed.
        make_class: a function of a module, which made the class.
        arguments: that it was given.
    """

    def reduce_object(self: Any, protocol: Any) -> tuple[Any, ...]:
        # protocols below 2, which nothing uses by default, write the class itself
        reduced: Any = object.__reduce_ex__(self, max(2, protocol))
        state = reduced[2:]
        return (create_empty, (make_class, *arguments), *state)

    derived.__reduce_ex__ = reduce_object


def create_empty(make_class: Callable[..., type], *arguments: Any) -> Any:
    """An object of a derived class, which pickle gives its attributes.

    Args:
        make_class: makes the class.
        arguments: of that function.
    """
    derived: Any = make_class(*arguments)
    return derived.__new__(derived)
