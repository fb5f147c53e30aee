"""What INT8 reaches in each family's denoiser at full size.

One forward on torch's meta device, where nothing is computed or stored.
"""

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from meta_forward import run_on_meta
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from int8run.backends.attention import CpuAttention
from int8run.layers.plan import CONV, plan_layers
from int8run.models.denoiser_classes import get_denoiser_class
from int8run.models.family import load_families

HERE = Path(__file__).parent
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
INT8_CONVOLUTION = "convolution in INT8"  # counted twice, and taken out again


@dataclass(frozen=True)
class Shares:
    """Numbers of one model.

    Args:
        linears: INT8 and float Linears.
        parameters: weights of INT8 Linears, float Linears, convolutions, and all others.
        work: multiply-adds of the same, and of attention's two products.
        int8_convolutions: multiply-adds of those that int8.convolutions=int8 makes INT8.
        int8_attention: multiply-adds of those that int8.attention=int8 makes INT8.
    """

    linears: Counter
    parameters: Counter
    work: Counter
    int8_convolutions: int
    int8_attention: int

    @property
    def whole(self) -> int:
        """Multiply-adds in INT8 with everything that can be."""
        return self.work["int8"] + self.int8_convolutions + self.int8_attention


class AttentionCounter(TorchFunctionMode):
    """Counts the multiply-adds of attention that INT8 kernels take, by the widths of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count, and do what `func` does."""
        if func is F.scaled_dot_product_attention:
            self.count(**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def count(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> None:
        """Count one call. query: [..., Lq, D], key: [..., Lk, D], value: [..., Lk, Dv]."""
        widths = query.shape[-1], value.shape[-1]
        if CpuAttention().unsupported_width_reason(*widths) is None:
            self.macs += query.shape[:-1].numel() * key.shape[-2] * sum(widths)


def make_argument(value: Any) -> Any:
    """A forward's argument from its YAML: "1x77x768" and "1 int64" are tensors on the meta device."""
    if isinstance(value, dict):
        return {key: make_argument(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [make_argument(inner) for inner in value]
    if not isinstance(value, str):
        return value
    shape, _, dtype = value.partition(" ")
    return torch.empty(
        [int(n) for n in shape.split("x")], dtype=getattr(torch, dtype or "float32"), device="meta"
    )


def macs_of(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Multiply-adds of a Linear, rows x K x N, or of a convolution."""
    if isinstance(module, nn.Linear):
        return inputs[0].numel() * module.out_features
    per_output = module.in_channels // module.groups * math.prod(module.kernel_size)
    return output.numel() * per_output


def count_shares(entry: Mapping[str, Any]) -> Shares:
    """Build one model on the meta device, call it once, and count."""
    with torch.device("meta"):
        model = get_denoiser_class(entry["class"])(**entry["config"]).eval()
    # torch follows gradients into modules as it counts, with no_grad as well
    model.requires_grad_(False)
    linears = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    family = load_families()[entry["family"]]
    assert not family.find_input_mismatch(linears), family.find_input_mismatch(linears)
    kinds = {name: "float" if family.find_skip_reason(name) else "int8" for name in linears}
    kinds |= {name: "convolution" for name, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
    plans = plan_layers(model, family.find_skip_reason, convolutions="int8")
    int8_names = {plan.name for plan in plans if plan.kind == CONV and plan.skip_reason is None}
    work: Counter = Counter()
    for name, kind in kinds.items():

        def count(module, inputs, output, kind=kind, name=name):
            macs = macs_of(module, inputs, output)
            work.update({kind: macs})
            if name in int8_names:
                work.update({INT8_CONVOLUTION: macs})

        model.get_submodule(name).register_forward_hook(count)
    counter = AttentionCounter()
    with run_on_meta(), FlopCounterMode(display=False) as flops, counter, torch.no_grad():
        model(**make_argument(entry["inputs"]), return_dict=False)
    int8_convolutions = work.pop(INT8_CONVOLUTION, 0)
    # attention is what torch counts besides; two operations are one multiply-add
    work["attention"] = flops.get_total_flops() // 2 - work.total()
    parameters = Counter(dict.fromkeys(("int8", "float", "convolution"), 0))
    for name, kind in kinds.items():
        parameters[kind] += sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False))
    parameters["other"] = sum(p.numel() for p in model.parameters()) - parameters.total()
    return Shares(Counter(kinds.values()), parameters, work, int8_convolutions, counter.macs)


def format_percent(part: float, whole: float) -> str:
    """A share as the table has it."""
    return f"{100 * part / whole:.1f}"


def format_row(entry: Mapping[str, Any]) -> str:
    """The model's row of the table."""
    found = count_shares(entry)
    work, matrices = found.work, found.work.total() - found.work["attention"]
    cells = [
        entry["family"],
        entry["model"],
        entry["size"],
        f"{found.linears['int8']} / {found.linears['float']}",
        f"{found.parameters.total() / 1e9:.2f}",
        format_percent(found.parameters["int8"], found.parameters.total()),
        f"{work.total() / 1e12:.2f}",
        format_percent(work["int8"], matrices),
        format_percent(work["float"], matrices),
        format_percent(work["convolution"], matrices),
        format_percent(work["attention"], work.total()),
        format_percent(work["int8"], work.total()),
        format_percent(found.whole, work.total()),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| family | model | at | Linears INT8 / float | parameters, 10⁹ | in INT8, % | multiply-adds, 10¹² "
    "| of layers: INT8, % | float Linears, % | convolutions, % | attention, % of all | INT8, % of all "
    "| and convolutions and attention, % of all |"
)


def main() -> None:
    """Print the table, or what is asked for of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="parts of model names; none: all")
    asked = parser.parse_args().models
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    for entry in yaml.safe_load((HERE / "models.yaml").read_text()):
        if not asked or any(part in entry["model"] for part in asked):
            print(format_row(entry), flush=True)


if __name__ == "__main__":
    main()
