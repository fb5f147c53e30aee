"""Attention in INT8, in the place of `F.scaled_dot_product_attention` inside one module of a model.

`install_attention` gives the modules of an INT8 model one each. The module keeps its class's own forward, its
processor and its layers; the call itself is answered here while that forward runs, by a
`torch.overrides.TorchFunctionMode`, which `torch.compile(fullgraph=True)` follows. Nothing is patched, and
the float model, whose modules are other objects, is not changed.
"""

from collections.abc import Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from int8run.backends.attention import AttentionBackend, AttentionMethod
from int8run.models.attention_calls import ATTENTION_FUNCTION, use_native_attention
from int8run.utils.attention_call import AttentionCall

# the attribute of a module that holds what answers its calls
INT8_ATTENTION = "int8_attention"


class Int8Attention(TorchFunctionMode):
    """Answers the attention of one module, and lets every other function of torch be.

    Args:
        backend: computes it.
        method: what is done to queries and keys before they are rounded.
    """

    def __init__(self, backend: AttentionBackend, method: AttentionMethod):
        super().__init__()
        self.backend = backend
        self.method = method

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute an attention in INT8; anything else as torch does."""
        kwargs = kwargs or {}
        if func is ATTENTION_FUNCTION:
            return self.attend(AttentionCall(*args, **kwargs))
        if func is Tensor.unflatten:
            # that method calls `super()`, which torch.compile cannot follow under a mode
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def attend(self, call: AttentionCall) -> Tensor:
        """[B, Hq, Lq, Dv] in the query's dtype."""
        return self.backend.attend(call, self.method)


class AnswersAttention:
    """Mixed into the class of a module: its forward runs with the module's own `Int8Attention`."""

    int8_attention: Int8Attention


@cache
def make_int8_class(module_class: type[nn.Module]) -> type[nn.Module]:
    """A class like that of a module, under its name, whose forward computes attention in INT8.

    Args:
        module_class: of a module that computes attention.
    """

    float_forward = module_class.forward  # a function, which torch.compile follows, unlike one of a class

    @wraps(float_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.int8_attention:
            return float_forward(self, *args, **kwargs)

    members = {"forward": forward, "__module__": module_class.__module__, "__doc__": module_class.__doc__}
    made: type[nn.Module] = type(module_class.__name__, (AnswersAttention, module_class), members)
    return made


def install_attention(model: nn.Module, attentions: Mapping[str, Int8Attention]) -> None:
    """Let modules of a model compute their attention in INT8.

    Args:
        model: changed in place; its modules and processors must not be those of the float model.
        attentions: by the name of the module.
    """
    for name, attention in attentions.items():
        module = model.get_submodule(name)
        if not isinstance(module, AnswersAttention):
            module_class: Any = type(module)
            module.__class__ = make_int8_class(module_class)
        setattr(module, INT8_ATTENTION, attention)
        use_native_attention(module)
