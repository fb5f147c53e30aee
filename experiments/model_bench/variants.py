"""Every variant of the CPU table.

One small function each, from a model and its call to the model that is timed.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import flux
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "linear_bench"))
from case import Case
from methods import make_sdnq, make_sdnq_environment
from toolkit import GROUP, ToolkitLinear

BACKENDS = ("reference", "torch_int_mm", "onednn", "vnni", "auto")


@dataclass(frozen=True)
class Variant:
    """How a model is made.

    `compile` puts the whole of it through Inductor, `env` is its process's environment.
    """

    build: Callable[[nn.Module, Mapping[str, Any], str], nn.Module]
    compile: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


def keep_float(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """The base of all ratios."""
    return model


def replace_linears(model: nn.Module, names: list[str], make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Put `make(linear)` in the place of each named Linear."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))
    return model


def quantize_with_torchao(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """torchao's W8A8 on the same layers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    names = set(flux.list_int8_layers(model, layers))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name in names)
    return model


def sdnq_layers(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """sdnq on the same layers, one at a time: its own name patterns also match others."""
    return replace_linears(
        model,
        flux.list_int8_layers(model, layers),
        lambda linear: make_sdnq(Case(linear.weight, linear.weight, linear.bias))[0],
    )


def quantize_with_toolkit(
    model: nn.Module, call: Mapping[str, Any], layers: str, group: int = 0
) -> nn.Module:
    """ComfyUI-INT8-Toolkit's torch_int_mm path, restated."""
    return replace_linears(
        model, flux.list_int8_layers(model, layers), lambda linear: ToolkitLinear(linear, group)
    )


def ours(
    model: nn.Module,
    call: Mapping[str, Any],
    layers: str,
    backend: str,
    outlier: str = "none",
    without: Sequence[str] = (),
) -> nn.Module:
    """int8run; backend=auto measures anew instead of reading the user's table."""
    table = [f"backend.table={tempfile.mkdtemp()}/choices.json"] if backend == "auto" else []
    return flux.quantize_with_int8run(model, call, layers, backend, outlier, *table, without=without)


VARIANTS = {
    "fp32 eager": Variant(keep_float),
    "fp32 compiled": Variant(keep_float, compile=True),
    "torchao eager": Variant(quantize_with_torchao),
    "torchao compiled": Variant(quantize_with_torchao, compile=True),
    "sdnq eager": Variant(sdnq_layers, env=make_sdnq_environment("0")),
    "sdnq with its own compile": Variant(sdnq_layers, env=make_sdnq_environment("1")),
    "Toolkit torch_int_mm eager": Variant(quantize_with_toolkit),
    "Toolkit torch_int_mm, hadamard 128 eager": Variant(partial(quantize_with_toolkit, group=GROUP)),
}
for backend in BACKENDS:
    for outlier in ("none", "convrot"):
        label = f"int8run {backend}{'' if outlier == 'none' else ', convrot'}"
        VARIANTS[f"{label} eager"] = Variant(partial(ours, backend=backend, outlier=outlier))
        VARIANTS[f"{label} compiled"] = Variant(partial(ours, backend=backend, outlier=outlier), compile=True)
# what the family's facts are worth: each input quantized by every layer that reads it, GELUs left where
# they are
for name, without in {"no sharing": ["same_input"], "no moved GELU": ["deferred_gelu"]}.items():
    VARIANTS[f"int8run vnni, {name} eager"] = Variant(partial(ours, backend="vnni", without=without))
    VARIANTS[f"int8run vnni, {name} compiled"] = Variant(
        partial(ours, backend="vnni", without=without), compile=True
    )
