"""Every variant of the CPU table: a small function each, from a model and its call to what is timed.

All of them take the model in float, the arguments of its call, and which layers become INT8, as
`flux.make_family` takes it. `gpu.py` builds its variants with the same functions.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import flux
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "linear_bench"))
from case import Case
from methods import make_sdnq, make_sdnq_environment
from toolkit import GROUP, ToolkitLinear

from int8run.kernels.cpu.instructions import INSTRUCTION_SETS

BACKENDS = ("reference", "torch_int_mm", "onednn", "cpu", "auto")
WITH_ATTENTION = "int8run cpu, attention too"


@dataclass(frozen=True)
class Variant:
    """How a model is made.

    Args:
        build: from the float model, its call and the choice of layers to the model that is timed.
        compile: put the whole of it through Inductor.
        env: environment variables of its process.
        dtype: of the float model and its input.
    """

    build: Callable[[nn.Module, Mapping[str, Any], str], nn.Module]
    compile: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


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


def quantize_with_sdnq(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """sdnq on the same layers, one at a time: its own name patterns also match others."""

    def quantize_one(linear: nn.Linear) -> nn.Module:
        x = linear.weight  # no input is needed: what is read of it is its device
        return make_sdnq(Case(x, linear.weight, linear.bias))[0]

    return replace_linears(model, flux.list_int8_layers(model, layers), quantize_one)


def quantize_with_toolkit(
    model: nn.Module, call: Mapping[str, Any], layers: str, group: int = 0
) -> nn.Module:
    """ComfyUI-INT8-Toolkit's torch_int_mm path, restated; `group` rotates x and the weight."""
    names = flux.list_int8_layers(model, layers)
    return replace_linears(model, names, lambda linear: ToolkitLinear(linear, group))


def quantize_with_int8run(
    model: nn.Module,
    call: Mapping[str, Any],
    layers: str,
    backend: str,
    outlier: str = "none",
    *overrides: str,
    without: Sequence[str] = (),
) -> nn.Module:
    """int8run; backend=auto measures anew instead of reading the user's table."""
    if backend == "auto":
        overrides = (f"backend.table={tempfile.mkdtemp()}/choices.json", *overrides)
    return flux.quantize_with_int8run(model, call, layers, backend, outlier, *overrides, without=without)


def quantize_with_kernels(
    model: nn.Module, call: Mapping[str, Any], layers: str, instructions: str
) -> nn.Module:
    """int8run's own kernels with one instruction set."""
    override = f"backend.instructions={instructions}"
    return quantize_with_int8run(model, call, layers, "cpu", "none", override)


def quantize_attention_too(model: nn.Module, call: Mapping[str, Any], layers: str) -> nn.Module:
    """int8run's own kernels for the Linears and for every attention."""
    return quantize_with_int8run(model, call, layers, "cpu", "none", "int8.attention=int8")


def add_modes(builds: Mapping[str, Callable[..., nn.Module]], **settings: Any) -> dict[str, Variant]:
    """Each of these as it is and compiled; `settings` are those of a `Variant`."""
    variants = {}
    for name, build in builds.items():
        variants[f"{name} eager"] = Variant(build, **settings)
        variants[f"{name} compiled"] = Variant(build, compile=True, **settings)
    return variants


def list_own_builds() -> dict[str, Callable[..., nn.Module]]:
    """Every backend without and with rotation, and what the family's facts are worth."""
    builds = {}
    for backend in BACKENDS:
        builds[f"int8run {backend}"] = partial(quantize_with_int8run, backend=backend)
        rotated = partial(quantize_with_int8run, backend=backend, outlier="convrot")
        builds[f"int8run {backend}, convrot"] = rotated
    # each input is quantized by every layer that reads it; GELUs are left where they are
    for title, fact in {"no sharing": "same_input", "no moved GELU": "deferred_gelu"}.items():
        build = partial(quantize_with_int8run, backend="cpu", without=[fact])
        builds[f"int8run cpu, {title}"] = build
    builds[WITH_ATTENTION] = quantize_attention_too
    return builds


FLOATS = {**add_modes({"fp32": keep_float}), **add_modes({"bf16": keep_float}, dtype=torch.bfloat16)}
PEERS = {
    **add_modes({"torchao": quantize_with_torchao}),
    "sdnq eager": Variant(quantize_with_sdnq, env=make_sdnq_environment("0")),
    "sdnq with its own compile": Variant(quantize_with_sdnq, env=make_sdnq_environment("1")),
    "sdnq with its own compile, OpenVINO": Variant(
        quantize_with_sdnq, env=make_sdnq_environment("1", openvino="1")
    ),
    "Toolkit torch_int_mm eager": Variant(quantize_with_toolkit),
    "Toolkit torch_int_mm, hadamard 128 eager": Variant(partial(quantize_with_toolkit, group=GROUP)),
}
# by instruction set; those that this CPU has not are listed with the reason
SETS = add_modes(
    {f"int8run cpu, {name}": partial(quantize_with_kernels, instructions=name) for name in INSTRUCTION_SETS}
)
IN_BF16 = add_modes(
    {"int8run cpu in a bf16 model": partial(quantize_with_int8run, backend="cpu")}, dtype=torch.bfloat16
)
VARIANTS = {**FLOATS, **PEERS, **add_modes(list_own_builds()), **SETS, **IN_BF16}
# what `bench.py --table` measures
TABLES = {
    "all": list(VARIANTS),
    "instructions": [*FLOATS, *SETS, *IN_BF16],
    "peers": [
        *FLOATS,
        *PEERS,
        "int8run cpu eager",
        "int8run cpu compiled",
        f"{WITH_ATTENTION} eager",
        f"{WITH_ATTENTION} compiled",
    ],
}
