"""Capture the attentions of a denoiser while it runs: which module computes one, and of what.

`pipeline` plans INT8 attention from what is seen here. A module is recognized by what it calls, not by its
class; see `models.attention_calls`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from int8run.models.attention_calls import ATTENTION_FUNCTION, native_attention
from int8run.utils.attention_call import AttentionCall

# what an attention calls that multiplies its matrices itself
SOFTMAX_FUNCTIONS = (torch.softmax, F.softmax, Tensor.softmax)
MIN_SCORE_DIMS = 3  # a softmax over fewer is a choice of experts
OnAttention = Callable[[str, AttentionCall, Tensor], None]


class AttentionWatch(TorchFunctionMode):
    """Hands each attention that is computed under it to a function.

    Args:
        on_attention: called with the name of the innermost module that runs, the arguments and the result.
        on_softmax: called with the name of a module that computes a softmax itself.
    """

    def __init__(self, on_attention: OnAttention, on_softmax: Callable[[str], None]):
        super().__init__()
        self.on_attention = on_attention
        self.on_softmax = on_softmax
        self.running: list[str] = []  # modules, the innermost last

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, as torch hands it over."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.running:
            return result  # of another model, such as a text encoder
        if func is ATTENTION_FUNCTION:
            self.on_attention(self.running[-1], AttentionCall(*args, **kwargs), result)
        elif func in SOFTMAX_FUNCTIONS and result.dim() >= MIN_SCORE_DIMS:
            self.on_softmax(self.running[-1])
        return result


class ZeroAttention(TorchFunctionMode):
    """Answers attention by zeros while a model runs, for who wants shapes alone.

    A watch that is entered later sees the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []  # models that run

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Zeros [B, Hq, Lq, Dv] for an attention; anything else as torch does."""
        kwargs = kwargs or {}
        if func is not ATTENTION_FUNCTION or not self.running:
            return func(*args, **kwargs)
        call = AttentionCall(*args, **kwargs)
        return call.query.new_zeros(*call.query.shape[:-1], call.value.shape[-1])


@contextmanager
def answered_by_zeros(models: Iterable[nn.Module]) -> Iterator[None]:
    """Let the attentions of models be zeros meanwhile: those of a large one take minutes on a CPU.

    Args:
        models: other models that run between them, such as text encoders, compute theirs.
    """
    zeros = ZeroAttention()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for model in models:
            stack.enter_context(native_attention(model))
            stack.enter_context(noted_while_running(model, "", zeros.running))
        stack.enter_context(zeros)
        yield


@contextmanager
def watch_attention(
    denoiser: nn.Module, on_attention: OnAttention, on_softmax: Callable[[str], None] = lambda name: None
) -> Iterator[None]:
    """Hand every attention that a denoiser computes meanwhile to a function.

    Args:
        denoiser: each of its modules calls torch's own attention meanwhile.
        on_attention: called with the name of the module, the arguments and the result.
        on_softmax: called with the name of a module that computes a softmax itself.
    """
    watch = AttentionWatch(on_attention, on_softmax)
    with ExitStack() as stack:
        # a compiled graph would hide the calls
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(native_attention(denoiser))
        for name, module in denoiser.named_modules():
            stack.enter_context(noted_while_running(module, name, watch.running))
        stack.enter_context(watch)
        yield


@contextmanager
def noted_while_running(module: nn.Module, name: str, running: list[str]) -> Iterator[None]:
    """Keep the name of a module at the end of a list while its forward runs."""

    def push(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(name)

    def pop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    before = module.register_forward_pre_hook(push)
    after = module.register_forward_hook(pop, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
