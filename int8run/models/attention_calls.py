"""How the models of diffusers compute attention: by `F.scaled_dot_product_attention`, in whichever class.

Newer processors ask diffusers' dispatch, whose backend `native` calls that function; older ones, and models
with classes of their own, call it themselves. `generate.capture_attention` watches these calls, and
`layers.int8_attention` answers them. No class of a model is named here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from int8run.errors import BackendError, suggest_similar
from int8run.utils.attention_call import AttentionCall
from int8run.utils.text import shorten_error

ATTENTION_FUNCTION = F.scaled_dot_product_attention
# where diffusers keeps the backend of one module's dispatch: on its processor, or on the module itself
DISPATCH_ATTRIBUTE = "_attention_backend"
# what processors call to rotate queries and keys by the angles of their tokens
ROTARY_FUNCTION = apply_rotary_emb


def find_attention_obstacle(name: str) -> str | None:
    """Why diffusers has no attention of a name on this machine; None: it has, or its own check will tell.

    Nothing is downloaded.

    Args:
        name: `attention=` of the config.
    """
    known = [backend.value for backend in AttentionBackendName]
    if name.lower() not in known:
        return f"{suggest_similar(name, known)}diffusers has {', '.join(sorted(known))}"
    # diffusers' own, which it calls when a model gets the backend
    check = getattr(attention_dispatch, "_check_attention_backend_requirements", None)
    if check is None:
        return None
    try:
        check(AttentionBackendName(name.lower()))
    except RuntimeError as error:
        return shorten_error(error)
    return None


def list_dispatch_owners(module: nn.Module) -> list[Any]:
    """The objects of one module that say which backend diffusers' dispatch takes for it; none or one."""
    owners = (module, getattr(module, "processor", None))
    return [owner for owner in owners if hasattr(owner, DISPATCH_ATTRIBUTE)]


def use_native_attention(module: nn.Module) -> None:
    """Let the dispatch of one module call ATTENTION_FUNCTION, whatever `attention=` or an environment says.

    Args:
        module: its processor is changed in place, not those of modules inside it.
    """
    for owner in list_dispatch_owners(module):
        setattr(owner, DISPATCH_ATTRIBUTE, AttentionBackendName.NATIVE)


@contextmanager
def native_attention(model: nn.Module) -> Iterator[None]:
    """Let every module of a model call ATTENTION_FUNCTION meanwhile.

    Args:
        model: its processors are changed, and changed back.
    """
    changed: list[tuple[Any, Any]] = []
    for module in model.modules():
        for owner in list_dispatch_owners(module):
            changed.append((owner, getattr(owner, DISPATCH_ATTRIBUTE)))
            setattr(owner, DISPATCH_ATTRIBUTE, AttentionBackendName.NATIVE)
    try:
        yield
    finally:
        # the first that is noted of an owner is what it had, where two modules share it
        for owner, before in reversed(changed):
            setattr(owner, DISPATCH_ATTRIBUTE, before)


@contextmanager
def entered_while_running(module: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """Enter a mode whenever the forward of a module runs.

    Args:
        module: does not run inside itself.
        mode: is left when the forward ends, by an error as well.
    """

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        mode.__enter__()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode.__exit__(None, None, None)

    before = module.register_forward_pre_hook(enter)
    after = module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def compute_float_attention(call: AttentionCall, backend: str = "native") -> Tensor:
    """Compute an attention as the float model does.

    Args:
        call: what to compute.
        backend: `attention=` of the config.

    Returns:
        [B, Hq, Lq, Dv]

    Raises:
        BackendError: where that backend does not take such a call.
    """
    if backend == AttentionBackendName.NATIVE.value:
        return ATTENTION_FUNCTION(**call._asdict())
    try:
        result: Tensor = dispatch_attention_fn(
            call.query.transpose(1, 2),  # the dispatch has tokens before heads
            call.key.transpose(1, 2),
            call.value.transpose(1, 2),
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            backend=AttentionBackendName(backend.lower()),
        )
    except ValueError as error:  # a mask, a dtype or a head width that it does not have
        raise BackendError(f"attention={backend}: {shorten_error(error)}") from error
    return result.transpose(1, 2)
