"""Put INT8 layers into a model: a copy of its module tree, which shares every tensor with the float model.

Called with the layers that `int8run.ptq.quantize` made, once for a run and once for each trial of the mixed
precision search. The float model stays as it was.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from int8run.layers.fused_group_norm import defer_norms
from int8run.layers.fused_norm import install_norms
from int8run.layers.fused_rotary import install_rotary
from int8run.layers.fusion import defer_gelu, share_inputs
from int8run.layers.int8_attention import Int8Attention, install_attention
from int8run.layers.int8_conv import Int8Layer
from int8run.layers.int8_linear import BackendLayer
from int8run.models.family import ModelFamily

log = logging.getLogger(__name__)


def assemble_int8_model(
    model: nn.Module,
    layers: Mapping[str, Int8Layer],
    family: ModelFamily,
    attentions: Mapping[str, Int8Attention] | None = None,
) -> nn.Module:
    """An INT8 model: a copy of the module tree with these layers in it, sharing every tensor with both.

    As the family allows, layers that read the same tensor share its quantization, and a GELU before an INT8
    layer moves into that layer's quantization, as do GroupNorm and SiLU before a convolution. RMSNorms and
    rotary embeddings are computed by the layers' backend, where it can.

    Args:
        model: the float model.
        layers: by the name of the Linear whose place they take.
        family: says which layers share an input and which GELUs can move.
        attentions: what computes attention in INT8, by the name of the module; None: nothing does.
    """
    target = copy_sharing_tensors(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(target.get_submodule(parent), child, copy_sharing_tensors(layer))
    n_saved = share_inputs(target, family.same_input)
    n_moved = sum(defer_gelu(target, gelu) for gelu in family.deferred_gelu)
    n_deferred = defer_norms(target, family.deferred_norms)
    install_attention(target, attentions or {})
    n_norms = install_norms(target)
    n_rotary = install_rotary(target)
    log.debug(
        "layers with the same input share a quantization: %d fewer per step; %d GELUs moved into one; "
        "%d SiLUs moved into a convolution; %d norms and %d rotary embeddings in one pass",
        n_saved,
        n_moved,
        n_deferred,
        n_norms,
        n_rotary,
    )
    return target


# what other programs put on a module to move it to a GPU for its turn: diffusers' hooks and accelerate's,
# which replace its `forward` and hold modules of their own
HOOKS = ("_diffusers_hook", "_hf_hook", "_old_forward")
FORWARD = "forward"


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the same tensors and backends: no memory until layers are replaced.

    Hooks that offload the model are not copied: they would move the modules of the original.
    """
    backends = [m.backend for m in model.modules() if isinstance(m, BackendLayer)]
    shared = [*model.parameters(), *model.buffers(), *backends]
    with hidden_hooks(model):
        # deepcopy takes what its memo holds as copied already
        return copy.deepcopy(model, memo={id(item): item for item in shared})


@contextmanager
def hidden_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks of other programs off every module, and put them back."""
    hidden: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in model.modules():
        attributes = module.__dict__
        if any(name in attributes for name in HOOKS):
            taken = {name: attributes.pop(name) for name in (*HOOKS, FORWARD) if name in attributes}
            hidden.append((module, taken))
    try:
        yield
    finally:
        for module, taken in hidden:
            module.__dict__.update(taken)
