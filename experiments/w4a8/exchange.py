"""Whether files of 4 and 6 bits, and INT8 ConvRot files, mean the same to int8run and to comfy-kitchen.

    pip install comfy-kitchen==0.2.40
    python experiments/w4a8/exchange.py [--json FILE]

Both sides are given the other's files. comfy-kitchen's own quantizer (`AsymW4A8Int8Layout.quantize`, eager,
on the CPU) writes layers, which int8run reads; `task=quantize` of int8run writes layers, which comfy-kitchen
reads. Compared are the int8 numbers that codes decode to, bit by bit, and the weights that they stand for.
Then `task=audit` grades every file beside the floats that it was made from.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from int8run.audit.file_audit import FileAudit, audit_file
from int8run.checkpoints.declared_format import UNDECLARED
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.export.stream_plan import QuantizationRecipe, keep_own_names, plan_targets
from int8run.export.stream_quantizer import write_targets
from int8run.models.family import AutoFamily
from int8run.outlier.convrot import ConvRot
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.rounding import AbsMax, Mse
from int8run.tasks.audit_sources import plan_audit, read_checkpoint

LAYER = "blocks.0.q"
ROTATION = 256
# name -> what comfy-kitchen's quantizer is asked for
THEIRS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, groups of 4": {"group_size": 4},
    "4 bits, groups of 32": {"group_size": 32},
    "4 bits, scales in float32": {"scale_dtype": torch.float32},
    "4 bits, without a codebook": {"codebook": False},
    "4 bits, asymmetric": {"symmetric": False},
    "4 bits, rounded at random": {"stochastic_rounding": 7},
    "6 bits": {"bits": 6},
    "6 bits, groups of 32": {"bits": 6, "group_size": 32},
    "6 bits, without a search": {"bits": 6, "scale_search": False},
}
OURS = {
    "4 bits, absmax": QuantizationRecipe(ConvRot(ROTATION), AbsMax(), layout=GroupLayout(4)),
    "4 bits, mse": QuantizationRecipe(ConvRot(ROTATION), Mse(), layout=GroupLayout(4)),
    "4 bits, groups of 32": QuantizationRecipe(ConvRot(ROTATION), AbsMax(), layout=GroupLayout(4, 32)),
    "6 bits, absmax": QuantizationRecipe(ConvRot(ROTATION), AbsMax(), layout=GroupLayout(6)),
    "6 bits, mse": QuantizationRecipe(ConvRot(ROTATION), Mse(), layout=GroupLayout(6)),
}


def make_weights() -> Iterator[tuple[str, Tensor]]:
    """Weights of the usual kind, with columns of very different size, and with heavy tails."""
    generator = torch.Generator().manual_seed(0)
    usual = 0.02 * torch.randn(96, 1024, generator=generator)
    columns = torch.randn(1, 1024, generator=generator).exp()
    spikes = torch.zeros(96, 1024)
    spikes[:, ::16] = torch.randn(96, 64, generator=generator)
    yield "usual", usual
    yield "uneven columns", usual * columns
    yield "in bfloat16", usual.bfloat16()
    yield "zeros in it", usual * (torch.rand(96, 1024, generator=generator) > 0.5)
    yield "heavy tails", spikes


def encode_marker(fields: Mapping[str, object]) -> Tensor:
    """A `comfy_quant` tensor."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def write_theirs(weight: Tensor, options: Mapping[str, Any], path: Path) -> tuple[Tensor, Tensor]:
    """A file of one layer by comfy-kitchen's quantizer and names.

    Returns the int8 numbers and the weight that comfy-kitchen takes out of it.
    """
    from comfy_kitchen.tensor import AsymW4A8Int8Layout

    qdata, params = AsymW4A8Int8Layout.quantize(weight, convrot_groupsize=ROTATION, **options)
    tensors = AsymW4A8Int8Layout.state_dict_tensors(qdata, params)
    named = {f"{LAYER}.weight{suffix}": tensor for suffix, tensor in tensors.items()}
    marker = {
        "format": "asym_w4a8_int8",
        "group_size": params.group_size,
        "convrot_groupsize": params.convrot_groupsize,
    }
    save_file({**named, f"{LAYER}.comfy_quant": encode_marker(marker)}, path)
    return read_by_kitchen(path, params.group_size)


def read_by_kitchen(path: Path, group_size: int) -> tuple[Tensor, Tensor]:
    """The int8 numbers and the weight, float32, that comfy-kitchen takes out of a file."""
    from comfy_kitchen.backends.eager.w4a8_int8 import _dequant_int4_grouped_to_int8
    from comfy_kitchen.tensor.w4a8_int8 import dequantize_w4a8_int8_weight

    tensors = load_file(path)
    part = {key.removeprefix(f"{LAYER}.weight"): tensor for key, tensor in tensors.items()}
    integers = _dequant_int4_grouped_to_int8(part[""], part["_s_rel"], part.get("_codebook"), group_size)
    weight = dequantize_w4a8_int8_weight(
        part[""],
        part["_s_rel"],
        part["_s_channel"],
        codebook=part.get("_codebook"),
        correction=part.get("_correction"),
        group_size=group_size,
        convrot_groupsize=ROTATION,
        output_dtype=torch.float32,
    )
    return integers, weight


