"""Fixtures for all tests, and what keeps a run of them from hanging."""

import functools
import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from int8run.backends import best_float, float_comparison
from int8run.backends.cpu import Cpu
from int8run.kernels.cpu.library import (
    BuildError,
    load_attention_library,
    load_linear_library,
    load_rows_library,
)

if TYPE_CHECKING:
    from support.cli_process import Command

# --import-mode=importlib leaves sys.path alone; at the end, so that no folder here hides a package
sys.path.append(str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """End the run when a process of pytest-xdist dies.

    With `--dist loadfile`, a process that takes a dead one's place is given no tests, and the run never ends.
    """
    if getattr(config.option, "maxworkerrestart", "absent") is None:
        config.option.maxworkerrestart = "0"


def pytest_collection_finish() -> None:
    """Exempt what stays to the end, millions of objects of libraries and tests, from `gc.collect`."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """The libraries' own clean-up at exit finds everything as it would be."""
    gc.unfreeze()


@functools.cache
def find_library_loaders() -> list[Callable[[], object]]:
    """The functions that load the kernels of this CPU, each of which has succeeded once."""
    loaders: list[Callable[[], object]] = []
    with suppress(BuildError):
        load_rows_library()
        loaders.append(load_rows_library)
        if not Cpu().limits.unsupported_reasons(torch.device("cpu")):
            load_linear_library()
            load_attention_library()
            loaders += [load_linear_library, load_attention_library]
    return loaders


@pytest.fixture(scope="session", autouse=True)
def quick_composition() -> Iterator[None]:
    """Compose configs in two thirds of the time: most tests compose one."""
    from support.hydra_files import remembered_package_files

    with remembered_package_files():
        yield


@pytest.fixture(autouse=True)
def kernel_libraries() -> None:
    """Load the CPU kernels before a test sets another HOME, into whose cache they would be built."""
    for load in find_library_loaders():
        load()


@pytest.fixture(scope="session", autouse=True)
def int8_always_pays() -> Iterator[None]:
    """Let `backend=auto` find no float layer faster: what a test computes depends on no machine's speed.

    No other float dtype is timed, either. Of the whole session, because fixtures of modules run models, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float_comparison, "MIN_FLOAT_GAIN", math.inf)
        patch.setattr(best_float, "RIVALS", ())
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN or the largest integer, so that an operator that leaves a part out fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and (torch.empty_like(torch.zeros(3, dtype=torch.int8)) == 127).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small layers wait for a second thread longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline as a diffusers folder, shared by all tests: none may change it."""
    from support.tiny_pipeline import save_random_pipeline

    return save_random_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(model_folder: Path) -> str:
    """The override that chooses the random pipeline."""
    return f"model.location={model_folder}"


@pytest.fixture(scope="session")
def wide_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with text encoders of more than one block of every format in a row; none may change it."""
    from support.tiny_pipeline import WIDE, save_random_pipeline

    return save_random_pipeline(tmp_path_factory.mktemp("wide_model"), text=WIDE)


@pytest.fixture(scope="session")
def wide_encoders() -> dict[str, nn.Module]:
    """The text encoders of that pipeline, by component; none may change them."""
    from support.tiny_pipeline import WIDE, random_pipeline

    pipeline = random_pipeline(text=WIDE)
    return {name: getattr(pipeline, name).eval() for name in ("text_encoder", "text_encoder_2")}


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> "Iterator[Command]":
    """The `int8run` command, in a folder of the test's own."""
    from support.cli_process import command_in

    with command_in(tmp_path / "work", monkeypatch, capsys) as run:
        yield run
