"""A job as the command line would start it, without a process of its own."""

import contextlib
import io
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from safetensors.torch import save_file
from torch import nn

from int8run.config.compose import create_run_spec, get_plain_config, int8run_options
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.metrics.names import METRICS
from int8run.tasks.run import RunResult, run


def uncached(overrides: list[str]) -> list[str]:
    """These overrides, and nothing kept on disk unless they say where: a test neither finds what another left
    nor writes at home.
    """
    return (
        overrides
        if any(word.startswith("cache.") for word in overrides)
        else [*overrides, "cache.limit_gb=0"]
    )


def make_spec(overrides: list[str]) -> RunSpec:
    """The RunSpec of these overrides."""
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
        return create_run_spec(compose("config", uncached(overrides)))


def run_job(overrides: list[str], out: Path) -> RunResult:
    """Run one job into `out`."""
    with int8run_options(), initialize_config_module("int8run.conf", version_base="1.3"):
        config = compose("config", uncached(overrides))
    out.mkdir(parents=True, exist_ok=True)
    about = Job(get_plain_config(config), choices={"model": "tiny"}, overrides=overrides, output_dir=out)
    with contextlib.redirect_stdout(io.StringIO()):
        result = run(create_run_spec(config), about)
    unnamed = set(result.metrics) - set(METRICS)
    assert not unnamed, f"metrics/names.py does not name {unnamed}, so that metrics.objective= refuses them"
    return result


def save_lora(
    path: Path, model: nn.Module, only: str = "to_", prefix: str = "transformer.", rank: int = 4
) -> Path:
    """A seeded LoRA in PEFT's layout on the Linears whose name holds `only`."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and only in name:
            tensors[f"{prefix}{name}.lora_A.weight"] = (
                torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            )
            tensors[f"{prefix}{name}.lora_B.weight"] = (
                torch.randn(module.out_features, rank, generator=generator) * 0.3
            )
    save_file(tensors, path, metadata={"modelspec.trigger_phrase": "test style"})
    return path