def read_by_int8run(path: Path) -> tuple[Tensor, Tensor]:
    """The same by int8run."""
    with TensorFiles.open(path) as files:
        layer = read_layers(files)[LAYER]
        grouped = layer.read_grouped_weight(files, slice(0, layer.rows))
        return grouped.decode().qdata, layer.read_weight(files)


def write_ours(weight: Tensor, recipe: QuantizationRecipe, path: Path) -> None:
    """A file of one layer, as `task=quantize` writes it."""
    source = path.with_name("float.safetensors")
    save_file({f"{LAYER}.weight": weight}, source)
    with TensorFiles.open(source) as files:
        stored = read_layers(files)
        targets = plan_targets(files, stored, keep_own_names(files, stored), lambda key, parts: None, recipe)
        write_targets(files, stored, targets, path, {}, recipe)


def compare(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How far two readings of one file are apart: int8 numbers that differ, and the weights' distance."""
    error = (ours[1] - theirs[1]).norm() / theirs[1].norm()
    return {"differing_int8": int((ours[0] != theirs[0]).sum()), "relative_distance": float(error)}


def audit_beside(path: Path, weight: Tensor) -> FileAudit:
    """Audit a file of one layer beside the float weight."""
    base = path.with_name("base.safetensors")
    save_file({f"{LAYER}.weight": weight}, base)
    with TensorFiles.open(path) as files, TensorFiles.open(base) as base_files:
        read = read_checkpoint(files, UNDECLARED)
        return audit_file(plan_audit(read, read_checkpoint(base_files, UNDECLARED), AutoFamily()))


def write_int8_convrot(weight: Tensor, group_size: int, path: Path) -> None:
    """An INT8 ConvRot file of one layer by comfy-kitchen's own quantizer."""
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    qdata, params = TensorWiseINT8Layout.quantize(
        weight, per_channel=True, convrot=True, convrot_groupsize=group_size
    )
    marker = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group_size}
    tensors = {
        f"{LAYER}.weight": qdata,
        f"{LAYER}.weight_scale": params.scale,
        f"{LAYER}.comfy_quant": encode_marker(marker),
    }
    save_file(tensors, path)


def describe_audit(found: FileAudit) -> dict[str, Any]:
    """Grade, recipe and exactness of a file with one layer."""
    layer = found.quantized[0]
    return {
        "grade": found.grade,
        "findings": [finding.code for finding in found.findings],
        "rotation": layer.found_rotation,
        "recipe": layer.recipe,
        "to_the_bit": layer.is_reproduced,
        "differing": layer.differing,
        "sqnr_db": layer.sqnr_db,
    }


def run(folder: Path) -> list[dict[str, Any]]:
    """All comparisons, one row each."""
    rows: list[dict[str, Any]] = []
    path = folder / "file.safetensors"
    for kind, weight in make_weights():
        for name, options in THEIRS.items():
            theirs = write_theirs(weight, options, path)
            row = {"weight": kind, "written by": "comfy-kitchen", "format": name}
            read = compare(read_by_int8run(path), theirs)
            rows.append({**row, **read, **describe_audit(audit_beside(path, weight))})
        for name, recipe in OURS.items():
            write_ours(weight, recipe, path)
            assert recipe.layout is not None
            row = {"weight": kind, "written by": "int8run", "format": name}
            read = compare(read_by_int8run(path), read_by_kitchen(path, recipe.layout.group_size))
            rows.append({**row, **read, **describe_audit(audit_beside(path, weight))})
        for group_size in (256, 64, 16):
            write_int8_convrot(weight, group_size, path)
            row = {"weight": kind, "written by": "comfy-kitchen", "format": f"INT8 ConvRot {group_size}"}
            rows.append({**row, **describe_audit(audit_beside(path, weight))})
    return rows


def write_golden(path: Path) -> None:
    """A small file of comfy-kitchen's codes and what it decodes them to, for tests without the package.

    Each layer is one of `THEIRS`; beside it stand `int8`, and `weight` as comfy-kitchen gives it.
    """
    weight = 0.02 * torch.randn(2, ROTATION, generator=torch.Generator().manual_seed(1))
    golden: dict[str, Tensor] = {"float": weight}
    with tempfile.TemporaryDirectory() as folder:
        for number, options in enumerate(THEIRS.values()):
            file = Path(folder) / "file.safetensors"
            integers, read = write_theirs(weight, options, file)
            for key, tensor in load_file(file).items():
                golden[key.replace(LAYER, f"layer{number}")] = tensor
            golden[f"expected{number}.int8"] = integers
            golden[f"expected{number}.weight"] = read
    save_file(golden, path, {"made by": "comfy-kitchen 0.2.40, experiments/w4a8/exchange.py"})


def main() -> None:
    """Compare, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--golden", type=Path, help="write the file of the tests there, and nothing else")
    options = parser.parse_args()
    if options.golden is not None:
        write_golden(options.golden)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder))
    for row in rows:
        print(" · ".join(f"{key} {value}" for key, value in row.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
