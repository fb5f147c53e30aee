"""The scripts of `experiments/`, run as a person runs them: for `tests/experiments`.

A script is run in this process, where torch and diffusers are imported already; what it leaves behind (its
modules, its folder on the path, torch's settings) is taken away again.
"""

import importlib.util
import logging
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
EXPERIMENTS = REPOSITORY / "experiments"


def find_scripts() -> list[str]:
    """Every file of `experiments/` that can be run, by its path in there."""
    programs = [
        path
        for path in EXPERIMENTS.rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    programs += EXPERIMENTS.rglob("*.sh")
    return sorted(path.relative_to(EXPERIMENTS).as_posix() for path in programs)


def run_script(script: str, *arguments: str | Path) -> None:
    """Run a Python script of `experiments/` as the command line does; it must end with exit code 0.

    Args:
        script: its path in `experiments/`.
        arguments: the words of the command line.
    """
    assert find_exit_code(script, *arguments) == 0


def load_script(script: str) -> ModuleType:
    """Import a Python script of `experiments/`, to call its functions."""
    path = EXPERIMENTS / script
    spec = importlib.util.spec_from_file_location(f"experiments_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with own_imports(path.parent):
        sys.modules[spec.name] = module  # dataclasses look for their module there
        spec.loader.exec_module(module)
    return module


def find_exit_code(script: str, *arguments: str | Path) -> int | str:
    """The exit code of a script, or the message with which it ends."""
    path = EXPERIMENTS / script
    with pytest.MonkeyPatch.context() as patch, own_imports(path.parent), kept_torch_settings():
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


@contextmanager
def own_imports(folder: Path) -> Iterator[None]:
    """Let modules be imported from a script's folder, and forget them: two folders have a `bench`."""
    path_before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path_before
        for name, module in list(sys.modules.items()):
            if is_of_experiments(module):
                del sys.modules[name]


def is_of_experiments(module: object) -> bool:
    """Whether a module was imported from a file of `experiments/`."""
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(EXPERIMENTS)


@contextmanager
def kept_torch_settings() -> Iterator[None]:
    """Set back what scripts set for the whole process."""
    threads = torch.get_num_threads()
    disabled = logging.root.manager.disable
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(True):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logging.disable(disabled)
