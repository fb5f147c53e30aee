"""Importing does nothing: no GPU, no file, no heavy library before a job needs it."""

import os
import subprocess
import sys

import pytest
from support.source_files import FILES, ROOT

HEAVY = "torch", "diffusers", "transformers", "mlflow"

EVERY_MODULE = """
import importlib, os, sys, torch

def refuse(*_):
    raise RuntimeError("CUDA was initialised by an import")

torch.cuda._lazy_init = refuse
threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
for name in sys.argv[1:]:
    importlib.import_module(name)
settings = (torch.get_num_threads(), torch.is_grad_enabled())
assert settings == (threads, grad), "an import changed torch's settings"
assert not torch.cuda.is_initialized()
assert "mlflow" not in sys.modules, "only the MLflow tracker may import mlflow"
assert os.listdir() == [], f"an import wrote {os.listdir()}"
"""

LIGHT = """
import sys
import int8run, int8run.cli, int8run.config.help, int8run.errors
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {HEAVY, "hydra", "omegaconf", "numpy", "rich"}, loaded

def after(*arguments):
    sys.argv = ["int8run", *arguments]
    try:
        int8run.cli.main()
    except SystemExit as end:
        assert end.code == 2, end.code
    return {name.split(".")[0] for name in sys.modules}

assert not after("--help") & {HEAVY, "hydra", "omegaconf", "numpy", "rich"}
assert not after("--cfg", "job") & {HEAVY}
assert not after("model=tinny") & {HEAVY}, "a misspelt word is found before anything heavy is imported"
assert not after("lora.strenght=1") & {HEAVY}
print("done", file=sys.stderr)
"""


def python(code, folder, *arguments):
    """Run code in a new interpreter in an empty folder, without the switches of this process."""
    environment = {k: v for k, v in os.environ.items() if k not in ("INT8RUN_DEBUG", "HYDRA_FULL_ERROR")}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def modules():
    """Every module, by its file; the links int8run/conf and int8run/kernels are followed by hand."""
    dotted = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in FILES]
    return sorted(name if name.startswith("int8run") else f"int8run.{name}" for name in dotted)


@pytest.mark.slow
def test_importing_every_module_touches_nothing(tmp_path):
    names = modules()
    assert {"int8run", "int8run.cli", "int8run.conf", "int8run.kernels.hadamard.reference"} <= set(names)
    names.remove("int8run.tracking.mlflow_tracker")
    python(EVERY_MODULE, tmp_path, *names)


def test_the_command_line_stays_light_until_a_job_starts(tmp_path):
    ended = python(LIGHT.replace("HEAVY", ", ".join(map(repr, HEAVY))), tmp_path)
    assert ended.stderr.endswith("done\n") and "shipped:tiny" in ended.stdout
    assert list(tmp_path.iterdir()) == []
