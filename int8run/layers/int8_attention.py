"""Attention in INT8, in the place of `F.scaled_dot_product_attention` inside one module of a model.

`install_attention` gives the modules of an INT8 model one each. The module keeps its class's own forward, its
processor and its layers; the call itself is answered here while that forward runs, by a
`torch.overrides.TorchFunctionMode`, which `torch.compile(fullgraph=True)` follows. Nothing is patched, and
the float model, whose modules are other objects, is not changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from int8run.backends.attention import AttentionBackend, AttentionMethod
from int8run.layers.derived_class import Forward, wrap_forward_of
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


def answer_attention(own_forward: Forward) -> Forward:
    """The forward of a module's class, with attention in INT8 while it runs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.int8_attention:
            return own_forward(self, *args, **kwargs)

    return forward


def install_attention(model: nn.Module, attentions: Mapping[str, Int8Attention]) -> None:
    """Let modules of a model compute their attention in INT8.

    Args:
        model: changed in place; its modules and processors must not be those of the float model.
        attentions: by the name of the module.
    """
    for name, attention in attentions.items():
        module = model.get_submodule(name)
        wrap_forward_of(module, AnswersAttention, answer_attention)
        setattr(module, INT8_ATTENTION, attention)
        use_native_attention(module)
