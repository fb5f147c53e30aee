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
import yaml
from meta_forward import run_on_meta
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from int8run.models.denoiser_classes import get_denoiser_class
from int8run.models.family import load_families

HERE = Path(__file__).parent
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Shares:
    """Numbers of one model.

    Args:
        linears: INT8 and float Linears.
        parameters: weights of INT8 Linears, float Linears, convolutions, and all others.
        work: multiply-adds of the same, and of attention's two products.
    """

    linears: Counter
    parameters: Counter
    work: Counter


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
    work: Counter = Counter()
    for name, kind in kinds.items():

        def count(module, inputs, output, kind=kind):
            return work.update({kind: macs_of(module, inputs, output)})

        model.get_submodule(name).register_forward_hook(count)
    with run_on_meta(), FlopCounterMode(display=False) as flops, torch.no_grad():
        model(**make_argument(entry["inputs"]), return_dict=False)
    # attention is what torch counts besides; two operations are one multiply-add
    work["attention"] = flops.get_total_flops() // 2 - work.total()
    parameters = Counter(dict.fromkeys(("int8", "float", "convolution"), 0))
    for name, kind in kinds.items():
        parameters[kind] += sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False))
    parameters["other"] = sum(p.numel() for p in model.parameters()) - parameters.total()
    return Shares(Counter(kinds.values()), parameters, work)


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
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| family | model | at | Linears INT8 / float | parameters, 10⁹ | in INT8, % | multiply-adds, 10¹² "
    "| of layers: INT8, % | float Linears, % | convolutions, % | attention, % of all | INT8, % of all |"
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
