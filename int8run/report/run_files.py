"""The text files that a run leaves in its folder: tables, JSON, YAML, and facts about its environment."""

import csv
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml

from int8run.layers.plan import LayerPlan
from int8run.utils.hardware import get_cpu_name, get_device_name

GIT_TIMEOUT_S = 10
LAYER_COLUMNS = (
    "name",
    "kind",
    "out_features",
    "in_features",
    "shape",
    "macs_share",
    "quantized",
    "why_not",
    "outlier",
    "outlier_why_not",
    "rounding",
    "bits",
    "bits_why",
    "lora",
    "lora_why",
    "backend_asked",
    "backend_used",
    "backends_left_out",
    "speedup_vs_float",
    "instructions",
    "weight_sqnr_db",
    "output_sqnr_db",
    "saturated_share",
)


def write_layers_csv(plans: Sequence[LayerPlan], path: Path) -> None:
    """`layers.csv`: every layer that was planned, once: of the denoiser, then of its ControlNets."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LAYER_COLUMNS)
        writer.writeheader()
        for plan in plans:
            writer.writerow(build_layer_row(plan))


def build_layer_row(plan: LayerPlan) -> dict[str, object]:
    """The row of a layer in `layers.csv`, by column."""
    is_quantized = plan.skip_reason is None
    measured = {name: f"{value:.6g}" for name, value in plan.measured.items()}
    speedup = "" if plan.speedup is None else f"{plan.speedup:g}"
    macs_share = "" if plan.macs_share is None else f"{plan.macs_share:.6g}"
    return {
        "name": plan.name,
        "kind": plan.kind,
        "out_features": plan.out_features,
        "in_features": plan.in_features,
        "shape": plan.shape,
        "macs_share": macs_share,
        "quantized": "true" if is_quantized else "false",
        "why_not": plan.skip_reason or "",
        "outlier": plan.outlier,
        "outlier_why_not": plan.outlier_skip_reason,
        "rounding": plan.rounding,
        "bits": plan.bits if is_quantized and plan.num_weights else "",
        "bits_why": plan.bits_reason,
        "lora": plan.lora,
        "lora_why": plan.lora_reason,
        "backend_asked": plan.backend_asked,
        "backend_used": plan.backend_used,
        "backends_left_out": plan.backends_left_out,
        "speedup_vs_float": speedup,
        "instructions": plan.instructions,
        **measured,
    }


def write_json(data: object, path: Path) -> None:
    """Write indented JSON whole or not at all.

    JSON has no number for infinity and NaN: they become the strings `inf`, `-inf` and `nan`.
    """
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(json.dumps(replace_non_finite(data), indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def replace_non_finite(value: object) -> object:
    """A value with its non-finite floats as strings, in mappings and sequences at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return value


def write_yaml(data: object, path: Path) -> None:
    """Write YAML in the order of the data."""
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")


def collect_environment(device: torch.device, versions: Mapping[str, str]) -> dict[str, object]:
    """What a run ran on.

    Args:
        device: where the model is.
        versions: of the libraries.

    Returns:
        Facts about the machine, the versions, and the git revision of the working folder.
    """
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": dict(versions),
        "git": read_git_revision(),
    }
    if device.type != "cpu":
        facts["gpu"] = get_device_name(device)
    else:
        facts["cpu"] = get_cpu_name()
    return facts


def read_git_revision() -> str | None:
    """The revision of the working folder, with `-dirty` when it is changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
